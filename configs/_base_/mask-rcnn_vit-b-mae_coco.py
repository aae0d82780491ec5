# Mask R-CNN, ViT-B/16 of MAE, COCO: the stock Swin-T 1x recipe. Two stock
# necks in a row make the levels: mmseg's pyramid for ViT, with maps of strides
# 4 to 32, then the FPN. Learning rate of the recipe: 1e-4 for 16 images (8
# GPUs x 2).
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
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
    neck=[
        dict(type='mmseg.Feature2Pyramid', embed_dim=width), {
            **_base_.model.neck, 'in_channels': [width] * 4
        }
    ])

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'pos_embed': dict(decay_mult=0.),
            'cls_token': dict(decay_mult=0.),
            # What mmpretrain calls its norms.
            '.ln1': dict(decay_mult=0.),
            '.ln2': dict(decay_mult=0.)
        }))

default_hooks = dict(
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
