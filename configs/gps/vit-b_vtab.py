_base_ = '../_base_/vit-b_vtab.py'
model = dict(backbone=dict(method=dict(type='GPS', num_inputs=1)))
custom_hooks = [dict(type='mmpeft.CalibrateHook', loss='contrastive')]
