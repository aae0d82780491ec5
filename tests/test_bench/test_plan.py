"""Plans: what they mean, and what is refused before anything runs."""
import subprocess
import sys

import pytest
from bench_parts import write_plan, write_python

from mmpeft.bench.cell_config import TaskConfigs, config_text, fit_budget
from mmpeft.bench.cells import Cell, next_cells
from mmpeft.bench.plan import Budget
from mmpeft.bench.plan_file import load_plan, presets
from mmpeft.bench.published import read_published
from mmpeft.config import load_config
from mmpeft.errors import MissingFileError, PEFTError

CONFIG = dict(
    model=dict(type='None', backbone=dict(init_cfg=None)),
    train_cfg=dict(max_iters=100),
    train_dataloader=dict(batch_size=1),
    val_dataloader=dict(batch_size=1),
    custom_hooks=[dict(type='EMAHook')],
    custom_imports=dict(imports=['json']),
    optim_wrapper=dict(
        optimizer=dict(lr=1.),
        paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.)))),
    param_scheduler=[
        dict(type='LinearLR', begin=0, end=10),
        dict(type='MultiStepLR', begin=10, end=100, milestones=[50, 90])
    ])


@pytest.fixture
def config(tmp_path):
    return write_python(tmp_path / 'base.py', **CONFIG)


def test_baselines_are_always_in(tmp_path, config):
    task = load_plan(write_plan(tmp_path, config)).tasks['seg']
    assert list(task.methods) == ['Full', 'Frozen', 'Mona']
    task = load_plan(
        write_plan(tmp_path, config, methods=['LoRA:rank=2', 'Full'])).tasks
    assert list(task['seg'].methods) == ['Frozen', 'LoRA:rank=2', 'Full']


def test_a_task_may_differ_from_the_plan(tmp_path, config):
    plan = load_plan(
        write_plan(
            tmp_path, config, task=dict(seeds=(5, ), budget=dict(iters=9))))
    task = plan.tasks['seg']
    assert task.seeds == (5, ) and task.budget == Budget('iters', 9)
    assert task.lrs == (1e-3, 1e-2)


def test_options_of_the_command_line(tmp_path, config):
    plan = load_plan(
        write_plan(tmp_path, config), {
            'seeds': [7],
            'budget.iters': 3
        })
    assert plan.tasks['seg'].seeds == (7, )
    assert plan.tasks['seg'].budget.count == 3


@pytest.mark.parametrize('values, message', [
    (dict(seed=3), "'seed'.*mean 'seeds'"),
    (dict(methods=['Moan']), "no method 'Moan'"),
    (dict(methods={
        'a b': 'LoRA',
        'a/b': 'Mona'
    }), "folder name 'a-b'"),
    (dict(task=dict(tune=dict())), 'on which images'),
    (dict(tuning=dict(lrs=(1., 2.), rule='guess')), "'guess' is none of"),
    (dict(tuning=dict(lrs=(1., 2.), per_method=1)), "'per_method'"),
    (dict(budget=dict(hours=2)), 'dict\\(iters=N\\)'),
    (dict(seeds=(1, 1)), 'twice the same'),
    (dict(keep='some'), "keep='some'"),
    (dict(name='a/b'), 'name of a folder'),
    (dict(task=dict(metric=None)), 'needs metric='),
    (dict(task=dict(method_options=dict(Moan={}))), "mean 'Mona'"),
])
def test_mistakes(tmp_path, config, values, message):
    with pytest.raises(PEFTError, match=message):
        load_plan(write_plan(tmp_path, config, **values))


def test_nobody_else_needs_it():
    code = ('import sys, mmpeft, mmpeft.engine.run, mmpeft.injection\n'
            "assert not [m for m in sys.modules if 'mmpeft.bench' in m]")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_no_such_plan():
    with pytest.raises(PEFTError, match='first-three'):
        load_plan('last-three')


def test_budgets_take_the_schedule_along():
    cfg = load_config_dict()
    assert fit_budget(cfg, Budget('iters', 50), 'seg') == 50
    assert cfg['train_cfg'] == dict(max_iters=50, val_interval=50)
    warm, steps = cfg['param_scheduler']
    assert (warm['begin'], warm['end']) == (0, 5)
    assert (steps['end'], steps['milestones']) == (50, [25, 45])
    cfg = load_config_dict()
    assert fit_budget(cfg, None, 'seg') == 100
    assert cfg['param_scheduler'] == CONFIG['param_scheduler']
    with pytest.raises(PEFTError, match='counts epochs.*100 iters'):
        fit_budget(load_config_dict(), Budget('epochs', 5), 'seg')


