# Mask R-CNN, ViT-L/16 of MAE, COCO: the recipe of ViT-B.
_base_ = './mask-rcnn_vit-b-mae_coco.py'

width = 1024
model = dict(
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
        **_base_.vit.l_mae),
    neck=[
        dict(type='mmseg.Feature2Pyramid', embed_dim=width),
        {
            **_base_.model.neck[1], 'in_channels': [width] * 4
        },
    ])
