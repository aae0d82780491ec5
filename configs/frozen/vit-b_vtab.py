_base_ = '../_base_/vit-b_vtab.py'
model = dict(backbone=dict(method=dict(type='Frozen')))
