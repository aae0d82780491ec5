# UPerNet, Swin-B, Pascal Context with the 60 classes of the stock data set
# (59 and background). No stock Swin config has this data: model, data,
# schedule (80k, 16 images: 4 GPUs x 4) and runtime are the stock parts, the
# optimizer is that of the stock Swin configs. Learning rate of the recipe:
# 6e-5 for 16 images.
# Importing mmpeft first makes 'mmseg::' known on every stack, also to a stock
# tool that opens this file.
_base_ = __import__('mmpeft') and [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/pascal_context.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py'
]
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

# ImageNet-22k, converted by mmseg (the file of its stock Swin-B config).
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_base_patch4_window7_224_22k_20220317-4f79f7c0.pth'  # noqa
model = dict(
    data_preprocessor=dict(size=(480, 480)),
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmseg.SwinTransformer',
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=60),
    auxiliary_head=dict(in_channels=512, num_classes=60))

optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='AdamW',
        lr=0.00006,
        betas=(0.9, 0.999),
        weight_decay=0.01),
    paramwise_cfg=dict(
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.),
            'relative_position_bias_table': dict(decay_mult=0.),
            'norm': dict(decay_mult=0.)
        }))
param_scheduler = [
    dict(
        type='mmengine.LinearLR',
        start_factor=1e-6,
        by_epoch=False,
        begin=0,
        end=1500),
    dict(
        type='mmengine.PolyLR',
        eta_min=0.0,
        power=1.0,
        begin=1500,
        end=80000,
        by_epoch=False)
]

default_hooks = dict(peft_report=dict(type='mmpeft.PEFTReportHook'))