def load_config_dict():
    return dict(CONFIG)


def test_the_config_of_a_cell(tmp_path, config):
    task = load_plan(
        write_plan(
            tmp_path,
            config,
            task=dict(
                options=dict(train_dataloader=dict(batch_size=2), note='all'),
                tune=dict(note='tune'),
                method_options=dict(Full=dict(head=dict(wide=1)))),
            tuning=dict(
                lrs=(1e-3, 1e-2), head_lrs=(1., ),
                budget=dict(iters=4)))).tasks['seg']
    configs = TaskConfigs(task, str(tmp_path))
    cell = Cell('seg', 'Mona', 'tune', 7, 1e-2, 1.)
    text = config_text(configs.of(cell))
    cfg = load_config(write_text(tmp_path / 'cell.py', text))
    assert cfg.to_dict().items() >= configs.of(cell).items()
    assert (cfg.note, cfg.train_dataloader.batch_size) == ('tune', 2)
    assert cfg.train_cfg.max_iters == 4 and cfg.randomness.seed == 7
    assert cfg.optim_wrapper.optimizer.lr == 1e-2
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert keys.head.lr_mult == pytest.approx(100) and 'norm' in keys
    assert cfg.default_hooks.peft_checkpoint.keep == 'delta'
    assert [h.type
            for h in cfg.custom_hooks] == ['EMAHook', 'mmpeft.CellRecordHook']
    assert cfg.custom_imports.imports[0] == 'json'
    full = configs.of(Cell('seg', 'Full', 'tune', 7, 1e-2, 1.))
    assert full['head'] == dict(wide=1) and 'head' not in cfg
    final = configs.of(Cell('seg', 'Mona', 'final', 7, 1e-2, 1.))
    assert final['note'] == 'all' and final['train_cfg']['max_iters'] == 6


def write_text(path, text):
    path.write_text(text)
    return str(path)


def test_digests(tmp_path):
    """Equal as long as nothing changes that a result depends on."""

    def digest(method='Mona', weights=b'1', folder='out', **values):
        (tmp_path / 'base.pth').write_bytes(weights)
        init = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
        config = write_python(
            tmp_path / 'base.py', **{
                **CONFIG, 'model': dict(backbone=dict(init_cfg=init))
            })
        task = load_plan(write_plan(tmp_path, config, **values)).tasks['seg']
        return TaskConfigs(task, str(tmp_path / folder)).digest(
            Cell('seg', method, 'final', 0, 1e-3))

    first = digest()
    assert digest(folder='elsewhere') == digest(title='Another') == first
    others = [
        digest('Full'),
        digest(weights=b'2'),
        digest(budget=dict(iters=7)),
        digest(methods=dict(Mona='Mona:dim=5')),
        digest(task=dict(options=dict(note=1))),
        digest(task=dict(metric='mAcc'))
    ]
    assert len({first, *others}) == 7


def test_presets_say_what_they_need(monkeypatch):
    """Each is a plan; its configs exist and take its budget."""
    assert set(presets()) >= {
        'classification', 'dense', 'first-three', 'specialised'
    }
    monkeypatch.delenv('MMPEFT_DATA_ROOT', raising=False)
    for name in presets():
        if name == 'specialised':
            with pytest.raises(MissingFileError, match='--data-root'):
                load_plan(name)
            continue
        plan = load_plan(name)
        assert plan.title and next_cells(plan, {})
        # Those of VTAB share a config.
        for task in {t.config: t for t in plan.tasks.values()}.values():
            for key, value in task.env.items():
                monkeypatch.setenv(key, value)
            cfg = load_config(task.config).to_dict()
            for budget in (task.budget, task.tune_budget):
                fit_budget(dict(cfg), budget, task.name)


def test_classification_has_what_the_survey_prints(tmp_path, monkeypatch):
    """And HST the head of its config."""
    monkeypatch.delenv('MMPEFT_DATA_ROOT', raising=False)
    task = load_plan('classification').tasks['cifar']
    kinds = {spec.partition(':')[0] for spec in task.methods.values()}
    assert {r['method']
            for r in read_published() if r['task'] == 'vtab-1k'} <= kinds
    configs = TaskConfigs(task, str(tmp_path))
    model = configs.of(Cell('cifar', 'HST', 'final', 0, 1e-3))['model']
    shipped = load_config('mmpeft::hst/vit-b_vtab.py').to_dict()['model']
    assert (model['neck'], model['head']) == (shipped['neck'], shipped['head'])
    other = configs.of(Cell('cifar', 'Mona', 'final', 0, 1e-3))['model']
    assert other['head']['type'] == 'VisionTransformerClsHead'
