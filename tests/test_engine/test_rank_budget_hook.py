"""The budget of AdaLoRA; also a script, for several ranks."""
import json
import os
import os.path as osp
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import OptimWrapper

HERE = osp.dirname(osp.dirname(osp.abspath(__file__)))
sys.path.insert(0, HERE)

pytest.importorskip('mmseg')

import segmentor  # noqa: E402
from test_methods.recorded import load, tensor, value  # noqa: E402

from mmpeft.cli import leave_ranks  # noqa: E402
from mmpeft.engine.hooks import RankBudgetHook  # noqa: E402
from mmpeft.errors import PEFTError  # noqa: E402
from mmpeft.methods import AdaLoRA  # noqa: E402
from mmpeft.sites import Site  # noqa: E402

LEAVES = ('lora_A', 'lora_B', 'lora_E')


class Pair(nn.Module):
    """Two modules of different widths; the losses of a library model."""

    def __init__(self, rank=4):
        super().__init__()
        self.fc = AdaLoRA(Site('fc1', 12, 10), rank, targets=['fc1'])
        self.fc1 = AdaLoRA(Site('fc1', 16, 14), rank, targets=['fc1'])

    def forward(self, inputs, data_samples=None, mode='tensor'):
        loss = self.fc(inputs, inputs.new_zeros(2, 10), None).sum()
        return dict(loss=loss) if mode == 'loss' else loss


def start(model, max_iters=20, wrapper=None, **kwargs):
    """The hook in the middle of a run of a model."""
    hook = RankBudgetHook(**kwargs)
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    runner = SimpleNamespace(
        model=model,
        max_iters=max_iters,
        iter=0,
        optim_wrapper=wrapper or OptimWrapper(optimizer),
        message_hub=MessageHub.get_instance('budget'),
        logger=MMLogger.get_instance('budget'),
        _resume=False)
    hook.before_train(runner)
    return hook, runner


def set_all(model, step):
    """Entries and gradients by the rule of the recorded numbers."""
    for name, module in model.named_children():
        for leaf in LEAVES:
            p = getattr(module, leaf)
            key = f'{name}.{leaf}'
            p.data.copy_(tensor(f'{key} {step}', p.numel()).view_as(p))
            p.grad = tensor(f'{key} grad {step}', p.numel()).view_as(p)


def test_released_schedule():
    schedule = load('released_rank_budget')['schedule']
    hook, _ = start(Pair(), target_rank=2, t_init=3, t_final=5, interval=2)
    assert [hook.budget(t) for t in range(21)] == schedule.tolist()


def test_released_choice():
    recorded = load('released_rank_budget')
    model = Pair().double()
    hook, runner = start(model, target_rank=2, t_init=3, t_final=5)
    for step in range(3):
        set_all(model, step)
        hook._before_step(runner.optim_wrapper.optimizer)
    for budget, kept in zip(recorded['budgets'], recorded['kept']):
        assert hook._choose(int(budget)).tolist() == kept.tolist()


def test_released_orthogonality():
    model = Pair().double()
    for name, p in model.named_parameters():
        p.data.copy_(torch.from_numpy(value(name, p.shape)))
    start(model, orth_weight=.5)
    losses = model(torch.ones(2, 12).double(), mode='loss')
    expected = load('released_rank_budget')['orth']
    assert abs(losses['loss_orth'].item() - float(expected)) < 1e-10
    assert torch.is_tensor(model(torch.ones(2, 12).double(), mode='tensor'))


def test_printed_orthogonality():
    """The sum of the squares."""
    model = Pair().double()
    start(model, orth_weight=.3, orthogonality='squared')
    found = model(torch.ones(2, 12).double(), mode='loss')['loss_orth']
    expected = 0.
    for module in model.children():
        for factor in (module.lora_A, module.lora_B.t()):
            gap = factor @ factor.t() - torch.eye(4).double()
            expected = expected + .3 * (gap**2).sum()
    torch.testing.assert_close(found, expected)


def test_importance():
    """Smoothed sensitivity times smoothed uncertainty, of the entries that
    the step uses."""
    model = Pair().double()
    hook, runner = start(model, beta1=.7, beta2=.6)
    mean, spread = 0., 0.
    for step in range(3):
        set_all(model, step)
        p = model.fc.lora_A
        now = (p * p.grad).abs().detach()
        mean = .7 * mean + .3 * now
        spread = .6 * spread + .4 * (now - mean).abs()
        runner.optim_wrapper.optimizer.step()
    found = hook._means['fc.lora_A']
    torch.testing.assert_close(found[0].double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), spread, rtol=1e-5, atol=0)


def test_ties_keep_exactly_the_budget():
    """As many as asked for, also where nothing has a score."""
    hook, _ = start(Pair())
    assert hook._choose(3).tolist() == [True] * 3 + [False] * 5


