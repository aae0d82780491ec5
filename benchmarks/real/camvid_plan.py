# All methods on CamVid with DeiT-tiny, one seed and shorter runs than those of
# `run.py`, which has three seeds of seven methods (docs/en/bench_camvid.md).
# Its data:
#     python benchmarks/real/run.py --data-root DIR --cache data/real \
#         --tasks camvid-vit --prepare
# and the folder `deit_tiny` of DIR linked into `data`.
_base_ = ['./few_shot_plan.py']
name = 'camvid'
title = 'CamVid, DeiT-tiny with a SETR head'


def _split(name):
    return dict(
        dataset=dict(
            data_prefix=dict(
                img_path=f'images/{name}',
                seg_map_path=f'annotations/{name}')))


seeds = (0, )
costs = dict(image_size=(176, 240), batch_size=4, repeats=3)
tasks = dict(
    _delete_=True,
    camvid=dict(
        config='benchmarks/real/configs/setr_deit-tiny_camvid.py',
        metric='mIoU',
        # Frozen chooses the rate of the head; lrs is for the backbone.
        tuning=dict(
            lrs=(1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.56e-2),
            head_lrs=(9e-3, 2.7e-2, 8.1e-2),
            budget=dict(iters=60)),
        budget=dict(iters=120),
        checkpoint_interval=120,
        options=dict(
            model=dict(
                backbone=dict(
                    init_cfg=dict(
                        checkpoint='data/deit_tiny/'
                        'deit_tiny_patch16_224_in1k_mmpretrain.pth')))),
        tune=dict(val_dataloader=_split('val')),
        final=dict(val_dataloader=_split('test')),
        # Its last map, which all of it leads to.
        method_options=dict(
            HST=dict(model=dict(
                decode_head=dict(in_index=3, in_channels=72))))))
