_base_ = '../_base_/upernet_vit-b_pascal-context.py'
model = dict(backbone=dict(method=dict(type='SCT', num_channels=96)))
custom_hooks = [dict(type='mmpeft.CalibrateHook')]
