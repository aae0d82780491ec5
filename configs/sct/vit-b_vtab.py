_base_ = '../_base_/vit-b_vtab.py'
model = dict(backbone=dict(method=dict(type='SCT', num_channels=96)))
custom_hooks = [dict(type='mmpeft.CalibrateHook')]
