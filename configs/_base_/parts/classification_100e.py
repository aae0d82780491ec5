# 100 epochs of AdamW, 10 of them warm-up, cosine to 1e-5, 64 images per step:
# the defaults of V-PETL Bench for pictures, which tunes learning rate and
# weight decay for each data set. Here they are 1e-3 and 0.05, not tuned.
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['mmpeft'], allow_failed_imports=False)

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
param_scheduler = [
    dict(
        type='mmengine.LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True),
    dict(
        type='mmengine.CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        begin=10,
        end=100,
        convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=10)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=64)

default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3),
    peft_report=dict(type='mmpeft.PEFTReportHook'),
    peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
