# Mask2Former, Swin-B, COCO instances: the stock Swin-S recipe (its depths)
# with the widths and weights of the stock Swin-B for COCO panoptic. Learning
# rate of the recipe: 1e-4 for 16 images (8 GPUs x 2), a tenth of it in the
# backbone, and so for what is attached to it.
_base_ = 'mmdet::mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py'
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window12_384_22k.pth'  # noqa
model = dict(
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmdet.SwinTransformer',
        pretrain_img_size=384,
        embed_dims=128,
        num_heads=[4, 8, 16, 32],
        window_size=12,
        init_cfg=dict(checkpoint=pretrained)),
    panoptic_head=dict(in_channels=[128, 256, 512, 1024]))

default_hooks = dict(
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
