_base_ = '../_base_/mask-rcnn_swin-nano_shapes.py'
model = dict(backbone=dict(method=dict(type='Rein', rank=8)))
