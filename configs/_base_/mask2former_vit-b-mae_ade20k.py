# Mask2Former, ViT-B/16 of MAE, ADE20K: the stock Swin-S recipe, with
# mmseg's pyramid for ViT before the head. Learning rate of the recipe: 1e-4
# for 16 images (8 GPUs x 2), a tenth of it in the backbone, and so for what is
# attached to it.
_base_ = __import__('mmpeft') and [
    'mmseg::mask2former/mask2former_swin-s_8xb2-160k_ade20k-512x512.py',
    './parts/vit_backbones.py'
]
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

width = 768
model = dict(
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        **_base_.vit.b_mae),
    neck=dict(type='mmseg.Feature2Pyramid', embed_dim=width),
    decode_head=dict(in_channels=[width] * 4))

# The stock recipe names the norms of its backbone; the longest key wins.
no_decay = dict(lr_mult=0.1, decay_mult=0.0)
norms = ['ln1'] + [f'layers.{i}.ln{j}' for i in range(12) for j in (1, 2)]
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            f'backbone.{name}': no_decay
            for name in ('pos_embed', 'cls_token', *norms)
        }))

default_hooks = dict(
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
