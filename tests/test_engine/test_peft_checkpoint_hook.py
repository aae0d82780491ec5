"""Deltas beside checkpoints, in real runs of a tiny segmentor."""
import os
import os.path as osp

import pytest
import torch

pytest.importorskip('mmseg')

import segmentor  # noqa: E402
from mmengine.runner import CheckpointLoader, Runner  # noqa: E402

from mmpeft import load_delta, save_delta  # noqa: E402
from mmpeft.delta_file import read_delta  # noqa: E402
from mmpeft.delta_parts import delta_names  # noqa: E402
from mmpeft.engine.checkpoint import write_checkpoint  # noqa: E402
from mmpeft.errors import PEFTError  # noqa: E402


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """Weights of the backbone without its output norms, as from ImageNet."""
    return segmentor.write_base(
        str(tmp_path_factory.mktemp('base') / 'base.pth'))


def config(base, work_dir, method='Mona:dim=4', iters=4, hook=None, **kwargs):
    cfg = segmentor.config(
        method,
        str(work_dir),
        iters=iters,
        init_cfg=dict(type='Pretrained', checkpoint=base))
    cfg.default_hooks.peft_checkpoint = dict(
        type='mmpeft.PEFTCheckpointHook', **(hook or {}))
    cfg.default_hooks.checkpoint.update(interval=2, **kwargs)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    return cfg


def state_of(runner):
    return {k: v.clone() for k, v in runner.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) for k, v in a.items())


def files(work_dir):
    return sorted(
        f for f in os.listdir(work_dir)
        if f.endswith(('.pth', '.safetensors')))


def test_delta_beside_every_checkpoint(base, tmp_path):
    runner, _ = segmentor.train(config(base, tmp_path))
    assert files(tmp_path) == [
        'iter_2.pth', 'iter_2_delta.safetensors', 'iter_4.pth',
        'iter_4_delta.safetensors'
    ]
    tensors, header = read_delta(str(tmp_path / 'iter_4_delta.safetensors'))
    state = state_of(runner)
    assert all(torch.equal(state[k], v) for k, v in tensors.items())
    # What trains, and the norms that the base lacks.
    extra = {k for k in tensors if k.startswith('backbone.norm')}
    assert set(tensors) - extra == delta_names(runner.model)
    assert len(extra) == 4
    assert any('.peft.mona.' in k for k in tensors)
    assert any(k.startswith('decode_head') for k in tensors)
    assert header.meta['iter'] == 4
    assert header.meta['dataset_meta']['classes'] == ['a', 'b', 'c']
    assert header.backbones['backbone']['method'][0]['dim'] == 4
    assert header.base['sources'][0]['checkpoint'] == base


def test_mmengine_reads_it_with_its_base(base, tmp_path):
    """By name, without the model, as inferencers do."""
    runner, _ = segmentor.train(config(base, tmp_path))
    path = str(tmp_path / 'iter_4_delta.safetensors')
    read = CheckpointLoader.load_checkpoint(path, 'cpu')
    own = dict(runner.model.named_parameters())
    assert set(own) <= set(read['state_dict'])
    assert all(torch.equal(read['state_dict'][k], v) for k, v in own.items())
    assert read['meta']['dataset_meta']['classes'] == ['a', 'b', 'c']
    os.rename(base, base + '.away')
    try:
        with pytest.raises(PEFTError, match='came from .*base.pth'):
            CheckpointLoader.load_checkpoint(path, 'cpu')
    finally:
        os.rename(base + '.away', base)


@pytest.mark.parametrize('elsewhere', [False, True])
def test_start_from_a_delta(base, tmp_path, elsewhere):
    """A run that names it in load_from has the whole model."""
    runner, _ = segmentor.train(config(base, tmp_path / 'a'))
    path = str(tmp_path / 'a' / 'iter_4_delta.safetensors')
    hook = {}
    cfg = config(base, tmp_path / 'b', hook=hook)
    if elsewhere:
        # Nothing in the config says where the base is.
        cfg.model.backbone.pop('init_cfg')
        cfg.default_hooks.peft_checkpoint.base = str(tmp_path / 'full.pth')
        write_checkpoint(
            dict(
                state_dict={
                    f'backbone.{k}': v
                    for k, v in torch.load(base)['state_dict'].items()
                }), str(tmp_path / 'full.pth'))
    cfg.load_from = path
    seen = {}

    def look(new):
        step = new.model.train_step

        def first(*args, **kwargs):
            seen.setdefault('state', state_of(new))
            return step(*args, **kwargs)

        new.model.train_step = first

    segmentor.train(cfg, before=look)
    assert equal(seen['state'], state_of(runner))


