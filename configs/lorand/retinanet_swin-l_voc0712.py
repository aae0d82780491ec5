_base_ = '../_base_/retinanet_swin-l_voc0712.py'
model = dict(backbone=dict(method=dict(type='LoRand', num_branches=2)))
