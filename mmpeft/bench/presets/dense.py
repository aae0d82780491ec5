# The dense half of the survey's benchmark: COCO, ADE20K and Pascal VOC with
# Swin-B and Swin-L, in the recipes and widths of configs/ (64 at Swin-B). For
# GPUs: of the schedules, these are days per cell on one of them.
# Rates are chosen on held-out training images, in a short run; the validation
# images only report. Paths are those of the stock configs.
title = 'Dense prediction: COCO, ADE20K, Pascal VOC'

seeds = (0, 1, 2)
# Of tools/benchmark.py, the same for all tasks.
costs = dict(image_size=(512, 512), batch_size=2)
_lrs = (3e-5, 1e-4, 3e-4, 1e-3)
methods = {
    'Full': 'Full',
    'Frozen': 'Frozen',
    'Partial-1': 'Partial:num_blocks=1',
    'BitFit': 'BitFit:rel_pos_tables=True',
    'LNTune': 'LNTune',
    'Adapter': 'Adapter:dim=64,placement=houlsby',
    'AdaptFormer': 'AdaptFormer:dim=64,scale=0.1',
    'LoRA': 'LoRA:rank=64,targets=[q,v]',
    'LoRand': 'LoRand:num_branches=2',
    'E3VA': 'E3VA:num_branches=2',
    'VPTDeep': 'VPTDeep:num_tokens=50',
    'SSF': 'SSF',
    'RepAdapter': 'RepAdapter:dim=8',
    'FacTTK': 'FacTTK:rank=32',
    'Hydra': 'Hydra:rank=2',
    'LST': 'LST:reduction=8',
    'DTL': 'DTL:rank=4',
    'Mona': 'Mona:dim=64'
}
tasks = dict(
    coco=dict(
        config='mmpeft::_base_/mask-rcnn_swin-b_coco.py',
        metric='coco/segm_mAP',
        metric_scale=100.,
        holdout=20,
        tuning=dict(lrs=_lrs, budget=dict(epochs=1))),
    ade20k=dict(
        config='mmpeft::_base_/upernet_swin-l_ade20k.py',
        metric='mIoU',
        holdout=20,
        tuning=dict(lrs=_lrs, budget=dict(iters=16000))),
    voc=dict(
        config='mmpeft::_base_/retinanet_swin-l_voc0712.py',
        metric='pascal_voc/mAP',
        metric_scale=100.,
        # VOC brings a split of its own for that.
        tune=dict(
            train_dataloader=dict(
                dataset=dict(
                    dataset=dict(
                        datasets={
                            key:
                            dict(ann_file=f'VOC{year}/ImageSets/'
                                 'Main/train.txt')
                            for key, year in (('0', 2007), ('1', 2012))
                        }))),
            val_dataloader=dict(
                dataset=dict(ann_file='VOC2007/ImageSets/Main/val.txt'))),
        tuning=dict(lrs=_lrs, budget=dict(epochs=1))))
