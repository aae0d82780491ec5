"""Training a NOAH as a supernet, and searching it."""
import copy
import json
import os
import os.path as osp
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch

HERE = osp.dirname(osp.dirname(osp.abspath(__file__)))
sys.path.insert(0, HERE)

pytest.importorskip('mmseg')

import segmentor  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from test_dist import start  # noqa: E402

from mmpeft.counting import count_params  # noqa: E402
from mmpeft.engine import search  # noqa: E402
from mmpeft.engine.evolution import Evolution, evolve  # noqa: E402
from mmpeft.engine.hooks import SubnetHook  # noqa: E402
from mmpeft.engine.run import build_runner, prepare  # noqa: E402
from mmpeft.engine.search_files import write_config  # noqa: E402
from mmpeft.errors import PEFTError  # noqa: E402

TOOL = osp.join(osp.dirname(HERE), 'tools', 'search_noah.py')
NOAH = 'NOAH:num_tokens=4,rank=4,dim=4,drop_rate=0'
HOOK = dict(
    type='mmpeft.SubnetHook',
    num_tokens=(1, 2, 4),
    rank=(1, 2, 4),
    dim=(1, 2, 4))
SIZES = dict(population=4, generations=3, select=3, mutations=2, crossovers=1)
BUDGET = 1200


def supernet(folder, iters=4, method=NOAH, hook=HOOK, base='base.pth'):
    """Config of a run that trains and validates a supernet."""
    cfg = segmentor.config(
        method,
        str(folder / 'run'),
        iters=iters,
        init_cfg=dict(type='Pretrained', checkpoint=str(folder / base)))
    cfg.custom_imports = dict(imports=['segmentor'])
    cfg.custom_hooks = [dict(type='EMAHook'), dict(hook)]
    cfg.default_hooks.checkpoint.update(interval=2, save_best='auto')
    cfg.default_hooks.peft_report = dict(
        type='mmpeft.PEFTReportHook', check_after=2)
    cfg.default_hooks.peft_checkpoint = dict(type='mmpeft.PEFTCheckpointHook')
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.val_dataloader = dict(
        batch_size=4,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='TinyScenes'))
    cfg.val_cfg = dict(type='ValLoop')
    cfg.val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    return cfg


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with the config of a supernet and its checkpoint."""
    folder = tmp_path_factory.mktemp('supernet')
    segmentor.write_base(str(folder / 'base.pth'))
    cfg = supernet(folder)
    cfg.train_cfg.val_interval = 4
    Runner.from_cfg(cfg).train()
    cfg.dump(str(folder / 'super.py'))
    return folder


def arguments(folder, **kwargs):
    """As tools/search_noah.py parses them."""
    values = dict(
        asdict(Evolution()),
        **dict.fromkeys(('base', 'metric', 'out', 'work_dir')),
        config=str(folder / 'super.py'),
        checkpoint=str(folder / 'run' / 'iter_4.pth'),
        budget=BUDGET,
        min_params=0,
        lower_is_better=False,
        force=False,
        cfg_options=[],
        launcher='none',
        no_pin_memory=False,
        no_persistent_workers=False)
    values.update(SIZES, **kwargs)
    return Namespace(**values)


@pytest.fixture(scope='module')
def found(trained):
    """What a search finds, and its record."""
    result = search.run_search(
        arguments(trained, work_dir=str(trained / 'found')))
    with open(trained / 'found' / 'search.json') as file:
        return result, json.load(file)


def test_every_iteration_has_a_subnet_of_its_own(tmp_path):
    """By the seed and the iteration alone: resumed runs draw the same."""
    segmentor.write_base(str(tmp_path / 'base.pth'))
    seen = {}

    class Seen(SubnetHook):

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            super().before_train_iter(runner, batch_idx, data_batch)
            seen[runner.iter] = [
                m.width for kind in self._space.modules for m in kind
            ]

        def before_val_epoch(self, runner):
            super().before_val_epoch(runner)
            seen['val'] = {m.width for k in self._space.modules for m in k}

    def run(resume=None, **hook):
        seen.clear()
        cfg = supernet(tmp_path, iters=4)
        cfg.custom_hooks = []
        cfg.train_cfg.val_interval = 4
        if resume:
            cfg.load_from, cfg.resume = resume, True
        runner = Runner.from_cfg(cfg)
        choices = {k: v for k, v in HOOK.items() if k != 'type'}
        runner.register_hook(Seen(**choices, **hook))
        runner.train()
        return dict(seen), runner.model.state_dict()

    first, weights = run()
    assert first.pop('val') == {4}
    assert sorted(first) == list(range(4))
    assert len({tuple(w) for w in first.values()}) == 4
    assert {w for widths in first.values() for w in widths} == {0, 1, 2, 4}
    again, same = run(resume=str(tmp_path / 'run' / 'iter_2.pth'))
    again.pop('val')
    assert again == {i: first[i] for i in range(2, 4)}
    assert all(torch.equal(v, weights[k]) for k, v in same.items())
    other, _ = run(seed=1)
    assert other[0] != first[0]


def test_search(trained, found):
    """Within the limits, each subnet once, the best first."""
    result, record = found
    rows = record['subnets']
    assert result['evaluated'] == len(rows) == 12
    assert len({str(r['subnet']) for r in rows}) == 12
    assert all(0 < r['params'] <= BUDGET for r in rows)
    best = max(r['metrics']['mIoU'] for r in rows)
    assert result['metric'] == 'mIoU' and result['value'] == best
    assert len({r['metrics']['mIoU'] for r in rows}) > 4
    files = os.listdir(trained / 'found')
    assert not [f for f in files if f.endswith(('.pth', '.tmp'))]


def narrow_of(cfg, wide):
    """A runner of the found config with the supernet's weights."""
    cfg.launcher = 'none'
    runner = build_runner(cfg)
    state = wide['state_dict']
    for name, value in runner.model.state_dict(keep_vars=True).items():
        value.data.copy_(state[name][tuple(slice(n) for n in value.shape)])
    return runner


