_base_ = '../_base_/upernet_vit-b_pascal-context.py'
model = dict(backbone=dict(method=dict(type='GPS', num_inputs=1)))
custom_hooks = [dict(type='mmpeft.CalibrateHook')]
