# RetinaNet, Swin-L, VOC 07+12: the stock VOC recipe (4 epochs of a data set
# repeated 3 times, AP50 by the 11-point rule of VOC 2007) with Swin-L, AdamW
# and AMP, as in the released Mona code (mona_configs/swin-l_voc). Learning
# rate of the recipe: 1e-4; the released logs use 2 images per step (2 GPUs x
# 1), this config keeps the 16 of the stock one (8 GPUs x 2).
_base_ = 'mmdet::pascal_voc/retinanet_r50_fpn_1x_voc0712.py'
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

# ImageNet-22k, in the format of the original repository; convert_weights
# renames its keys.
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window7_224_22k.pth'  # noqa
model = dict(
    # The stock config is a ResNet's; only its backbone is dropped.
    backbone=dict(
        _delete_=True,
        type='mmpeft.PEFTBackbone',
        stock='mmdet.SwinTransformer',
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=7,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    neck=dict(in_channels=[384, 768, 1536], start_level=0))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(
        _delete_=True,
        type='AdamW',
        lr=0.0001,
        betas=(0.9, 0.999),
        weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.),
            'relative_position_bias_table': dict(decay_mult=0.),
            'norm': dict(decay_mult=0.)
        }))

default_hooks = dict(
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
