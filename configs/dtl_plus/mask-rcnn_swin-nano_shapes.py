_base_ = '../_base_/mask-rcnn_swin-nano_shapes.py'
model = dict(backbone=dict(method=dict(type='DTLPlus', rank=4, kernel_size=3)))
