_base_ = '../_base_/cascade-mask-rcnn_swin-b_3x_coco.py'
model = dict(backbone=dict(method=dict(type='E3VA', num_branches=2)))
