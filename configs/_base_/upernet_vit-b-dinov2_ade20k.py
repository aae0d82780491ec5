# UPerNet, ViT-B/14 of DINOv2, ADE20K 160k: the recipe of the others. 512
# pixels are padded to 37 patches of 14.
_base_ = './upernet_vit-b-mae_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        **_base_.vit.b_dinov2))
