# Does it transfer? Any folder in the layout of COCO, mmseg or VTAB, such as
# medical or satellite images: tools/bench.py specialised --data-root DIR.
# What the folder is, its classes and their number are read from it
# (docs/en/bench.md says which layouts); a tenth of the training images
# chooses the rates.
title = 'Specialised data'

seeds = (0, 1, 2)
costs = dict(image_size=(512, 512), batch_size=2)
methods = {
    'Full': 'Full',
    'Frozen': 'Frozen',
    'BitFit': 'BitFit',
    'AdaptFormer': 'AdaptFormer:dim=64,scale=0.1',
    'LoRA': 'LoRA:rank=64,targets=[q,v]',
    'VPTDeep': 'VPTDeep:num_tokens=50',
    'SSF': 'SSF',
    'DTL': 'DTL:rank=4',
    'Mona': 'Mona:dim=64'
}
_lrs = (3e-5, 1e-4, 3e-4, 1e-3)
tasks = dict(
    data=dict(
        folder=dict(
            root='{{$MMPEFT_DATA_ROOT:data/specialised}}',
            kinds=dict(
                coco=dict(
                    config='mmpeft::_base_/mask-rcnn_swin-b_coco.py',
                    metric='coco/segm_mAP',
                    metric_scale=100.,
                    holdout=10,
                    tuning=dict(lrs=_lrs, budget=dict(epochs=3))),
                mmseg=dict(
                    config='mmpeft::_base_/upernet_swin-b_cityscapes.py',
                    metric='mIoU',
                    holdout=10,
                    budget=dict(iters=20000),
                    tuning=dict(lrs=_lrs, budget=dict(iters=4000))),
                lists=dict(
                    config='mmpeft::_base_/vit-b_vtab.py',
                    metric='accuracy/top1',
                    tune=dict(
                        train_dataloader=dict(
                            dataset=dict(ann_file='train800.txt')),
                        val_dataloader=dict(
                            dataset=dict(ann_file='val200.txt'))),
                    tuning=dict(lrs=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2)))))))
