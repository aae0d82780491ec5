# UPerNet, ViT-L/14 of DINOv2, ADE20K 160k: the recipe of the others. 512
# pixels are padded to 37 patches of 14.
_base_ = './upernet_vit-l-mae_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
        **_base_.vit.l_dinov2))
