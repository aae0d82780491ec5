_base_ = '../_base_/retinanet_swin-l_voc0712.py'
model = dict(backbone=dict(method=dict(type='E3VA', num_branches=2)))
