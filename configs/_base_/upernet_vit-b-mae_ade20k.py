# UPerNet, ViT-B/16 of MAE, ADE20K 160k: the stock config of the ViT, with
# released weights. Learning rate of the recipe: 6e-5 for 16 images (8 GPUs x
# 2).
_base_ = __import__('mmpeft') and [
    'mmseg::vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
    './parts/vit_backbones.py'
]
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        **_base_.vit.b_mae))

# What mmpretrain calls its norms.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={
        '.ln1': dict(decay_mult=0.),
        '.ln2': dict(decay_mult=0.)
    }))

default_hooks = dict(
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
