"""A plan on the tiny segmentor, for the tests of the benchmark."""
import os
import pprint
from pathlib import Path

import segmentor

TESTS = Path(__file__).parent
ENV = dict(
    os.environ,
    OMP_NUM_THREADS='1',
    # Cells are processes: they import the data set by name.
    PYTHONPATH=os.pathsep.join(
        filter(None, [str(TESTS), os.environ.get('PYTHONPATH')])))


def write_python(path, **values):
    """A config file."""
    path.write_text(''.join(f'{key} = {pprint.pformat(value)}\n'
                            for key, value in values.items()))
    return str(path)


def write_config(folder, **backbone):
    """The tiny segmentor with a base of its own, validated on its data."""
    base = segmentor.write_base(str(folder / 'base.pth'))
    cfg = segmentor.config(
        init_cfg=dict(type='Pretrained', checkpoint=base),
        **backbone).to_dict()
    loader = dict(cfg['train_dataloader'], batch_size=4)
    cfg.update(
        custom_imports=dict(imports=['segmentor']),
        work_dir=None,
        val_dataloader=loader,
        val_cfg=dict(type='ValLoop'),
        val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        log_level='INFO')
    cfg['optim_wrapper']['optimizer'] = dict(type='AdamW', lr=1e-3)
    del cfg['experiment_name']
    return write_python(folder / 'tiny.py', **cfg)


def write_plan(folder, config=None, **values):
    """A plan file: two rates, two seeds, Mona beside the baselines."""
    task = dict(
        config=config or write_config(folder),
        metric='mIoU',
        tune=dict(train_dataloader=dict(batch_size=4)))
    plan = dict(
        name='tiny',
        tasks=dict(seg=dict(task, **values.pop('task', {}))),
        methods=dict(Mona='Mona:dim=4'),
        seeds=(0, 1),
        tuning=dict(lrs=(1e-3, 1e-2)),
        budget=dict(iters=6),
        checkpoint_interval=2)
    return write_python(folder / 'plan.py', **{**plan, **values})
