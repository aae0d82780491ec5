# UPerNet, ViT-B/16 of DeiT III, ADE20K 160k: the recipe of the others. Its
# blocks offer no norms: mmpretrain has one norm before both branches.
_base_ = './upernet_vit-b-mae_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        **_base_.vit.b_deit3))
