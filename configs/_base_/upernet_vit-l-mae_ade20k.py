# UPerNet, ViT-L/16 of MAE, ADE20K 160k: the recipe of ViT-B.
_base_ = './upernet_vit-b-mae_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
        **_base_.vit.l_mae),
    neck=dict(in_channels=[1024] * 4, out_channels=1024),
    decode_head=dict(in_channels=[1024] * 4),
    auxiliary_head=dict(in_channels=1024))
