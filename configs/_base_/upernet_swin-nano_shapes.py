# The semantic twin of mask-rcnn_swin-nano_shapes.py: the same scenes as label
# maps, and the same backbone, whose keys mmdet and mmseg share.
# On the maintained stack it is mmpeft that makes `mmseg::` known to mmengine.
_base_ = __import__('mmpeft') and [
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'  # noqa
]
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

data_root = 'data/shapes_v1/'
target = dict(
    type='mmpeft.datasets.ShapesDataset',
    stock='mmseg.BaseSegDataset',
    data_root=data_root,
    img_suffix='.png',
    metainfo=dict(
        classes=('background', 'ring', 'cross', 'star', 'crescent', 'arrow'),
        palette=[[0, 0, 0], [230, 60, 60], [60, 160, 230], [240, 200, 40],
                 [150, 80, 200], [60, 180, 90]]))
crop_size = (128, 128)
train_pipeline = [
    dict(type='mmcv.LoadImageFromFile'),
    dict(type='mmseg.LoadAnnotations'),
    dict(type='mmseg.Resize', scale=crop_size, keep_ratio=True),
    dict(
        type='mmcv.RandomFlip', prob=0.5, direction=['horizontal',
                                                     'vertical']),
    dict(type='mmseg.PackSegInputs')
]
# Inferencers of mmdet and mmseg know the loader by this very name.
test_pipeline = [
    dict(type='LoadImageFromFile', _scope_='mmseg'),
    dict(type='mmseg.Resize', scale=crop_size, keep_ratio=True),
    dict(type='LoadAnnotations', _scope_='mmseg'),
    dict(type='mmseg.PackSegInputs')
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        data_prefix=dict(
            img_path='images/target_train',
            seg_map_path='labels/target_train'),
        pipeline=train_pipeline,
        **target))
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        data_prefix=dict(
            img_path='images/target_val', seg_map_path='labels/target_val'),
        test_mode=True,
        pipeline=test_pipeline,
        **target))
test_dataloader = val_dataloader

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmseg.SwinTransformer',
        embed_dims=32,
        depths=[2, 2, 4, 2],
        num_heads=[1, 2, 4, 8],
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint=data_root + 'swin-nano_source.pth')),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=64,
        num_classes=6,
        norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=128, channels=32, num_classes=6, norm_cfg=norm_cfg))

max_iters = 300
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(
        type='mmengine.LinearLR',
        start_factor=0.01,
        by_epoch=False,
        begin=0,
        end=50),
    dict(type='mmengine.CosineAnnealingLR', T_max=max_iters, by_epoch=False)
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=max_iters, max_keep_ckpts=1),
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
