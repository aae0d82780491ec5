_base_ = '../_base_/swin-b_cub.py'
model = dict(backbone=dict(method=dict(type='Frozen')))
