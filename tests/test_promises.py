"""The promises of the design, on real runs of a tiny stock segmentor."""
import json
import os
import os.path as osp
import subprocess
import sys

import pytest
import torch
from mmengine.registry import MODELS

pytest.importorskip('mmseg')

import segmentor  # noqa: E402

from mmpeft.engine.checkpoint import write_checkpoint  # noqa: E402
from mmpeft.errors import PEFTError  # noqa: E402
from mmpeft.merging import merged_state_dict  # noqa: E402

HERE = osp.dirname(osp.abspath(__file__))


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """Weights of the backbone alone, as an ImageNet checkpoint has them: no
    output norms."""
    import mmseg.models  # noqa: F401
    torch.manual_seed(7)
    backbone = MODELS.build(segmentor.BACKBONE)
    state = {
        f'backbone.{k}':
        v + .02 * torch.randn(v.shape) if v.is_floating_point() else v
        for k, v in backbone.state_dict().items()
        if not k.startswith(('norm0', 'norm1'))
    }
    path = str(tmp_path_factory.mktemp('base') / 'base.pth')
    write_checkpoint(dict(state_dict=state), path)
    return path


def pretrained(path):
    return dict(init_cfg=dict(type='Pretrained', checkpoint=path))


def script(*args, ranks=1, port=29611):
    command = [sys.executable, osp.join(HERE, 'segmentor.py'), *args]
    if ranks > 1:
        command[1:1] = [
            '-m', 'torch.distributed.run', f'--nproc_per_node={ranks}',
            f'--master_port={port}'
        ]
        command.append('pytorch')
    env = dict(os.environ, PYTHONPATH=osp.dirname(HERE), OMP_NUM_THREADS='1')
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_full_is_the_stock_run(base, tmp_path):
    """Loss curve and weights, bit for bit, against a process that never
    imports mmpeft."""
    results = {}
    for method in ('stock', 'Full'):
        out = str(tmp_path / method)
        script(method, base, out)
        results[method] = torch.load(out), json.load(open(out + '.json'))
    stock, full = results['stock'], results['Full']
    assert stock[1]['mmpeft'] is False and full[1]['mmpeft'] is True
    assert stock[1]['losses'] == full[1]['losses']
    assert len(set(stock[1]['losses'])) == 4
    assert list(stock[0]) == list(full[0])
    assert all(torch.equal(full[0][k], v) for k, v in stock[0].items())


@pytest.mark.parametrize(
    'method',
    ['LoRA:rank=4', 'AdaptFormer:dim=4', 'DoRA:rank=4', 'FacTTT:rank=4'])
def test_identity_after_every_init(base, method):
    """What the Runner hands to the first iteration equals the frozen model
    with the loaded weights."""
    seen = {}

    class Probe(Exception):
        pass

    def before(runner):

        def first(data, optim_wrapper):
            runner.model.eval()
            torch.manual_seed(0)
            image = torch.randn(1, 3, 36, 44)
            seen['found'] = runner.model.backbone(image)
            stock = MODELS.build(dict(segmentor.BACKBONE))
            stock.eval()  # stock train() and eval() return None
            stock.load_state_dict({
                k: v
                for k, v in runner.model.backbone.state_dict().items()
                if '.peft.' not in f'.{k}'
            })
            seen['expected'] = stock(image)
            loaded = torch.load(base)['state_dict']
            seen['base'] = all(
                torch.equal(v, loaded[f'backbone.{k}'])
                for k, v in stock.state_dict().items()
                if f'backbone.{k}' in loaded)
            raise Probe

        runner.model.train_step = first

    cfg = segmentor.config(method, **pretrained(base))
    from mmengine.runner import Runner
    runner = Runner.from_cfg(cfg)
    before(runner)
    with pytest.raises(Probe):
        runner.train()
    assert seen['base']
    for found, expected in zip(seen['found'], seen['expected']):
        assert torch.equal(found, expected)


def test_random_base_is_refused():
    with pytest.raises(PEFTError, match='never loaded.*allow_random_base'):
        segmentor.train(segmentor.config('LoRA:rank=4'))


