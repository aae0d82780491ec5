_base_ = '../_base_/mask-rcnn_swin-b_coco.py'
model = dict(
    backbone=dict(method=dict(type='BAPAT', dim=128, adaptformer_dim=64)))
