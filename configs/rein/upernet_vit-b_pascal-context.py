_base_ = '../_base_/upernet_vit-b_pascal-context.py'
model = dict(backbone=dict(method=dict(type='Rein')))
