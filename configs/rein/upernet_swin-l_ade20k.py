_base_ = '../_base_/upernet_swin-l_ade20k.py'
model = dict(backbone=dict(method=dict(type='Rein')))
