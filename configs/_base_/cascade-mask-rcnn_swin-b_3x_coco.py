# Cascade Mask R-CNN, Swin-B, COCO 3x: the recipe of the papers (released
# Mona code, mona_configs/swin-b_coco). Multi-scale crops, 36 epochs, AMP and
# AdamW come from the stock 3x config. Learning rate of the recipe: 1e-4 for
# 16 images.
_base_ = 'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py'
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

# ImageNet-22k, in the format of the original repository; the stock backbone
# renames its keys (convert_weights=True, inherited).
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth'  # noqa

# Each stage of the cascade: (spread of the box targets, IoU threshold).
cascade = [([0.1, 0.1, 0.2, 0.2], 0.5), ([0.05, 0.05, 0.1, 0.1], 0.6),
           ([0.033, 0.033, 0.067, 0.067], 0.7)]
bbox_head = dict(
    type='mmdet.ConvFCBBoxHead',
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    # mmengine turns it into BN where only one process trains.
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    loss_cls=dict(
        type='mmdet.CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type='mmdet.GIoULoss', loss_weight=10.0))
model = dict(
    type='mmdet.CascadeRCNN',
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmdet.SwinTransformer',
        embed_dims=128,
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
    rpn_head=dict(
        loss_bbox=dict(
            _delete_=True,
            type='mmdet.SmoothL1Loss',
            beta=1.0 / 9.0,
            loss_weight=1.0)),
    roi_head=dict(
        type='mmdet.CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(
                bbox_head,
                bbox_coder=dict(
                    type='mmdet.DeltaXYWHBBoxCoder',
                    target_means=[0., 0., 0., 0.],
                    target_stds=stds)) for stds, _ in cascade
        ]),
    train_cfg=dict(
        rpn=dict(allowed_border=0),
        rpn_proposal=dict(max_per_img=2000),
        rcnn=[
            dict(
                _base_.model.train_cfg.rcnn,
                assigner=dict(
                    _base_.model.train_cfg.rcnn.assigner,
                    pos_iou_thr=iou,
                    neg_iou_thr=iou,
                    min_pos_iou=iou,
                    match_low_quality=False)) for _, iou in cascade
        ]))

param_scheduler = [
    dict(_base_.param_scheduler[0], end=500),  # warm-up iterations
    _base_.param_scheduler[1]
]

default_hooks = dict(
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
