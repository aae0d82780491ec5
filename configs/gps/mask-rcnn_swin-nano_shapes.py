_base_ = '../_base_/mask-rcnn_swin-nano_shapes.py'
model = dict(backbone=dict(method=dict(type='GPS', num_inputs=1)))
custom_hooks = [dict(type='mmpeft.CalibrateHook')]
