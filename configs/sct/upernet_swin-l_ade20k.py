_base_ = '../_base_/upernet_swin-l_ade20k.py'
model = dict(backbone=dict(method=dict(type='SCT', num_channels=96)))
custom_hooks = [dict(type='mmpeft.CalibrateHook')]
