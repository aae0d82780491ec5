# UPerNet, Swin-B, for data that no stock Swin config has: the stock model
# with the widths of Swin-B.
_base_ = __import__('mmpeft') and [
    'mmseg::_base_/models/upernet_swin.py', './segmentation_80k.py'
]

# ImageNet-22k, converted by mmseg (the file of its stock Swin-B config).
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_base_patch4_window7_224_22k_20220317-4f79f7c0.pth'  # noqa
model = dict(
    backbone=dict(
        type='mmpeft.PEFTBackbone',
        stock='mmseg.SwinTransformer',
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.),
            'relative_position_bias_table': dict(decay_mult=0.)
        }))
