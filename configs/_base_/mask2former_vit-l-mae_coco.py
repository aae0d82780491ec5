# Mask2Former, ViT-L/16 of MAE, COCO instances: the recipe of ViT-B.
_base_ = './mask2former_vit-b-mae_coco.py'

width = 1024
model = dict(
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
        **_base_.vit.l_mae),
    neck=dict(embed_dim=width),
    panoptic_head=dict(in_channels=[width] * 4))

# Of the blocks that ViT-B does not have.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            f'backbone.layers.{i}.ln{j}': _base_.no_decay
            for i in range(12, 24)
            for j in (1, 2)
        }))
