_base_ = '../_base_/vit-b_vtab.py'
# The mean of the last map takes the place of the class token.
model = dict(
    backbone=dict(method=dict(type='HST')),
    neck=dict(_delete_=True, type='mmpretrain.GlobalAveragePooling'),
    head=dict(type='mmpretrain.LinearClsHead', in_channels=72))
