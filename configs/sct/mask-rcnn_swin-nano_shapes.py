_base_ = '../_base_/mask-rcnn_swin-nano_shapes.py'
model = dict(backbone=dict(method=dict(type='SCT', num_channels=16)))
custom_hooks = [dict(type='mmpeft.CalibrateHook')]
