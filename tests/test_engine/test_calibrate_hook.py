"""The look at data before training; also a script, for several ranks."""
import os
import os.path as osp
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

HERE = osp.dirname(osp.dirname(osp.abspath(__file__)))
sys.path.insert(0, HERE)

pytest.importorskip('mmseg')

import segmentor  # noqa: E402

from mmpeft.cli import leave_ranks  # noqa: E402
from mmpeft.engine.hooks import CalibrateHook, calibrate_hook  # noqa: E402
from mmpeft.errors import PEFTError  # noqa: E402
from mmpeft.methods import GPS, SCT  # noqa: E402

HOOK = dict(type='mmpeft.CalibrateHook')
METHODS = ('SCT:num_channels=6', 'GPS:num_inputs=2')
BOTH = '+'.join(METHODS)


@HOOKS.register_module(force=True)
class NumbersHook(Hook):
    """What is drawn in each iteration, as an augmentation would."""
    priority = 'VERY_LOW'

    def __init__(self):
        self.drawn = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.drawn.append((float(torch.rand(())), data_batch['inputs']))


def config(method=BOTH, iters=4, hook=HOOK, **kwargs):
    cfg = segmentor.config(
        method, iters=iters, allow_random_base=True, **kwargs)
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=.01, weight_decay=.1)
    cfg.custom_hooks = [dict(hook)] if hook else []
    cfg.custom_hooks.append(dict(type='NumbersHook'))
    return cfg


def choices(state):
    """The buffers, by name."""
    state = getattr(state, 'state_dict', lambda: state)()
    return {k: v for k, v in state.items() if k.endswith('.index')}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def count_looks(monkeypatch):
    """How often each class looked."""
    looks = []
    for cls, name in ((SCT, 'see'), (GPS, 'total')):
        stock = getattr(cls, name)

        def look(self, *args, stock=stock, **kwargs):
            looks.append(type(self).__name__)
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, look)
    return looks


@pytest.mark.parametrize('method', [*METHODS, BOTH])
def test_a_run_chooses_and_trains(method):
    runner, losses = segmentor.train(config(method))
    found = choices(runner.model)
    assert found and all((index >= 0).all() for index in found.values())
    modules = [m for m in runner.model.modules() if isinstance(m, (SCT, GPS))]
    assert len(modules) == len(found)
    for module in modules:
        for parameter in module.parameters():
            assert parameter.abs().sum() > 0
    assert all(loss == loss for loss in losses)
    # Both files have it.
    saved = torch.load(
        osp.join(runner.work_dir, 'iter_4.pth'), weights_only=False)
    assert equal(choices(saved['state_dict']), found)


def test_without_the_hook_it_is_an_error():
    with pytest.raises(PEFTError, match='SCT .*CalibrateHook.*calibrate'):
        segmentor.train(config(METHODS[0], hook=None))


def test_method_brings_its_hook():
    from mmpeft.config import add_method
    cfg, _ = add_method(segmentor.config(), BOTH)
    assert cfg.custom_hooks == [HOOK]


def test_the_run_draws_the_same_numbers(monkeypatch):
    """And reads the same data, in the same order."""
    drawn, found = [], {}

    def give(self, runner):
        for name, module in runner.model.named_modules():
            if isinstance(module, GPS):
                module.settle_on(found[f'{name}.index'])

    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(CalibrateHook, 'before_train', give)
        cfg = config(METHODS[1])
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler')
        runner, _ = segmentor.train(cfg)
        found = choices(runner.model)
        drawn.append(
            next(h for h in runner.hooks if isinstance(h, NumbersHook)).drawn)
    for (a, images), (b, others) in zip(*drawn):
        assert a == b
        assert all(torch.equal(x, y) for x, y in zip(images, others))


def test_interrupted_is_repeated(monkeypatch):
    """Nothing is left of a look that did not end, and the next is equal."""
    whole = choices(segmentor.train(config())[0].model)
    monkeypatch.setattr(GPS, 'chosen', lambda *args: exec('raise OSError'))
    models = []
    with pytest.raises(OSError):
        segmentor.train(config(), lambda runner: models.append(runner.model))
    model = models[0]
    assert all((v == -1).all() for v in choices(model).values())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert 'backbone.stages.0.blocks.0.ffn.layers.1.weight' not in names
    assert 'decode_head.conv_seg.weight' in names
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.undo()
    assert equal(choices(segmentor.train(config())[0].model), whole)


def test_resume_does_not_look_again(monkeypatch, tmp_path):
    cfg = config()
    cfg.default_hooks.checkpoint.interval = 2
    whole, losses = segmentor.train(cfg)
    looks = count_looks(monkeypatch)
    again = config()
    again.work_dir = str(tmp_path)
    again.load_from = osp.join(cfg.work_dir, 'iter_2.pth')
    again.resume = True
    resumed, tail = segmentor.train(again)
    assert tail == losses[2:] and looks == []
    for (name, a), (_, b) in zip(whole.model.state_dict().items(),
                                 resumed.model.state_dict().items()):
        assert torch.equal(a, b), name


def test_a_run_from_weights_that_have_chosen_goes_on(monkeypatch):
    first = config()
    found = choices(segmentor.train(first)[0].model)
    looks = count_looks(monkeypatch)
    cfg = config()
    cfg.load_from = osp.join(first.work_dir, 'iter_4.pth')
    assert equal(choices(segmentor.train(cfg)[0].model), found)
    assert looks == []