def test_result_is_the_config_of_that_subnet(trained, found):
    """It has that many parameters, scores the same with these weights, and
    trains."""
    result, _ = found
    text = open(result['config']).read()
    assert text.startswith("_base_ = '../super.py'\n")
    cfg = Config.fromfile(result['config'])
    assert [h['type'] for h in cfg.custom_hooks] == ['EMAHook']
    assert cfg.model.backbone.init_cfg.checkpoint.endswith('base.pth')
    assert cfg.model.backbone.method.drop_rate == 0
    cfg.work_dir = str(trained / 'narrow')
    # It keeps the best of a training, and there is none.
    cfg.default_hooks.checkpoint = None
    wide = torch.load(trained / 'run' / 'iter_4.pth', weights_only=False)
    runner = narrow_of(cfg, wide)
    runner.call_hook('before_run')
    added = count_params(runner.model)['backbone_trainable']
    assert added == result['params'] <= BUDGET
    assert abs(runner.val_loop.run()['mIoU'] - result['value']) < 1e-6
    args = Namespace(
        config=result['config'],
        method=None,
        at=None,
        cfg_options=['train_cfg.max_iters=3'],
        work_dir=str(trained / 'retrained'),
        base=None,
        launcher='none',
        no_validate=True,
        amp=False,
        auto_scale_lr=False,
        resume=None,
        lr_scale=1.,
        no_pin_memory=False,
        no_persistent_workers=False)
    build_runner(prepare(args)).train()
    assert (trained / 'retrained' / 'iter_2_delta.safetensors').is_file()


@pytest.mark.parametrize('method', [
    dict(type='mmpeft.NOAH', rank=8, dim=0, name='mine', layers=[0, 1, -1]),
    [
        'LNTune',
        dict(type='NOAH', dim=8, overrides={'stage:0': dict(rank=4)}),
        dict(type='LoRA', rank=4, targets=('proj', ), name='second')
    ],
])
def test_other_forms_of_the_method(tmp_path, method):
    """What else the config says is kept."""
    cfg = supernet(tmp_path, method=method)
    cfg.dump(str(tmp_path / 'super.py'))
    out = str(tmp_path / 'below' / 'found.py')
    subnet = {0: dict(num_tokens=1, rank=2), 1: dict(num_tokens=0, rank=0)}
    write_config(
        arguments(tmp_path, cfg_options=['a=1']), Evolution(),
        dict(config=out, metric='mIoU', value=.5, params=7, subnet=subnet))
    assert '# --cfg-options a=1\n' in open(out).read()
    found = Config.fromfile(out).model.backbone
    widths = dict(
        num_tokens=0,
        rank=0,
        dim=0,
        overrides={'0': dict(num_tokens=1, rank=2)})
    if isinstance(method, dict):
        method = dict(method, **widths, type='NOAH')
        assert found.method == method
    else:
        assert found.method == [
            dict(type='LNTune'),
            dict(type='NOAH', **widths), method[2]
        ]
    assert found.init_cfg == cfg.model.backbone.init_cfg


