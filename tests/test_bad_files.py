"""Bad deltas and checkpoints: refused with the cause, and nothing changed.

MMPEFT_FUZZ_FILES says how many files of each kind are made, 10 by default.
"""
import hashlib
import os
import random
import re
import runpy
import shutil
import sys
from argparse import Namespace

import pytest
import torch

pytest.importorskip('mmseg')

import payloads  # noqa: E402
import segmentor  # noqa: E402
from bad_files import CHECKPOINTS, DELTAS, FILES, MISFITS  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.runner import CheckpointLoader, Runner  # noqa: E402

import mmpeft  # noqa: E402
from mmpeft.delta_file import read_delta, read_header, write_delta  # noqa
from mmpeft.engine.checkpoint import read_checkpoint  # noqa: E402
from mmpeft.engine.delta_loading import complete, expect_model  # noqa: E402
from mmpeft.engine.safe_loading import guard_loading  # noqa: E402
from mmpeft.errors import PEFTError  # noqa: E402
from mmpeft.preflight import check_files  # noqa: E402

COUNT = int(os.environ.get('MMPEFT_FUZZ_FILES', 10))
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Trained:
    """A finished run, its files, and models to load them into.

    Attributes:
        folder (Path): Config, base, checkpoint and delta.
        peft (Module): With methods attached, and its base.
        stock (Module): The same without.
    """

    def __init__(self, folder):
        self.folder = folder
        self.base = segmentor.write_base(str(folder / 'base.pth'))
        cfg = segmentor.config(
            'LoRA:rank=4',
            str(folder),
            iters=1,
            init_cfg=dict(type='Pretrained', checkpoint=self.base))
        cfg.custom_imports = dict(imports=['mmpeft', 'segmentor'])
        cfg.default_hooks.peft_checkpoint = dict(
            type='mmpeft.PEFTCheckpointHook')
        loader = cfg.train_dataloader.to_dict()
        cfg.val_dataloader = cfg.test_dataloader = dict(loader, batch_size=1)
        cfg.val_cfg, cfg.test_cfg = dict(), dict()
        cfg.val_evaluator = cfg.test_evaluator = dict(
            type='IoUMetric', iou_metrics=['mIoU'])
        self.cfg, self.config = cfg, str(folder / 'config.py')
        cfg.dump(self.config)
        segmentor.train(cfg)
        shutil.rmtree(next(p for p in folder.iterdir() if p.is_dir()))
        self.full = str(folder / 'iter_1.pth')
        self.delta = str(folder / 'iter_1_delta.safetensors')
        self.peft = MODELS.build(cfg.model)
        self.peft.init_weights()
        plain = cfg.model.backbone.to_dict()
        plain.update(type=plain.pop('stock'))
        plain.pop('method')
        self.stock = MODELS.build(dict(cfg.model.to_dict(), backbone=plain))
        self.stock.init_weights()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp('run'))


@pytest.fixture(autouse=True)
def unguarded(monkeypatch):
    """What the tools register, they register for their process."""
    monkeypatch.setattr(CheckpointLoader, '_schemes',
                        dict(CheckpointLoader._schemes))
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


