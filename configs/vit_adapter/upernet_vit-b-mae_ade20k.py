_base_ = '../_base_/upernet_vit-b-mae_ade20k.py'
# Four maps of strides 4 to 32 take the place of the outputs, and of the neck
# that makes such maps of them.
model = dict(backbone=dict(method=dict(type='ViTAdapter')), neck=None)
