"""Processes that are killed, and disks that are full.

MMPEFT_KILLS says how many processes the tests marked slow kill.
"""
import glob
import multiprocessing
import os
import random
import shutil
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip('mmseg')

import fault_runs  # noqa: E402
import segmentor  # noqa: E402
from mmengine.registry import DATASETS  # noqa: E402

from mmpeft.delta_file import read_delta  # noqa: E402
from mmpeft.engine.checkpoint import read_checkpoint  # noqa: E402
from mmpeft.engine.safe_loading import latest_checkpoint  # noqa: E402

KILLS = int(os.environ.get('MMPEFT_KILLS', 40))
# Dead processes leave nothing half-done in this one, as forks would.
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['fault_runs'])


def start(function, *args, **kwargs):
    process = SERVER.Process(target=function, args=args, kwargs=kwargs)
    # Its server, which the first one starts, imports by this.
    path = os.pathsep.join(filter(None, sys.path))
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'):
        process.start()
    return process


def finish(function, *args, **kwargs):
    """The exit status, as a shell has it."""
    process = start(function, *args, **kwargs)
    process.join(300)
    return process.exitcode


def tensors(value, at=''):
    """Every tensor in a checkpoint, by its place."""
    if isinstance(value, torch.Tensor):
        return {at: value}
    items = value.items() if isinstance(
        value, dict) else enumerate(value) if isinstance(value,
                                                         (list, tuple)) else ()
    return {
        name: tensor
        for key, item in items
        for name, tensor in tensors(item, f'{at}/{key}').items()
    }


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) for k, v in a.items())


def state(path):
    """What training goes on from, and the numbers that it draws next."""
    checkpoint = read_checkpoint(path)
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'peft_randomness')
    return tensors({k: checkpoint[k] for k in parts})


class Runs:
    """A run that nobody disturbed, and its files."""

    def __init__(self, folder, keep):
        self.folder = folder
        base = segmentor.write_base(str(folder / 'base.pth'))
        self.config = fault_runs.write_config(str(folder), base, keep)
        self.whole = str(folder / 'whole')
        assert finish(fault_runs.quiet) == 0  # the server has imported all
        started = time.monotonic()
        assert finish(fault_runs.train, self.config, self.whole) == 0
        self.seconds = time.monotonic() - started
        self.files = sorted(glob.glob(f'{self.whole}/*_*.*'))
        self.last = state(f'{self.whole}/iter_{fault_runs.ITERS}.pth')
        # All that is written in the course of it.
        size = sum(
            os.path.getsize(f'{self.whole}/iter_{fault_runs.ITERS}{end}')
            for end in ('.pth', '_delta.safetensors'))
        self.bytes = fault_runs.ITERS * size

    def check(self, work):
        """Whatever has the name of a checkpoint is one, all of it."""
        found = [
            p for p in glob.glob(f'{work}/*')
            if p.endswith(('.pth', '.safetensors'))
        ]
        for path in found:
            if path.endswith('.pth'):
                read_checkpoint(path)
            else:
                read_delta(path)
        return [p for p in found if p.endswith('.pth')]

    def finished(self, work):
        """Equal to the run that nobody disturbed, bit for bit."""
        last = f'{work}/iter_{fault_runs.ITERS}'
        assert equal(self.last, state(f'{last}.pth'))
        assert equal(
            read_delta(f'{last}_delta.safetensors')[0],
            read_delta(f'{self.whole}/iter_{fault_runs.ITERS}'
                       '_delta.safetensors')[0])
        # And nothing of the dead is left.
        assert sorted(
            os.path.basename(p) for p in glob.glob(f'{work}/iter_*')) == [
                f'iter_{i}{end}'
                for i in (fault_runs.ITERS - 1, fault_runs.ITERS)
                for end in ('.pth', '_delta.safetensors')
            ]


def newest(files):
    return max((int(p.split('iter_')[-1][:-4]) for p in files), default=0)


