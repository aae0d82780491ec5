"""DeiT-tiny and a linear layer on its class token, ten images a class.

The images are laid out by ``benchmarks/real/few_shot.py``; the plan is
``benchmarks/real/few_shot_plan.py``. By hand::

    python tools/train.py --method Mona:dim=16 \
        benchmarks/real/configs/few_shot_deit-tiny.py
"""

_base_ = ['mmpretrain::_base_/default_runtime.py']
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

data_root = 'data/few_shot'
checkpoint = 'data/deit_tiny/deit_tiny_patch16_224_in1k_mmpretrain.pth'
max_iters = 30

model = dict(
    type='mmpretrain.ImageClassifier',
    data_preprocessor=dict(
        num_classes=20,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True),
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmpretrain.VisionTransformer',
        arch='deit-tiny',
        # As pre-trained; the positions follow the image in the forward.
        img_size=224,
        patch_size=16,
        init_cfg=dict(
            type='Pretrained', checkpoint=checkpoint, prefix='backbone.')),
    head=dict(
        type='mmpretrain.VisionTransformerClsHead',
        num_classes=20,
        in_channels=192,
        loss=dict(type='mmpretrain.CrossEntropyLoss')))

# 64 x 64 as they come. Below 112 the base loses most of what it knows.
_load = [
    dict(type='mmpretrain.LoadImageFromFile'),
    dict(type='mmpretrain.Resize', scale=112, interpolation='bicubic'),
]
train_pipeline = [
    *_load,
    dict(type='mmpretrain.RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='mmpretrain.PackInputs')
]
train_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='mmengine.InfiniteSampler', shuffle=True),
    dataset=dict(
        type='mmpretrain.CustomDataset',
        data_root=data_root,
        ann_file='train.txt',
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    sampler=dict(type='mmengine.DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmpretrain.CustomDataset',
        data_root=data_root,
        ann_file='test.txt',
        pipeline=[*_load, dict(type='mmpretrain.PackInputs')]))
test_dataloader = val_dataloader
val_evaluator = dict(type='mmpretrain.Accuracy', topk=(1, ))
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
param_scheduler = [
    dict(
        type='mmengine.LinearLR',
        start_factor=0.1,
        by_epoch=False,
        begin=0,
        end=5),
    dict(
        type='mmengine.PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=5,
        end=max_iters)
]
train_cfg = dict(by_epoch=False, max_iters=max_iters, val_interval=max_iters)
val_cfg = dict()
test_cfg = dict()

log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=max_iters),
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
