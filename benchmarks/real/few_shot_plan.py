# Few-shot classification on real data: ten images each of 20 classes of Tiny
# ImageNet, DeiT-tiny. Sized for one CPU core; docs/en/bench_few_shot.md says
# how to run it and what came out.
#
# Methods have the settings of the preset `classification` (the survey's for
# VTAB-1k with ViT-B); as DeiT-tiny is four times narrower, numbers of 16 and
# more are divided by four, smaller ones are kept. Below is what differs, and
# what the preset does not have. ViT-Adapter is not in it: a classifier reads
# one of its four maps, and what makes the others would not train.
_base_ = ['../../mmpeft/bench/presets/classification.py']
name = 'few-shot'
title = 'Few-shot classification: Tiny ImageNet, DeiT-tiny'

seeds = (0, 1, 2)
methods = {
    'VPTShallow': 'VPTShallow:num_tokens=25',
    'VPTDeep': 'VPTDeep:num_tokens=12',
    'PrefixTuning': 'PrefixTuning:num_tokens=5',
    'SCT': 'SCT:num_channels=24',
    'FacTTT': 'FacTTT:rank=4',
    'FacTTK': 'FacTTK:rank=8',
    'LAST': 'LAST:rank=4',
    'BAPAT': 'BAPAT:dim=8,adaptformer_dim=16',
    'LoRand': 'LoRand:num_branches=2',
    'E3VA': 'E3VA:num_branches=2',
    'Rein': 'Rein:num_tokens=25,rank=4',
    'Mona': 'Mona:dim=16',
    'Convpass': 'Convpass:dim=8',
    'AdapterPlus': 'AdapterPlus:dim=8',
    'DoRA': 'DoRA:rank=8',
    'IA3': 'IA3',
    'VeRA': 'VeRA:rank=64',
    'AdaLoRA': 'AdaLoRA:rank=8'
}
costs = dict(image_size=(112, 112), batch_size=10, repeats=3)
tasks = dict(
    _delete_=True,
    few_shot=dict(
        config='benchmarks/real/configs/few_shot_deit-tiny.py',
        metric='accuracy/top1',
        # Frozen chooses the rate of the head; lrs is for the backbone.
        tuning=dict(lrs=(5e-5, 5e-4, 5e-3, 5e-2), head_lrs=(3e-3, 1e-2, 3e-2)),
        tune=dict(val_dataloader=dict(dataset=dict(ann_file='tune.txt'))),
        # Runs of seconds: one that is killed starts again.
        checkpoint_interval=30,
        # Its last map takes the place of the class token.
        method_options=dict(
            HST=dict(
                model=dict(
                    neck=dict(type='mmpretrain.GlobalAveragePooling'),
                    head=dict(type='mmpretrain.LinearClsHead',
                              in_channels=72))))))
