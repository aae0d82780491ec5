# Mask2Former, Swin-L, COCO instances: the recipe of Swin-B, with the 200
# queries of the stock Swin-L for COCO panoptic.
_base_ = './mask2former_swin-b_coco.py'

pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth'  # noqa
model = dict(
    backbone=dict(
        embed_dims=192,
        num_heads=[6, 12, 24, 48],
        init_cfg=dict(checkpoint=pretrained)),
    panoptic_head=dict(num_queries=200, in_channels=[192, 384, 768, 1536]))
