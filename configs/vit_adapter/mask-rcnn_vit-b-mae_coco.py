_base_ = '../_base_/mask-rcnn_vit-b-mae_coco.py'
# Four maps of strides 4 to 32 take the place of the outputs, and of the first
# of two necks, which makes such maps of them.
model = dict(
    backbone=dict(method=dict(type='ViTAdapter')), neck=_base_.model.neck[1:])
