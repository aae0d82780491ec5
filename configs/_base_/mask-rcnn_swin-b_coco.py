# Mask R-CNN, Swin-B, COCO: the stock Swin-T 1x recipe with the widths of
# Swin-B. Learning rate of the recipe: 1e-4 for 16 images (8 GPUs x 2).
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

# ImageNet-22k, in the format of the original repository; the stock backbone
# renames its keys (convert_weights=True, inherited).
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth'  # noqa
model = dict(
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmdet.SwinTransformer',
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[128, 256, 512, 1024]))

default_hooks = dict(
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
