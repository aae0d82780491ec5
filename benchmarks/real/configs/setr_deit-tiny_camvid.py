"""DeiT-tiny with a light SETR head, CamVid at 240x176 (width x height).

The images are resized once, by ``benchmarks/real/run.py``, which also sets
the paths, the learning rates, the method and the split of a cell. By hand::

    python tools/train.py --method Mona:dim=16 \
        benchmarks/real/configs/setr_deit-tiny_camvid.py
"""

_base_ = ['./upernet_swin-nano_camvid.py']

data_root = 'data/real/camvid_240x176'
checkpoint = 'data/real/deit_tiny_patch16_224_in1k_mmpretrain.pth'
max_iters = 300

model = dict(
    data_preprocessor=dict(size=(176, 240)),
    backbone=dict(
        _delete_=True,
        type='mmpeft.PEFTBackbone',
        stock='mmpretrain.VisionTransformer',
        method=dict(type='Full'),
        arch='deit-tiny',
        # As pre-trained; the positions follow the image in the forward.
        img_size=224,
        patch_size=16,
        out_type='featmap',
        init_cfg=dict(
            type='Pretrained', checkpoint=checkpoint, prefix='backbone.')),
    decode_head=dict(
        _delete_=True,
        type='mmseg.SETRUPHead',
        in_channels=192,
        channels=64,
        in_index=0,
        num_classes=11,
        num_convs=1,
        up_scale=4,
        kernel_size=3,
        align_corners=False,
        norm_cfg=dict(type='BN', requires_grad=True),
        loss_decode=dict(type='mmseg.CrossEntropyLoss')))

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=30,
        end=max_iters)
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'ln1': dict(decay_mult=0.),
            'ln2': dict(decay_mult=0.),
            'pos_embed': dict(decay_mult=0.),
            'cls_token': dict(decay_mult=0.)
        }))