@pytest.mark.parametrize('stop', [1, 8])
def test_interrupted_search_goes_on(trained, found, tmp_path, monkeypatch,
                                    stop):
    """Nothing is validated twice, and the result is the same."""
    measure, calls = search.Judge._measure, []

    def interrupted(self, subnet):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(subnet)
        return measure(self, subnet)

    monkeypatch.setattr(search.Judge, '_measure', interrupted)
    args = arguments(trained, work_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        search.run_search(copy.copy(args))
    assert not osp.exists(tmp_path / 'super_subnet.py')
    monkeypatch.setattr(
        search.Judge, '_measure', lambda self, subnet:
        (calls.append(subnet), measure(self, subnet))[1])
    result = search.run_search(copy.copy(args))
    assert len(calls) == len(set(calls)) == 12
    assert dict(result, config=0) == dict(found[0], config=0)
    with open(tmp_path / 'search.json') as file:
        assert json.load(file) == found[1]
    # A search that is complete validates nothing, with other limits less.
    calls.clear()
    assert search.run_search(copy.copy(args)) == result and not calls
    search.run_search(Namespace(**{**vars(args), 'generations': 4}))
    assert len(calls) == 4


def command(folder, work_dir, *args):
    sizes = [f'--{k}={v}' for k, v in SIZES.items()]
    return [
        sys.executable, TOOL,
        str(folder / 'super.py'),
        str(folder / 'run' / 'iter_4.pth'), f'--budget={BUDGET}', *sizes,
        f'--work-dir={work_dir}', *args
    ]


def environment():
    return dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=osp.join(HERE))


def rows_in(path):
    if not osp.isfile(path):
        return 0
    with open(path) as file:
        return len(json.load(file)['subnets'])


