# ViT-B/16 of ImageNet-21k, the stock classifier on its class token.
_base_ = ['mmpretrain::_base_/models/vit-base-p16.py', './vit_backbones.py']

model = dict(
    # -1 to 1, as the weights were trained.
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(_delete_=True, drop_path_rate=0.1, **_base_.vit.b_in21k),
    head=dict(
        loss=dict(_delete_=True, type='CrossEntropyLoss', loss_weight=1.)))
