# UPerNet, ViT-L/16 of DeiT III, ADE20K 160k: the recipe of the others. Its
# blocks offer no norms: mmpretrain has one norm before both branches.
_base_ = './upernet_vit-l-mae_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
        **_base_.vit.l_deit3))
