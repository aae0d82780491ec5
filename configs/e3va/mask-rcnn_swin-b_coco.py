_base_ = '../_base_/mask-rcnn_swin-b_coco.py'
model = dict(backbone=dict(method=dict(type='E3VA', num_branches=2)))