def on_disk(folder):
    """Every file below a folder, and what is in it."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob('*')) if p.is_file()
    }


def refuses(said, function, *args):
    """It says in one sentence what is wrong."""
    with pytest.raises(PEFTError) as error:
        function(*args)
    text = str(error.value)
    assert re.search(said, text), text
    assert '\n' not in text
    return text


def through_mmengine(model, path):
    """As a Runner does it, which has the model."""
    expect_model(True)
    try:
        complete(model, CheckpointLoader.load_checkpoint(path, 'cpu'))
    finally:
        expect_model(False)


@pytest.mark.parametrize('name', [*FILES, *DELTAS])
def test_bad_deltas(trained, tmp_path, name):
    """By everything that reads deltas."""
    said, make = {**FILES, **DELTAS}[name]
    marker = tmp_path / 'ran'
    before = state(trained.peft), state(trained.stock)
    for seed in range(COUNT):
        path = str(tmp_path / f'{seed}_delta.safetensors')
        make(path, trained.delta, random.Random(f'{name} {seed}'), str(marker))
        there = on_disk(tmp_path), on_disk(trained.folder)
        refuses(said, mmpeft.load_delta, trained.peft, path)
        refuses(said, mmpeft.attach, trained.stock, path, 'task')
        refuses(said, through_mmengine, trained.peft, path)
        if name in FILES:
            refuses(said, read_checkpoint, path)
        assert there == (on_disk(tmp_path), on_disk(trained.folder))
        assert not marker.exists()
        assert mmpeft.list_tasks(trained.stock) == []
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    assert equal(before[0], trained.peft.state_dict())
    assert equal(before[1], trained.stock.state_dict())


def test_one_bit_of_the_base(trained):
    """Of any weight, wherever it is; then the delta belongs elsewhere."""
    for seed in range(COUNT):
        rng = random.Random(seed)
        for model, load in ((trained.peft, mmpeft.load_delta),
                            (trained.stock,
                             lambda m, p: mmpeft.attach(m, p, 'task'))):
            names = read_header(trained.delta).base['names']
            weight = model.get_parameter(rng.choice(names)).data.view(
                torch.int32).flatten()
            at, bit = rng.randrange(len(weight)), 1 << rng.randrange(31)
            weight[at] ^= bit
            before = state(model)
            refuses('another base', load, model, trained.delta)
            assert equal(before, model.state_dict())
            weight[at] ^= bit
    mmpeft.load_delta(trained.peft, trained.delta)


def test_sources_with_a_payload(trained, tmp_path):
    """A delta names files; what those hold is looked at first."""
    marker, path = tmp_path / 'ran', str(tmp_path / 'x_delta.safetensors')
    tensors, header = read_delta(trained.delta)
    bare = MODELS.build(trained.cfg.model)
    before = state(bare)
    for seed in range(COUNT):
        base = str(tmp_path / f'{seed}.pth')
        CHECKPOINTS['payload_anywhere'][1](base, trained.full,
                                           random.Random(seed), str(marker))
        header.base['sources'] = [
            dict(checkpoint=base, at=('', 'backbone')[seed % 2], prefix='')
        ]
        write_delta(path, tensors, header)
        refuses('refers to', CheckpointLoader.load_checkpoint, path, 'cpu')
        refuses('refers to', through_mmengine, bare, path)
        assert not marker.exists() and equal(before, bare.state_dict())


def test_no_code_comes_from_a_header(trained, tmp_path):
    """mmengine executes the texts of configs that it finds in files."""
    path = str(tmp_path / 'x_delta.safetensors')
    tensors, header = read_delta(trained.delta)
    header.meta.update(cfg='raise SystemExit', config='raise SystemExit')
    write_delta(path, tensors, header)
    meta = CheckpointLoader.load_checkpoint(path, 'cpu')['meta']
    assert 'cfg' not in meta and 'config' not in meta
    checkpoint = torch.load(trained.full, weights_only=False)
    checkpoint['meta']['config'] = 'raise SystemExit'
    torch.save(checkpoint, tmp_path / 'x.pth')
    guard_loading()
    meta = CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))['meta']
    assert 'cfg' in meta and 'config' not in meta


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_bad_checkpoints(trained, tmp_path, name):
    said, make = CHECKPOINTS[name]
    marker = tmp_path / 'ran'
    guard_loading()
    for seed in range(COUNT):
        path = str(tmp_path / f'{seed}.pth')
        make(path, trained.full, random.Random(f'{name} {seed}'), str(marker))
        there = on_disk(tmp_path)
        refuses(said, read_checkpoint, path)
        if name.startswith(('payload', 'truncated', 'no_zip')):
            refuses(said, CheckpointLoader.load_checkpoint, path)
            refuses(said, check_files, dict(load_from=path))
            refuses(
                said, check_files,
                dict(
                    model=dict(
                        init_cfg=dict(type='Pretrained', checkpoint=path))))
        assert there == on_disk(tmp_path)


def test_downloads_are_checked_before_they_are_opened(tmp_path, monkeypatch):
    marker = tmp_path / 'ran'
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(
        torch.hub, 'download_url_to_file', lambda url, file, *args, **kwargs:
        torch.save([payloads.touch(marker)], file))
    guard_loading()
    url = 'https://example.invalid/weights.pth'
    for _ in range(2):  # then it is in the cache
        refuses('refers to', CheckpointLoader.load_checkpoint, url)
        refuses('refers to', check_files, dict(load_from=url))
        refuses('refers to', read_checkpoint, url)
    assert not marker.exists()


@pytest.mark.parametrize('name', MISFITS)
def test_checkpoints_of_another_model(trained, tmp_path, name):
    """Stock would warn, and train or test what it happens to have."""
    said, make = MISFITS[name]
    runners = []
    for key in ('train', 'test'):
        cfg = trained.cfg.copy()
        cfg.work_dir, cfg.experiment_name = str(tmp_path / key), name + key
        if key == 'test':
            cfg.train_cfg = cfg.train_dataloader = cfg.optim_wrapper = None
            cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        runners.append(Runner.from_cfg(cfg))
        runners[-1].call_hook('before_run')
    before = [state(r.model) for r in runners]
    for seed in range(COUNT):
        path = str(tmp_path / f'{seed}.pth')
        make(path, trained.full, random.Random(f'{name} {seed}'), '')
        args = Namespace(
            config=trained.config,
            checkpoint=path,
            out=str(tmp_path / 'out.safetensors'),
            method=None,
            at=None,
            base=None,
            force=False,
            cfg_options=[])
        if seed < 2:
            from mmpeft.engine.extract import extract_delta
            from mmpeft.engine.merge import merge_checkpoint
            refuses(said, extract_delta, args)
            refuses(said, merge_checkpoint, args)
            assert not os.path.exists(args.out)
        runners[0]._resume = True
        for runner, old in zip(runners, before):
            refuses(said, runner.load_checkpoint, path)
            assert equal(old, runner.model.state_dict())


TOOLS = [
    ('test.py', '{config}', '{bad}'),
    ('test.py', '{config}', '{delta}', '--base', '{bad}'),
    ('train.py', '{config}', '--resume', '{bad}'),
    ('train.py', '{config}', '--resume'),
    ('train.py', '{config}', '--cfg-options', 'load_from={bad}'),
    ('train.py', '{config}', '--cfg-options',
     'model.backbone.init_cfg.checkpoint={bad}'),
    ('merge_peft.py', '{config}', '{bad}', '{out}.pth'),
    ('merge_peft.py', '{config}', '{delta}', '{out}.pth', '--base', '{bad}'),
    ('extract_peft.py', '{config}', '{bad}', '{out}.safetensors'),
    ('convert_checkpoint.py', '{bad}', '{out}.pth', '--to', 'mm-swin'),
    ('inspect_peft.py', '{bad}'),
]


@pytest.mark.parametrize('command', TOOLS, ids=lambda c: ' '.join(c)[:60])
def test_tools_exit_with_a_sentence(trained, tmp_path, monkeypatch, capfd,
                                    command):
    """The payload is everywhere at once, and runs nowhere."""
    marker, work = tmp_path / 'ran', tmp_path / 'work'
    work.mkdir()
    bad = str(work / 'iter_9.pth')
    torch.save(
        {k: payloads.touch(marker)
         for k in ('state_dict', 'meta', 'x')}, bad)
    (work / 'last_checkpoint').write_text(bad)
    words = [
        word.format(
            config=trained.config,
            bad=bad,
            out=tmp_path / 'out',
            delta=trained.delta) for word in command
    ]
    if command[0] in ('train.py', 'test.py'):
        words += ['--work-dir', str(work)]
    if command[-1] == '--resume':
        # Nothing to resume from, and nothing to begin with.
        words += ['--cfg-options', 'model.backbone.init_cfg.checkpoint=' + bad]
    monkeypatch.setattr(sys, 'argv', words)
    there = on_disk(trained.folder), on_disk(tmp_path)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(
            os.path.join(ROOT, 'tools', command[0]), run_name='__main__')
    assert exit.value.code == 2
    said = [
        line for line in capfd.readouterr().err.splitlines()
        if line.startswith('Error: ')
    ]
    assert len(said) == 1 and bad in said[0]
    assert 'refers to' in said[0] or 'is a pickle' in said[0]
    assert not marker.exists()
    assert there == (on_disk(trained.folder), on_disk(tmp_path))


@pytest.mark.slow
def test_many_more(trained, tmp_path, monkeypatch):
    """All kinds again, ten times as many files."""
    monkeypatch.setattr(sys.modules[__name__], 'COUNT', 10 * COUNT)
    for i, name in enumerate([*FILES, *DELTAS]):
        (tmp_path / f'd{i}').mkdir()
        test_bad_deltas(trained, tmp_path / f'd{i}', name)
    for i, name in enumerate(CHECKPOINTS):
        (tmp_path / f'c{i}').mkdir()
        test_bad_checkpoints(trained, tmp_path / f'c{i}', name)
    kinds = len(FILES) + len(DELTAS) + len(CHECKPOINTS)
    print(f'{kinds} kinds, {kinds * COUNT} files')