def test_accumulated_gradients_count_once():
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    hook, runner = start(model, wrapper=wrapper)
    wrapper.initialize_count_status(model, 0, 20)
    calls = []
    smooth = hook._smooth
    hook._smooth = lambda name, now: (calls.append(name), smooth(name, now))
    for i in range(4):
        model.fc.lora_E.data.fill_(.1)
        loss = model(torch.ones(2, 12), mode='loss')
        wrapper.update_params(sum(loss.values()))
    # Two steps; fc1 has no E in the loss.
    assert calls.count('fc.lora_E') == 2 and calls.count('fc1.lora_A') == 2


@pytest.mark.skipif(
    not hasattr(torch, 'amp') or not hasattr(torch.amp, 'GradScaler'),
    reason='this torch has no GradScaler for the CPU')
def test_scaled_gradients_are_unscaled():
    means = []
    for scale in (1., 1024.):
        torch.manual_seed(0)
        model = Pair()
        model.fc.lora_E.data.fill_(.1)
        hook, runner = start(model)
        scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        loss = sum(model(torch.ones(2, 12), mode='loss').values())
        scaler.scale(loss).backward()
        scaler.step(runner.optim_wrapper.optimizer)
        means.append(hook._means['fc.lora_B'][0])
        # A step that overflowed is none.
        model.fc.lora_E.grad.fill_(float('inf'))
        scaler.update()
        scaler.step(runner.optim_wrapper.optimizer)
        assert torch.equal(hook._means['fc.lora_B'][0], means[-1])
    torch.testing.assert_close(*means)


def test_what_a_fused_optimizer_is_given():
    """Scaled gradients, and whether they overflowed."""
    model = Pair().double()
    hook, runner = start(model)
    optimizer = runner.optim_wrapper.optimizer
    set_all(model, 0)
    optimizer.grad_scale = torch.tensor(4.)
    optimizer.found_inf = torch.tensor(1.)
    hook._before_step(optimizer)
    assert not hook._means
    optimizer.found_inf = torch.tensor(0.)
    hook._before_step(optimizer)
    p = model.fc.lora_E
    torch.testing.assert_close(hook._means['fc.lora_E'][0].double(),
                               .15 * (p * p.grad).abs().detach() / 4)


def config(iters=8, rank=4, **kwargs):
    """A tiny run with the hook; steps large enough to matter."""
    cfg = segmentor.config(
        f'AdaLoRA:rank={rank}', iters=iters, allow_random_base=True)
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=.02)
    hook = dict(type='mmpeft.RankBudgetHook', t_init=1, t_final=2, interval=1)
    cfg.custom_hooks = [dict(hook, **kwargs)]
    return cfg


def singular_values(model):
    return torch.cat(
        [m.lora_E.detach() for m in model.modules() if isinstance(m, AdaLoRA)])


def test_budget_over_a_run():
    """All triplets, then fewer, then the target; at last the same ones."""
    seen = []

    def before(runner):
        saved = runner.call_hook

        def call_hook(name, **kwargs):
            saved(name, **kwargs)
            if name == 'after_train_iter':
                seen.append(singular_values(runner.model) != 0)

        runner.call_hook = call_hook

    cfg = config(iters=8, rank=4, target_rank=1.5)
    runner, _ = segmentor.train(cfg, before)
    hook = next(h for h in runner.hooks if isinstance(h, RankBudgetHook))
    # Two targets in each of four blocks.
    counts = [int(s.sum()) for s in seen]
    assert counts == [hook.budget(t) for t in range(1, 9)]
    assert counts[0] == 32 and counts[-3:] == [12] * 3
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 3
    assert torch.equal(seen[-1], seen[-2]) and torch.equal(seen[-1], seen[-3])
    # Not the same number everywhere: the ranking is global.
    assert len(set(seen[-1].view(8, 4).sum(1).tolist())) > 1
    # The last file has what was cut.
    saved = torch.load(
        osp.join(cfg.work_dir, 'iter_8.pth'), weights_only=False)
    values = torch.cat(
        [v for k, v in saved['state_dict'].items() if k.endswith('lora_E')])
    assert int((values != 0).sum()) == 12
    # Nothing is left on the model or the optimizer.
    assert not runner.model._forward_hooks
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks


def test_loss_is_logged_and_lowers_the_gaps():
    gaps = {}
    for weight in (0, 2.):
        cfg = config(orth_weight=weight)
        logs = []

        def before(runner):
            step = runner.model.train_step

            def train_step(*args, **kwargs):
                logs.append(step(*args, **kwargs))
                return logs[-1]

            runner.model.train_step = train_step

        runner, _ = segmentor.train(cfg, before)
        assert ('loss_orth' in logs[0]) == bool(weight)
        modules = [m for m in runner.model.modules() if isinstance(m, AdaLoRA)]
        gaps[weight] = sum(sum(m.gaps()).item() for m in modules)
    assert gaps[2.] < .9 * gaps[0]