@pytest.mark.parametrize('keep', ['both', 'delta'])
@pytest.mark.parametrize('ema', [False, True])
def test_resume_is_bit_equal(base, tmp_path, keep, ema):
    """With random crops of numbers, shuffled data, and averages."""

    def cfg(work_dir, iters=6):
        made = config(
            base,
            work_dir,
            method='Mona:dim=4,drop_rate=0.5',
            iters=iters,
            hook=dict(keep=keep))
        made.optim_wrapper.optimizer = dict(type='AdamW', lr=.01)
        if ema:
            made.custom_hooks = [dict(type='EMAHook', momentum=.3)]
        return made

    whole, losses = segmentor.train(cfg(tmp_path / 'whole'))
    segmentor.train(cfg(tmp_path / 'half', iters=4))
    torch.manual_seed(99)
    rest = cfg(tmp_path / 'half')
    rest.load_from = str(tmp_path / 'half' / 'iter_4.pth')
    rest.resume = True
    again, tail = segmentor.train(rest)
    assert tail == losses[4:]
    assert equal(state_of(whole), state_of(again))
    small = torch.load(tmp_path / 'whole' / 'iter_6.pth', weights_only=False)
    full = set(whole.model.state_dict())
    assert (set(small['state_dict']) == full) == (keep == 'both')
    # What is published is the average.
    deltas = [
        read_delta(str(tmp_path / name / 'iter_6_delta.safetensors'))[0]
        for name in ('whole', 'half')
    ]
    assert equal(*deltas)
    own = state_of(whole)
    mona = next(k for k in deltas[0] if 'mona' in k and k.endswith('.weight'))
    assert torch.equal(own[mona], deltas[0][mona]) == (not ema)


def test_one_checkpoint_is_never_none(base, tmp_path):
    """Stock would delete the only one before it writes the next."""
    left = []

    def look(runner):
        save = runner.save_checkpoint

        def spy(*args, **kwargs):
            left.append(files(tmp_path))
            return save(*args, **kwargs)

        runner.save_checkpoint = spy

    segmentor.train(
        config(base, tmp_path, iters=8, max_keep_ckpts=1), before=look)
    assert len(left) == 4 and all(len(f) >= 2 for f in left[1:])
    assert files(tmp_path) == [
        'iter_6.pth', 'iter_6_delta.safetensors', 'iter_8.pth',
        'iter_8_delta.safetensors'
    ]


def test_refusals(base, tmp_path):
    runner, _ = segmentor.train(config(base, tmp_path / 'a'))
    path = str(tmp_path / 'a' / 'iter_4_delta.safetensors')

    def attempt(**changes):
        cfg = config(base, tmp_path / 'b', **changes)
        cfg.load_from = path
        segmentor.train(cfg)

    with pytest.raises(PEFTError, match=r'holds Mona\(.*has LoRA\('):
        attempt(method='LoRA:rank=4')
    with pytest.raises(PEFTError, match=r'dim=4.*dim=8'):
        attempt(method='Mona:dim=8')
    resumed = config(base, tmp_path / 'b')
    resumed.load_from, resumed.resume = path, True
    with pytest.raises(PEFTError, match='no state of the optimizer'):
        segmentor.train(resumed)
    with pytest.raises(PEFTError, match="keep='all' is neither"):
        segmentor.train(config(base, tmp_path / 'c', hook=dict(keep='all')))


def test_load_delta_checks_before_it_writes(base, tmp_path):
    runner, _ = segmentor.train(config(base, tmp_path / 'a'))
    path = str(tmp_path / 'x_delta.safetensors')
    save_delta(runner.model, path)
    fresh = Runner.from_cfg(config(base, tmp_path / 'b')).model
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(PEFTError, match='trained on another base'):
        load_delta(fresh, path)
    assert equal(before, fresh.state_dict())
    fresh.init_weights()
    load_delta(fresh, path)
    assert equal(state_of(runner), fresh.state_dict())
    # One weight of the base, by one bit.
    weight = fresh.backbone.stages[0].blocks[0].attn.w_msa.qkv.weight
    with torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(PEFTError, match='trained on another base'):
        load_delta(fresh, path)
    assert osp.exists(path)
