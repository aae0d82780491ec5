# PiSSA: A and B start as the leading singular triplets of the loaded weight.
_base_ = './mask-rcnn_swin-b_coco.py'
model = dict(backbone=dict(method=dict(init='pissa')))
