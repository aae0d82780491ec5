_base_ = '../_base_/vit-b_cub.py'
model = dict(backbone=dict(method=dict(type='Full')))
