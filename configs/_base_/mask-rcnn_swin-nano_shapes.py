# The demo's detector on the target domain of the embedded data: other
# textures, noise and scale, and new classes, so neck and heads start fresh.
# `tools/demo.py` makes the checkpoint. Every method has the learning rate of
# the source training, not tuned, and widths in the ratio of the papers: 64
# channels for Swin-B's 128 at the first stage are 16 for 32 here.
_base_ = './mask-rcnn_swin-nano_shapes-source.py'

data_root = 'data/shapes_v1/'
metainfo = dict(classes=('ring', 'cross', 'star', 'crescent', 'arrow'))
train_dataloader = dict(
    dataset=dict(
        ann_file='target_train.json',
        data_prefix=dict(img='images/target_train/'),
        metainfo=metainfo))
val_dataloader = dict(
    dataset=dict(
        ann_file='target_val.json',
        data_prefix=dict(img='images/target_val/'),
        metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='target_val.json')
test_evaluator = val_evaluator

model = dict(
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmdet.SwinTransformer',
        init_cfg=dict(
            _delete_=True,  # of None: the source starts from scratch
            type='Pretrained',
            checkpoint=data_root + 'swin-nano_source.pth')),
    roi_head=dict(
        bbox_head=dict(num_classes=5), mask_head=dict(num_classes=5)))

max_epochs = 16
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(
        type='mmengine.LinearLR',
        start_factor=0.01,
        by_epoch=False,
        begin=0,
        end=50),
    dict(
        type='mmengine.CosineAnnealingLR',
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True)
]
default_hooks = dict(
    checkpoint=dict(interval=max_epochs),
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