@pytest.mark.parametrize('stop', [2, 7])
def test_resume_equals_one_run(stop, tmp_path):
    """Before the choice is fixed, and after."""
    cfg = config(target_rank=1.5)
    cfg.default_hooks.checkpoint.interval = stop
    whole, losses = segmentor.train(cfg)
    again = config(target_rank=1.5)
    again.work_dir = str(tmp_path)
    again.load_from = osp.join(cfg.work_dir, f'iter_{stop}.pth')
    again.resume = True
    resumed, tail = segmentor.train(again)
    assert tail == losses[stop:]
    for (name, a), (_, b) in zip(whole.model.state_dict().items(),
                                 resumed.model.state_dict().items()):
        assert torch.equal(a, b), name
    first, second = (
        next(h for h in r.hooks if isinstance(h, RankBudgetHook))
        for r in (whole, resumed))
    assert torch.equal(first._kept, second._kept)
    for name, means in first._means.items():
        for a, b in zip(means, second._means[name]):
            assert torch.equal(a, b), name


def test_a_new_run_from_these_weights_starts_anew(tmp_path):
    cfg = config(target_rank=1.5)
    segmentor.train(cfg)
    again = config(iters=3, t_init=1, t_final=1)
    again.work_dir = str(tmp_path)
    again.load_from = osp.join(cfg.work_dir, 'iter_8.pth')
    seen = {}

    def before(runner):
        hook = next(h for h in runner.hooks if isinstance(h, RankBudgetHook))
        begin = hook.before_train

        def before_train(runner):
            begin(runner)
            seen.update(means=dict(hook._means), kept=hook._kept)

        hook.before_train = before_train

    segmentor.train(again, before)
    assert seen == dict(means={}, kept=None)


@pytest.mark.parametrize('kwargs,message', [
    (dict(target_rank=0), 'target_rank must be a number above 0'),
    (dict(t_init=-1), 't_init must be a whole number of iterations or a'),
    (dict(t_final=1.), r't_final .* share in \[0, 1\)'),
    (dict(interval='2'), 'interval must be'),
    (dict(beta1=1.), r'beta1 must be a number in \[0, 1\)'),
    (dict(orth_weight=-1), 'orth_weight must be'),
    (dict(orthogonality='l2'), "unknown orthogonality 'l2'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        RankBudgetHook(**kwargs)


def test_what_does_not_fit_the_run():
    with pytest.raises(PEFTError, match='9 .*4'):
        start(Pair(), target_rank=4.5)
    with pytest.raises(PEFTError, match='t_init=12 and t_final=8 leave none'):
        start(Pair(), t_init=12, t_final=8)
    with pytest.raises(PEFTError, match='finds no AdaLoRA'):
        start(nn.Linear(2, 2))


def test_defaults_follow_the_length_of_the_training():
    hook, _ = start(Pair(), max_iters=90000)
    assert (hook._start, hook._stop, hook._interval) == (9000, 45000, 90)
    # Two thirds of eight.
    assert hook.budget(0) == 8 and hook.budget(45000) == 5
    assert AdaLoRA.hooks == (dict(type='mmpeft.RankBudgetHook'), )


@pytest.mark.dist
def test_two_ranks_equal_one_process(tmp_path):
    found = []
    for ranks in (1, 2):
        out = str(tmp_path / str(ranks))
        port = 29911 + os.getpid() % 1000
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
        kept = [json.load(open(f'{out}.{r}.json')) for r in range(ranks)]
        assert all(k == kept[0] for k in kept)
        found.append((torch.load(out), kept[0]))
    (one, kept_one), (two, kept_two) = found
    assert kept_one == kept_two and sum(kept_one) == 12
    for key, weight in one.items():
        if weight.is_floating_point():
            scale = weight.abs().max().clamp(min=1e-3)
            assert (two[key] - weight).abs().max() <= 1e-4 * scale, key


def main():
    out, ranks = sys.argv[1], int(sys.argv[2])
    cfg = config(target_rank=1.5)
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
    torch.manual_seed(0)
    runner, _ = segmentor.train(cfg)
    model = getattr(runner.model, 'module', runner.model)
    hook = next(h for h in runner.hooks if isinstance(h, RankBudgetHook))
    with open(f'{out}.{rank}.json', 'w') as file:
        json.dump(hook._kept.tolist(), file)
    if rank == 0:
        torch.save(model.state_dict(), out)
    leave_ranks()


if __name__ == '__main__':
    main()
