_base_ = '../_base_/mask-rcnn_swin-b_coco.py'
model = dict(backbone=dict(method=dict(type='Rein')))
