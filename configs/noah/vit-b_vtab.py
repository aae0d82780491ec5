_base_ = '../_base_/vit-b_vtab.py'
model = dict(
    backbone=dict(method=dict(type='NOAH', num_tokens=10, rank=10, dim=10)))