@pytest.fixture(
    scope='module',
    params=['both', pytest.param('delta', marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp('runs'), request.param)


@pytest.fixture(scope='module')
def merging(tmp_path_factory):
    """Config, checkpoint, and what a merge makes of it."""
    folder = tmp_path_factory.mktemp('merging')
    base = segmentor.write_base(str(folder / 'base.pth'))
    config = fault_runs.write_config(str(folder), base, method='LoRA:rank=4')
    assert finish(fault_runs.train, config, f'{folder}/run') == 0
    source = f'{folder}/run/iter_{fault_runs.ITERS}.pth'
    assert finish(fault_runs.merge, config, source, f'{folder}/merged') == 0
    return config, source, f'{folder}/merged'


def kill_and_resume(runs, work, kills, seed, writing):
    """Kill a run again and again, and let it go on; the number of kills.

    Args:
        writing (bool): At a byte of what it writes, most of which are in the
            middle of a file; otherwise after some time.
    """
    rng, done = random.Random(seed), 0
    for _ in range(kills):
        before = newest(runs.check(work))
        if writing:
            # Far enough to get on, near enough to be killed.
            byte = rng.randrange(runs.bytes // 3)
            process = start(fault_runs.train, runs.config, work, byte=byte)
        else:
            process = start(fault_runs.train, runs.config, work)
            process.join(rng.uniform(0, runs.seconds))
            process.kill()
        process.join(300)
        assert process.exitcode in (0, -9)
        # It has what it had, or more.
        assert newest(runs.check(work)) >= before
        if process.exitcode == 0:
            runs.finished(work)
            shutil.rmtree(work)
        else:
            done += 1
    assert finish(fault_runs.train, runs.config, work) == 0
    runs.finished(work)
    return done


@pytest.mark.parametrize('writing', [True, False])
def test_killed_while_it_trains(runs, tmp_path, writing):
    kill_and_resume(runs, str(tmp_path / 'work'), 2, 0, writing)


@pytest.mark.slow
@pytest.mark.parametrize('writing', [True, False])
def test_killed_many_times(runs, tmp_path, writing):
    kills = max(KILLS // 4, 1)
    done = kill_and_resume(runs, str(tmp_path / 'work'), kills, 1, writing)
    print(f'{done} kills survived')
    assert done > kills // 4


def test_killed_while_it_merges(merging, tmp_path):
    """What was there stays there, until all of the new one is."""
    config, source, merged = merging
    out, rng = str(tmp_path / 'out.pth'), random.Random(0)
    for old in (None, b'something older'):
        if old:
            open(out, 'wb').write(old)
        byte = rng.randrange(os.path.getsize(merged))
        for act, code in ((fault_runs.die, -9), (fault_runs.full, 2)):
            assert finish(
                fault_runs.merge, config, source, out, byte=byte,
                act=act) == code
            assert os.path.exists(out) == bool(old)
            assert not old or open(out, 'rb').read() == old
    assert finish(fault_runs.merge, config, source, out) == 0
    assert equal(tensors(torch.load(out)), tensors(torch.load(merged)))


@pytest.mark.slow
def test_killed_while_it_merges_many_times(merging, tmp_path):
    config, source, merged = merging
    out, rng = str(tmp_path / 'out.pth'), random.Random(1)
    for _ in range(max(KILLS // 4, 1)):
        byte = rng.randrange(os.path.getsize(merged))
        assert finish(fault_runs.merge, config, source, out, byte=byte) == -9
        assert not os.path.exists(out)


def test_the_disk_is_full(runs, tmp_path):
    """Said in a sentence, exit status 2; later it goes on."""
    work, rng = str(tmp_path / 'work'), random.Random(0)
    byte = rng.randrange(runs.bytes // 4, runs.bytes // 2)
    assert finish(
        fault_runs.train, runs.config, work, byte=byte,
        act=fault_runs.full) == 2
    had = runs.check(work)
    assert had and not glob.glob(f'{work}/*.tmp')
    # By a limit of the system, which is below the size of a file.
    size = os.path.getsize(f'{runs.whole}/iter_{fault_runs.ITERS}.pth')
    assert finish(fault_runs.train, runs.config, work, limit=size // 2) == 2
    assert runs.check(work) == had and not glob.glob(f'{work}/*.tmp')
    assert finish(fault_runs.train, runs.config, work) == 0
    runs.finished(work)


@DATASETS.register_module(force=True)
class NoisyScenes(segmentor.TinyScenes):
    """Random augmentation, in the process of a worker."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        noise = torch.randn(3, 36, 44) + random.random() + np.random.rand()
        return dict(sample, inputs=sample['inputs'] + noise)


@pytest.mark.slow
def test_workers_draw_the_same_in_every_epoch(tmp_path):
    """If they do not persist; so a run goes on as if it had not stopped."""
    base = segmentor.write_base(str(tmp_path / 'base.pth'))

    def config(work, epochs):
        cfg = segmentor.config(
            'Mona:dim=4',
            str(tmp_path / work),
            init_cfg=dict(type='Pretrained', checkpoint=base))
        cfg.train_dataloader.update(
            num_workers=1,
            batch_size=8,
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=dict(type='NoisyScenes'))
        cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs)
        cfg.default_hooks.checkpoint.update(interval=1, by_epoch=True)
        cfg.default_hooks.peft_checkpoint = dict(
            type='mmpeft.PEFTCheckpointHook')
        return cfg

    _, losses = segmentor.train(config('whole', 2))
    segmentor.train(config('half', 1))
    torch.manual_seed(5)
    rest = config('half', 2)
    rest.resume, rest.load_from = True, str(tmp_path / 'half/epoch_1.pth')
    assert segmentor.train(rest)[1] == losses[2:]


def test_from_where_it_goes_on(tmp_path):
    """Whatever became of the last file, and of the one that names it."""
    note = tmp_path / 'last_checkpoint'
    assert latest_checkpoint(str(tmp_path)) is None
    for i in (1, 2, 3):
        torch.save(dict(state_dict=dict(a=torch.zeros(99))), tmp_path / 'x')
        os.utime(tmp_path / 'x', (i, i))
        os.rename(tmp_path / 'x', tmp_path / f'iter_{i}.pth')
    torch.save({}, tmp_path / 'best_mIoU_iter_3.pth')

    def found():
        return os.path.basename(latest_checkpoint(str(tmp_path)))

    assert latest_checkpoint(str(tmp_path)) is None
    torch.save({}, tmp_path / 'base.pth')
    for text in ('', 'x', str(tmp_path / 'gone.pth'), '\n'):
        note.write_text(text)
        assert found() == 'iter_3.pth'
    note.write_text(str(tmp_path / 'iter_2.pth'))
    assert found() == 'iter_2.pth'
    os.truncate(tmp_path / 'iter_2.pth', 500)
    assert found() == 'iter_3.pth'
    os.truncate(tmp_path / 'iter_3.pth', 500)
    assert found() == 'iter_1.pth'


def test_the_best_is_kept_until_the_next_is_whole(tmp_path):
    """Stock deletes it first; so a run that dies has no best one."""
    base = segmentor.write_base(str(tmp_path / 'base.pth'))
    cfg = segmentor.config(
        'Mona:dim=4',
        str(tmp_path),
        init_cfg=dict(type='Pretrained', checkpoint=base))
    loader = cfg.train_dataloader.to_dict()
    cfg.val_dataloader, cfg.val_cfg = dict(loader, batch_size=1), dict()
    cfg.val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    cfg.train_cfg.val_interval = 1
    cfg.default_hooks.checkpoint.update(
        interval=1, save_best='mIoU', rule='less', max_keep_ckpts=1)
    cfg.default_hooks.peft_checkpoint = dict(type='mmpeft.PEFTCheckpointHook')
    seen = []

    def look(runner):
        save = runner.save_checkpoint

        def spy(out_dir, filename, *args, **kwargs):
            seen.append(len(glob.glob(f'{tmp_path}/best_*.pth')))
            return save(out_dir, filename, *args, **kwargs)

        runner.save_checkpoint = spy
        evaluate = runner.val_evaluator.evaluate

        def better(size):
            return dict(evaluate(size), mIoU=1 / runner.iter)

        runner.val_evaluator.evaluate = better

    segmentor.train(cfg, before=look)
    first = seen.index(1)
    assert all(seen[first:])
    assert len(glob.glob(f'{tmp_path}/best_*')) == 2