@pytest.mark.slow
def test_killed_command(trained, found, tmp_path):
    """Twice in the middle; each record is whole, the result the same."""
    path, run = tmp_path / 'search.json', command(trained, tmp_path)
    for wanted in (3, 8):
        process = subprocess.Popen(
            run,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        stop = time.monotonic() + 120
        while rows_in(path) < wanted and time.monotonic() < stop:
            assert process.poll() is None
            time.sleep(.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wanted <= rows_in(path) < 12
    done = subprocess.run([*run, '--json'],
                          env=environment(),
                          capture_output=True,
                          text=True,
                          check=True)
    result, = json.loads(done.stdout)
    assert result['value'] == found[0]['value']
    assert result['params'] == found[0]['params']
    assert {
        int(k): v
        for k, v in result['subnet'].items()
    } == found[0]['subnet']


@pytest.mark.slow
@pytest.mark.dist
def test_several_ranks(trained, found, tmp_path):
    """Two ranks find what one does."""
    start([
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
        '--master_port={port}', *command(trained, tmp_path)[1:],
        '--launcher=pytorch'
    ])
    with open(tmp_path / 'search.json') as file:
        subnets = json.load(file)['subnets']
    assert [r['subnet']
            for r in subnets] == [r['subnet'] for r in found[1]['subnets']]
    read = Config.fromfile(str(tmp_path / 'super_subnet.py'))
    assert read.model.backbone.method == Config.fromfile(
        found[0]['config']).model.backbone.method


def test_delta_of_the_supernet(trained, found, tmp_path):
    args = arguments(
        trained,
        work_dir=str(tmp_path),
        checkpoint=str(trained / 'run' / 'iter_4_delta.safetensors'),
        **dict(SIZES, generations=1))
    search.run_search(args)
    with open(tmp_path / 'search.json') as file:
        rows = json.load(file)['subnets']
    for row, same in zip(rows, found[1]['subnets']):
        assert row['subnet'] == same['subnet']
        assert abs(row['metrics']['mIoU'] - same['metrics']['mIoU']) < 1e-6


def test_other_metric(trained, found, tmp_path):
    """The record has all numbers: nothing is validated for another one."""
    for lower in (False, True):
        result = search.run_search(
            arguments(
                trained,
                work_dir=str(trained / 'found'),
                out=str(tmp_path / f'{lower}.py'),
                metric='aAcc',
                lower_is_better=lower,
                generations=1))
        values = [r['metrics']['aAcc'] for r in found[1]['subnets'][:4]]
        assert result['value'] == (min if lower else max)(values)


@pytest.mark.parametrize('kwargs,said', [
    (dict(budget=10), 'No subnet has at most 10 parameters: the smallest has'),
    (dict(min_params=10**6), 'No subnet has 1,000,000 to 1,200 parameters'),
    (dict(metric='AP'), "no number 'AP'; it gives aAcc, mIoU, mAcc"),
    (dict(population=2), 'mutations=2 and crossovers=1 are more than'),
    (dict(width_prob=2.), 'width_prob=2.0 is no probability'),
    (dict(select=0), 'select=0 must be at least 1'),
    (dict(checkpoint='none.pth'), "There is no checkpoint 'none.pth'"),
    (dict(cfg_options=['custom_hooks=[]']), '1 NOAH and 0 SubnetHook'),
    (dict(cfg_options=['val_evaluator=None']), 'has no val_evaluator'),
    (dict(cfg_options=['model.backbone.method=LoRA']),
     '0 NOAH and 1 SubnetHook'),
    (dict(cfg_options=['model.backbone.method=NOAH']),
     'changes the method, but what is found'),
])
def test_refused(trained, tmp_path, kwargs, said):
    with pytest.raises(PEFTError, match=said):
        search.run_search(
            arguments(trained, **{
                'work_dir': str(tmp_path),
                **kwargs
            }))


def test_refuses_what_is_no_supernet(trained, tmp_path):
    """A stock checkpoint, records of other searches, and a file of the
    user's."""
    args = dict(work_dir=str(tmp_path))
    whole = torch.load(trained / 'run' / 'iter_4.pth', weights_only=False)
    stock = {k: v for k, v in whole['state_dict'].items() if '.peft.' not in k}
    torch.save(dict(state_dict=stock), tmp_path / 'stock.pth')
    for path, said in ((tmp_path / 'stock.pth', 'has no NOAH in it'),
                       (trained / 'base.pth', 'does not belong to this')):
        with pytest.raises(PEFTError, match=said):
            search.run_search(arguments(trained, checkpoint=str(path), **args))
    for content, said in (('{', 'is no record of a search'),
                          ('{"about": {}, "subnets": []}',
                           'with another version and config and checkpoint')):
        (tmp_path / 'search.json').write_text(content)
        with pytest.raises(PEFTError, match=said):
            search.run_search(arguments(trained, **args))
    (tmp_path / 'out.py').write_text('')
    with pytest.raises(PEFTError, match='exists already'):
        search.run_search(
            arguments(trained, out=str(tmp_path / 'out.py'), **args))


class Space:
    """Bits with weights, as a space of subnets."""
    costs = (5, 3, 8, 1, 9, 4)

    def count(self, subnet):
        return sum(c for c, bit in zip(self.costs, subnet) if bit)

    def smallest(self):
        return (0, ) * 6

    def largest(self):
        return (1, ) * 6

    def sample(self, rng):
        return tuple(rng.randrange(2) for _ in self.costs)

    def mutate(self, subnet, rng, width_prob, depth_prob):
        return tuple(1 - b if rng.random() < width_prob else b for b in subnet)

    def cross(self, one, other, rng):
        return tuple(rng.choice(pair) for pair in zip(one, other))


@pytest.mark.parametrize('seed', range(5))
def test_evolution(seed):
    """It finds the best, and stops where there is nothing new."""
    values, seen = (4, 3, 9, 1, 8, 5), []

    def score(subnet):
        seen.append(subnet)
        return sum(v for v, bit in zip(values, subnet) if bit)

    how = Evolution(
        population=5,
        generations=6,
        select=3,
        mutations=2,
        crossovers=2,
        seed=seed)
    ranking = evolve(Space(), score, how, budget=16, floor=4)
    assert len(seen) == len(set(seen)) == len(ranking)
    assert all(4 <= Space().count(s) <= 16 for s in seen)
    values_of = [sum(v for v, b in zip(values, s) if b) for s in ranking]
    assert values_of == sorted(values_of, reverse=True)
    assert values_of[0] >= 16
    before = list(seen)
    assert evolve(Space(), score, how, 16, 4) == ranking
    assert seen == before * 2
    # More than there are: 64 less the one without anything.
    how = Evolution(population=80, generations=1, seed=seed)
    assert len(evolve(Space(), lambda s: 0., how, 30)) == 63
    ranking = evolve(Space(), lambda s: 0., how, 30)
    assert ranking[0] == (0, 0, 0, 1, 0, 0)  # of equals, the smallest
    with pytest.raises(
            PEFTError, match='None of .* random subnets has 2 to 2'):
        evolve(Space(), score, how, 2, 2)
