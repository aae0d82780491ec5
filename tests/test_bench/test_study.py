"""A plan that is stopped and killed ends with the same table.

The runs of these tests are no trainings, so that many can be killed; one that
trains is in test_bench_run.py.
"""
import multiprocessing
import os
import random
import signal
import time

import pytest
from bench_parts import write_plan, write_python

from mmpeft.bench import study as study_module
from mmpeft.bench.cell_config import TaskConfigs
from mmpeft.bench.launch import Launcher, locked
from mmpeft.bench.plan_file import load_plan
from mmpeft.bench.rows import results_file
from mmpeft.bench.study import Study
from mmpeft.bench.table import read_rows

FORK = multiprocessing.get_context('fork')
# Two saves on the way; the score is a function of the config alone.
SCRIPT = """
import json, os, random, sys, time
config, _, work_dir, _, _, method = sys.argv[1:]
if method.startswith('VPT'):
    print('Error: there are no tokens.')
    sys.exit(2)
cfg = {}
exec(open(config).read(), cfg)
os.makedirs(work_dir, exist_ok=True)
state = os.path.join(work_dir, 'state')
for step in range(len(open(state).read()) if os.path.exists(state) else 0, 3):
    time.sleep(.02)
    with open(state, 'a') as file:
        file.write('x')
lr = cfg['optim_wrapper']['optimizer']['lr']
score = 30 + random.Random(repr((lr, method, cfg['randomness']))).random()
record = dict(metrics=dict(mIoU=score), finite=lr < .5, device='cpu',
              backbone_trainable=10, model_trainable=30, model_total=99,
              cpu_s_per_step=1., wall_s_per_step=1., peak_bytes=None)
with open(work_dir + '/part', 'w') as file:
    json.dump(record, file)
os.replace(work_dir + '/part', work_dir + '/record.json')
"""
VARY = ('started', 'ended')