def test_wrong_base_is_refused(tmp_path):
    """Weights of another width are skipped by strict=False, silently."""
    other = MODELS.build(
        dict(segmentor.BACKBONE, embed_dims=8, num_heads=(1, 2)))
    path = str(tmp_path / 'other.pth')
    state = {f'backbone.{k}': v for k, v in other.state_dict().items()}
    write_checkpoint(dict(state_dict=state), path)
    with pytest.raises((PEFTError, RuntimeError)):
        segmentor.train(segmentor.config('Mona:dim=4', **pretrained(path)))


def test_random_base_where_meant(base):
    segmentor.train(
        segmentor.config('LoRA:rank=4', iters=1, allow_random_base=True))
    # Weights of the whole model through load_from count as well.
    cfg = segmentor.config('Mona:dim=4', iters=1)
    cfg.load_from = base
    segmentor.train(cfg)


@pytest.mark.parametrize('method', ['Mona:dim=4', 'LoRA:rank=4+LNTune'])
def test_only_the_declared_parameters_move(base, method):
    before = {}

    def remember(runner):
        step = runner.model.train_step

        def first(*args, **kwargs):
            if not before:
                before.update({
                    n: p.detach().clone()
                    for n, p in runner.model.named_parameters()
                })
            return step(*args, **kwargs)

        runner.model.train_step = first

    cfg = segmentor.config(method, **pretrained(base))
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=.01, weight_decay=.1)
    runner, _ = segmentor.train(cfg, remember)
    for name, parameter in runner.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad
        assert parameter.requires_grad == (not name.startswith('backbone.')
                                           or '.peft.' in name
                                           or ('LNTune' in method
                                               and 'norm' in name))


@pytest.mark.parametrize('method', [
    'Mona:dim=4,drop_rate=0', 'LST:reduction=4', 'VPTShallow:num_tokens=3',
    'LoRA:rank=4,init=pissa', 'DTLPlus:rank=2', 'E3VA:dim=8'
])
def test_resume_equals_one_run(base, tmp_path, method):
    whole, losses = segmentor.train(
        segmentor.config(method, iters=4, **pretrained(base)))
    first = segmentor.config(
        method, work_dir=str(tmp_path), iters=2, **pretrained(base))
    segmentor.train(first)
    second = segmentor.config(
        method, work_dir=str(tmp_path), iters=4, **pretrained(base))
    second.resume = True
    resumed, tail = segmentor.train(second)
    assert tail == losses[2:]
    for (name, a), (_, b) in zip(whole.model.state_dict().items(),
                                 resumed.model.state_dict().items()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    'method', ['Mona:dim=4', 'LST:reduction=4', 'VPTShallow:num_tokens=3'])
def test_ema_averages_adapters_and_base(base, method):
    cfg = segmentor.config(method, **pretrained(base))
    cfg.custom_hooks = [
        dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=.5)
    ]
    runner, _ = segmentor.train(cfg)
    path = osp.join(cfg.work_dir, 'iter_4.pth')
    saved = torch.load(path, weights_only=False)
    # The checkpoint holds the averaged model under the ordinary keys.
    live, averaged = saved['ema_state_dict'], saved['state_dict']
    assert list(averaged) == list(runner.model.state_dict())
    moved = 0
    for name, parameter in runner.model.named_parameters():
        same = torch.equal(averaged[name], live['module.' + name])
        if parameter.requires_grad:
            moved += not same
        else:
            assert torch.allclose(averaged[name], live['module.' + name])
    assert moved


def test_merged_model_is_stock(base):
    runner, _ = segmentor.train(
        segmentor.config('LoRA:rank=4+BitFit', **pretrained(base)))
    stock = MODELS.build(segmentor.config().model)
    stock.load_state_dict(merged_state_dict(runner.model), strict=True)
    image = torch.randn(1, 3, 36, 44)
    stock.eval(), runner.model.eval()
    found, expected = stock(image), runner.model(image)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.dist
def test_two_ranks_equal_one_process(base, tmp_path):
    """Without find_unused_parameters."""
    method = 'Mona:dim=4,drop_rate=0+LoRA:rank=4'
    single, double = str(tmp_path / 'one'), str(tmp_path / 'two')
    script(method, base, single)
    port = 29611 + os.getpid() % 1000
    script(method, base, double, ranks=2, port=port)
    one, two = torch.load(single), torch.load(double)
    assert list(one) == list(two)
    for key, value in one.items():
        if value.is_floating_point():
            scale = value.abs().max().clamp(min=1e-3)
            assert (two[key] - value).abs().max() <= 1e-6 * scale, key
