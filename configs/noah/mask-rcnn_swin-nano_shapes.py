_base_ = '../_base_/mask-rcnn_swin-nano_shapes.py'
model = dict(
    backbone=dict(method=dict(type='NOAH', num_tokens=5, rank=5, dim=5)))
