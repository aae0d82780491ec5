# Swin-B of ImageNet-22k, fine-tuned on ImageNet-1k (the weights that
# mmpretrain's metafile has), with the stock head on the average of its map.
_base_ = 'mmpretrain::_base_/models/swin_transformer/base_224.py'

pretrained = 'https://download.openmmlab.com/mmclassification/v0/swin-transformer/convert/swin_base_patch4_window7_224_22kto1k-f967f799.pth'  # noqa
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True),
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmpretrain.SwinTransformer',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint=pretrained, prefix='backbone.')),
    head=dict(
        loss=dict(_delete_=True, type='CrossEntropyLoss', loss_weight=1.)),
    # Without the stock one's Mixup and CutMix.
    train_cfg=None)
