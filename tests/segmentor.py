"""A tiny stock segmentor and its run; also a script, for several ranks.

No dropout and no drop-path, and samples drawn by index: what one process
computes on a batch of four, two ranks compute on two each. As a script it
imports mmpeft only if a method is asked for.
"""
import itertools
import json
import sys
import tempfile

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import Dataset

NUMBERS = itertools.count()
BACKBONE = dict(
    type='mmseg.SwinTransformer',
    embed_dims=16,
    depths=(2, 2),
    num_heads=(2, 4),
    strides=(4, 2),
    out_indices=(0, 1),
    drop_path_rate=0.)


@DATASETS.register_module(force=True)
class TinyScenes(Dataset):
    """Noise with a label that is a function of it."""
    METAINFO = dict(classes=('a', 'b', 'c'), palette=[[0] * 3] * 3)
    metainfo = METAINFO

    def __len__(self):
        return 16

    def __getitem__(self, index):
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 36, 44, generator=generator)
        sample = SegDataSample(
            gt_sem_seg=PixelData(data=image.argmax(0, keepdim=True)),
            metainfo=dict(img_shape=(36, 44), ori_shape=(36, 44)))
        return dict(inputs=image * 40 + 120, data_samples=sample)


def config(method=None, work_dir=None, iters=4, batch_size=4, **backbone):
    """Config of a run; without a method it is stock."""
    backbone = dict(BACKBONE, **backbone)
    if method is not None:
        backbone.update(
            type='mmpeft.PEFTBackbone', stock=backbone['type'], method=method)
    return Config(
        dict(
            default_scope='mmseg',
            work_dir=work_dir or tempfile.mkdtemp(),
            model=dict(
                type='EncoderDecoder',
                data_preprocessor=dict(
                    type='SegDataPreProcessor',
                    mean=[120.] * 3,
                    std=[60.] * 3,
                    size=(36, 44)),
                backbone=backbone,
                decode_head=dict(
                    type='FCNHead',
                    in_channels=[16, 32],
                    in_index=[0, 1],
                    input_transform='resize_concat',
                    channels=8,
                    num_convs=1,
                    dropout_ratio=0,
                    num_classes=3,
                    norm_cfg=None,
                    align_corners=False,
                    loss_decode=dict(type='CrossEntropyLoss')),
                train_cfg=dict(),
                test_cfg=dict(mode='whole')),
            train_dataloader=dict(
                batch_size=batch_size,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(type='TinyScenes')),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=.05)),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(
                    type='CheckpointHook', interval=iters, by_epoch=False)),
            randomness=dict(seed=0),
            # Two runs of one second would share a visualizer.
            experiment_name=f'tiny{next(NUMBERS)}',
            log_level='WARNING'))


def write_base(path):
    """Weights of the backbone without its output norms, as from ImageNet."""
    import mmseg.models  # noqa: F401
    from mmengine.registry import MODELS
    torch.manual_seed(7)
    state = {
        k: v + .02 * torch.randn(v.shape) if v.is_floating_point() else v
        for k, v in MODELS.build(BACKBONE).state_dict().items()
        if not k.startswith(('norm0', 'norm1'))
    }
    torch.save(dict(state_dict=state), path)
    return path


def train(cfg, before=None):
    """Run; the runner and the loss of each iteration."""
    runner = Runner.from_cfg(cfg)
    if before is not None:
        before(runner)
    losses = []
    step = runner.model.train_step

    def train_step(*args, **kwargs):
        logs = step(*args, **kwargs)
        losses.append(logs['loss'].item())
        return logs

    runner.model.train_step = train_step
    runner.train()
    return runner, losses


def main():
    method, base, out, launcher = (sys.argv[1:5] + ['none'])[:4]
    options = {}
    if method != 'stock':
        options = dict(method=method)
    if base != 'none':
        options['init_cfg'] = dict(type='Pretrained', checkpoint=base)
    cfg = config(**options)
    if launcher != 'none':
        torch.distributed.init_process_group('gloo')
        cfg.launcher = launcher
        cfg.train_dataloader.batch_size = 2
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', device_ids=None)
    runner, losses = train(cfg)
    if runner.rank == 0:
        model = getattr(runner.model, 'module', runner.model)
        torch.save(model.state_dict(), out)
        with open(out + '.json', 'w') as file:
            json.dump(
                dict(losses=losses, mmpeft='mmpeft' in sys.modules), file)
    from mmpeft.cli import leave_ranks
    leave_ranks()


if __name__ == '__main__':
    main()
