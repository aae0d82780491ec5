"""UPerNet, a Swin of 2.7 M parameters, CamVid at 240x180 (width x height).

The images are resized once, by ``benchmarks/real/run.py``, which also sets
the paths, the learning rate, the method and the split of a cell. By hand::

    python tools/train.py --method Mona:dim=16 \
        benchmarks/real/configs/upernet_swin-nano_camvid.py
"""

_base_ = ['mmseg::_base_/models/upernet_swin.py']
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)
default_scope = 'mmseg'

data_root = 'data/real/camvid_240x180'
checkpoint = 'data/real/swin_nano_tiny-imagenet-100.pth'
norm_cfg = dict(type='BN', requires_grad=True)
max_iters = 240
channels = 32

model = dict(
    data_preprocessor=dict(size=(180, 240)),
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmseg.SwinTransformer',
        method=dict(type='Full'),
        pretrain_img_size=64,
        embed_dims=32,
        depths=(2, 2, 4, 2),
        num_heads=(2, 4, 8, 16),
        # So short a run from so small a base underfits: no drop-path.
        drop_path_rate=0.,
        init_cfg=dict(
            type='Pretrained', checkpoint=checkpoint, prefix='backbone.')),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=channels,
        num_classes=11,
        norm_cfg=norm_cfg),
    auxiliary_head=None)

normal_data = dict(
    type='mmseg.BaseSegDataset',
    data_root=data_root,
    img_suffix='.png',
    seg_map_suffix='.png',
    metainfo=dict(
        classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree',
                 'sign_symbol', 'fence', 'car', 'pedestrian', 'bicyclist'),
        palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128],
                 [0, 0, 192], [128, 128, 0], [192, 128, 128], [64, 64, 128],
                 [64, 0, 128], [64, 64, 0], [0, 128, 192]]))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **normal_data,
        data_prefix=dict(
            img_path='images/train', seg_map_path='annotations/train'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='mmseg.LoadAnnotations'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='mmseg.PackSegInputs')
        ]))
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **normal_data,
        data_prefix=dict(
            img_path='images/val', seg_map_path='annotations/val'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='mmseg.LoadAnnotations'),
            dict(type='mmseg.PackSegInputs')
        ]))
val_evaluator = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])
test_dataloader = val_dataloader
test_evaluator = val_evaluator

# One learning rate for everything that trains, as in the stock Swin recipes:
# the head gets the same one as the backbone or what is attached to it.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='AdamW', lr=1.5e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            'relative_position_bias_table': dict(decay_mult=0.),
            'norm': dict(decay_mult=0.)
        }))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=24),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=24,
        end=max_iters)
]
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=40, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=max_iters,
        save_optimizer=False),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    peft_report=dict(type='mmpeft.PEFTReportHook'))
log_processor = dict(by_epoch=False)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
randomness = dict(seed=0)