def test_only_so_many_samples(monkeypatch):
    looks = count_looks(monkeypatch)
    segmentor.train(
        config(METHODS[0], iters=1, hook=dict(HOOK, num_samples=5)))
    # Four blocks, batches of 4 and 1.
    assert looks == ['SCT'] * 8


@pytest.mark.parametrize('update_buffers', [False, True])
def test_averages_have_the_choice(update_buffers):
    cfg = config()
    cfg.custom_hooks.append(
        dict(
            type='EMAHook',
            ema_type='ExponentialMovingAverage',
            update_buffers=update_buffers))
    runner, _ = segmentor.train(cfg)
    averages = next(h for h in runner.hooks
                    if hasattr(h, 'ema_model')).ema_model.module
    assert equal(choices(averages), choices(runner.model))
    image = torch.randn(1, 3, 36, 44)
    assert averages.backbone.train()(image)[0].isfinite().all()


def test_no_other_entry_moves(tmp_path):
    """Neither decay nor momentum: AdamW for some steps, then merged."""
    from mmpeft.merging import merged_state_dict
    before = {}

    def start(runner):
        before.update({
            k: v.clone()
            for k, v in runner.model.backbone.state_dict().items()
        })

    cfg = config(METHODS[1], iters=6)
    cfg.optim_wrapper.optimizer.lr = .1
    # Weights are drawn when the Runner trains.
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained',
        checkpoint=segmentor.write_base(str(tmp_path / 'base.pth')))
    runner, _ = segmentor.train(cfg)
    backbone = runner.model.backbone
    base = torch.load(str(tmp_path / 'base.pth'))['state_dict']
    merged = merged_state_dict(backbone)
    seen = 0
    for name, module in backbone.named_modules():
        if not isinstance(module, GPS):
            continue
        weight = module.stock_layer.weight
        key = next(n for n, p in backbone.named_parameters() if p is weight)
        assert torch.equal(weight, base[key])
        changed = (merged[key] != base[key]).flatten(1)
        assert changed.any(1).float().mean() > .5
        chosen = torch.zeros_like(changed).scatter(1, module.index.long(),
                                                   True)
        assert not (changed & ~chosen).any()
        seen += 1
    # Four layers of four blocks, the stem and a merging.
    assert seen == 18


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_samples=0), 'num_samples must be a whole number'),
    (dict(loss='supcon'), "loss='supcon' must be one of task, contrastive"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        CalibrateHook(**kwargs)


def test_data_that_cannot_be_read_by_number():
    model = segmentor.Runner.from_cfg(config(METHODS[0])).model
    loader = SimpleNamespace(dataset=iter([]), batch_size=2)
    runner = SimpleNamespace(
        model=model, train_loop=SimpleNamespace(dataloader=loader))
    with pytest.raises(PEFTError, match='by number; call mmpeft.calibrate'):
        CalibrateHook().before_train(runner)


def test_shards_are_refused(monkeypatch):
    monkeypatch.setattr(calibrate_hook, 'in_shards', lambda model: True)
    with pytest.raises(PEFTError, match='SCT cannot .*shards; .*load_from'):
        segmentor.train(config(METHODS[0]))


def test_contrast_needs_labels_of_images():
    with pytest.raises(PEFTError, match='needs the label of each image'):
        segmentor.train(
            config(METHODS[1], hook=dict(HOOK, loss='contrastive')))


@pytest.mark.dist
def test_two_ranks_equal_one_process(tmp_path):
    found = []
    for ranks in (1, 2):
        out = str(tmp_path / str(ranks))
        port = 29411 + os.getpid() % 1000
        command = [sys.executable]
        if ranks > 1:
            command += [
                '-m', 'torch.distributed.run', f'--nproc_per_node={ranks}',
                f'--master_port={port}'
            ]
        command += [osp.abspath(__file__), out, str(ranks)]
        env = dict(
            os.environ, PYTHONPATH=osp.dirname(HERE), OMP_NUM_THREADS='1')
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        states = [torch.load(f'{out}.{r}.pth') for r in range(ranks)]
        assert all(equal(choices(s), choices(states[0])) for s in states)
        found.append(states[0])
    one, two = found
    assert choices(one) and equal(choices(one), choices(two))
    for key, weight in one.items():
        if weight.is_floating_point():
            scale = weight.abs().max().clamp(min=1e-3)
            assert (two[key] - weight).abs().max() <= 1e-4 * scale, key


def main():
    out, ranks = sys.argv[1], int(sys.argv[2])
    cfg = config()
    # Steps that rounding cannot turn around, unlike those of Adam.
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=.5)
    rank = 0
    if ranks > 1:
        torch.distributed.init_process_group('gloo')
        rank = torch.distributed.get_rank()
        cfg.launcher = 'pytorch'
        cfg.train_dataloader.batch_size = 2
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', device_ids=None)
    runner, _ = segmentor.train(cfg)
    model = getattr(runner.model, 'module', runner.model)
    torch.save(model.state_dict(), f'{out}.{rank}.pth')
    leave_ranks()


if __name__ == '__main__':
    main()
