# UPerNet, Swin-L, ADE20K 160k: the stock config, nothing changed but the
# backbone's type. Learning rate of the recipe: 6e-5 for 16 images (8 GPUs x
# 2), the same for every method; the README says what the released code does.
# Importing mmpeft first makes 'mmseg::' known on every stack, also to a stock
# tool that opens this file.
_base_ = __import__('mmpeft') and [
    'mmseg::swin/swin-large-patch4-window7-in22k-pre_upernet_8xb2-160k_'
    'ade20k-512x512.py'
]
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

model = dict(
    backbone=dict(type='mmpeft.PEFTBackbone', stock='mmseg.SwinTransformer'))

default_hooks = dict(
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