@pytest.fixture
def plan(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    config = write_python(
        tmp_path / 'base.py',
        model=dict(type='None'),
        train_cfg=dict(max_iters=4),
        train_dataloader=dict(batch_size=1),
        optim_wrapper=dict(optimizer=dict(lr=1.)))
    path = write_plan(
        tmp_path,
        config,
        methods=dict(Mona='Mona:dim=4', LoRA='LoRA:rank=2', VPT='VPTDeep'),
        tuning=dict(lrs=(1e-3, 1e-2, 1e-1, 1.)))
    return load_plan(path)


def open_study(plan, tmp_path, folder='out', **kwargs):
    folder = str(tmp_path / folder)
    os.makedirs(folder, exist_ok=True)
    configs = {n: TaskConfigs(t, folder) for n, t in plan.tasks.items()}
    return Study(plan, folder, configs,
                 Launcher(script=str(tmp_path / 'script.py')), **kwargs)


def work(plan, tmp_path):
    with locked(str(tmp_path / 'lock'), wait=True):
        open_study(plan, tmp_path).run(jobs=3)


def table(tmp_path, folder='out'):
    rows = read_rows(results_file(str(tmp_path / folder)))
    return {
        r['cell']: {
            k: v
            for k, v in r.items() if k not in VARY
        }
        for r in rows
    }


def test_killed_at_random_it_ends_with_the_same_table(plan, tmp_path):
    open_study(plan, tmp_path, 'whole').run(jobs=3)
    draw, killed = random.Random(0), 0
    for _ in range(200):
        process = FORK.Process(target=work, args=(plan, tmp_path))
        process.start()
        # Longer each time: a busy machine gets nowhere in a second.
        process.join(draw.uniform(.05, 1 + killed / 10))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
        # Readable at any time, and nothing is missing.
        if os.path.exists(results_file(str(tmp_path / 'out'))):
            assert len(table(tmp_path)) >= 5 * 2
    assert process.exitcode == 0 and killed >= 3
    whole = table(tmp_path, 'whole')
    assert table(tmp_path) == whole
    assert {r['status'] for r in whole.values()} == {'done', 'failed'}


def test_what_the_table_says(plan, tmp_path):
    open_study(plan, tmp_path).run(jobs=2)
    rows = table(tmp_path)
    final = [r for r in rows.values() if r['phase'] == 'final']
    assert len(final) == 5 * 2
    for row in final:
        if row['method'] == 'VPT':
            assert (row['status'], row['reason']) == ('failed',
                                                      'there are no tokens.')
            continue
        # The best of those that were tried and did not diverge.
        tried = [
            r for r in rows.values()
            if (r['method'], r['phase']) == (row['method'], 'tune')
        ]
        best = max((r for r in tried if r['status'] == 'done'),
                   key=lambda r: r['metric'])
        assert (row['status'], row['lr']) == ('done', best['lr'])
        assert 30 <= row['metric'] <= 31
        assert row['ppt_with_head'] < row['ppt'] < row['metric']
        assert row['head_trainable'] == 20
        assert row['latency_s'] is None
        assert row['versions']['torch']
    for row in rows.values():
        if row['lr'] == 1. and row['method'] != 'VPT':
            assert (row['status'], row['phase']) == ('failed', 'tune')
            assert 'diverged' in row['reason']


def test_only_what_changed_is_run_again(plan, tmp_path):
    open_study(plan, tmp_path).run(jobs=2)
    before = table(tmp_path)
    done = []
    open_study(
        plan, tmp_path, tell=lambda cell, row: done.append(cell)).run(jobs=2)
    assert not done and table(tmp_path) == before
    plan.tasks['seg'].methods['Mona'] = 'Mona:dim=8'
    del plan.tasks['seg'].methods['VPT']
    open_study(
        plan, tmp_path, tell=lambda cell, row: done.append(cell)).run(jobs=2)
    assert {c.method for c in done} == {'Mona'}
    assert {r['method']
            for r in table(tmp_path).values()
            } == {'Full', 'Frozen', 'Mona', 'LoRA'}


def test_failed_cells_are_run_again_if_asked(plan, tmp_path):
    open_study(plan, tmp_path).run(jobs=2)
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT.replace("'VPT'", "'Nothing'"))
    done = []
    open_study(
        plan,
        tmp_path,
        retry_failed=True,
        tell=lambda cell, row: done.append((cell, row))).run(jobs=2)
    assert 'VPT' in {c.method for c, row in done if row['status'] == 'done'}
    assert all(r['status'] == 'done' for r in table(tmp_path).values()
               if r['phase'] == 'final')


def test_costs_belong_to_final_cells(plan, tmp_path):
    study = open_study(plan, tmp_path)
    study.run(jobs=2)
    study.table.add_costs('seg',
                          dict(Mona=dict(step_s=.5, latency_merged_s=None)))
    for row in table(tmp_path).values():
        own = (row['method'], row['phase']) == ('Mona', 'final')
        assert row['step_s'] == (.5 if own else None)
    # They stay.
    open_study(plan, tmp_path).run(jobs=2)
    assert table(tmp_path)['seg_Mona_final_seed1']['step_s'] == .5


def test_no_cell_starts_after_the_budget(plan, tmp_path):
    study = open_study(plan, tmp_path)
    study.run(jobs=2, budget=0.)
    assert {r['status'] for r in table(tmp_path).values()} == {'waiting'}


def test_an_error_of_ours_stops_the_rest(plan, tmp_path, monkeypatch):
    """Runs end, the table is whole, and the error is raised."""

    def broken(cfg):
        if cfg['optim_wrapper']['optimizer']['lr'] == 1e-1:
            raise OSError('disk full')
        return text(cfg)

    text = study_module.config_text
    monkeypatch.setattr(study_module, 'config_text', broken)
    began = time.monotonic()
    with pytest.raises(OSError, match='disk full'):
        open_study(plan, tmp_path).run(jobs=2)
    assert time.monotonic() - began < 30
    assert 'running' not in {r['status'] for r in table(tmp_path).values()}
