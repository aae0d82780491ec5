"""tools/bench.py trains what a plan says, also when it is killed."""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip('mmseg')

from bench_parts import ENV, write_config, write_plan  # noqa: E402

from mmpeft.bench.main import main  # noqa: E402
from mmpeft.bench.table import read_rows  # noqa: E402
from mmpeft.delta_file import read_delta  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# What is another in another run, or on another clock.
VARY = ('started', 'ended', 'train_step_s', 'step_s', 'latency_s',
        'latency_merged_s')


def bench(plan, *arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, 'tools/bench.py', plan, *arguments],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs)


def here(plan, out, action='run', **options):
    """The same in this process, which has imported everything."""
    main(
        Namespace(
            **{
                **dict(
                    plan=plan,
                    work_dir=str(out),
                    action=action,
                    cfg_options=[],
                    data_root=None,
                    launcher='none',
                    ranks=1,
                    srun_args=None,
                    amp=False,
                    cold=False,
                    jobs=2,
                    budget=None,
                    retry_failed=False,
                    json=False),
                **options
            }))


def table(folder):
    return {
        r['cell']: {
            k: v
            for k, v in r.items() if k not in VARY
        }
        for r in read_rows(str(folder / 'results.sqlite'))
    }


def killed(plan, out, when, *arguments):
    """Start and kill it; whether it was still at it."""
    process = bench(plan, 'run', '--work-dir', str(out), *arguments)
    when(process)
    alive = process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for key, value in ENV.items():
        monkeypatch.setenv(key, value)


def test_a_plan_trains(tmp_path, capsys):
    """Killed once, after the second checkpoint of Mona; started with the
    libraries and without."""
    plan = write_plan(
        tmp_path,
        methods=dict(Mona='Mona:dim=4', Full='Full', Frozen='Frozen'),
        seeds=(0, ),
        tuning=dict(lrs=(1e-2, )))
    base = tmp_path / 'base.pth'
    before = hashlib.sha256(base.read_bytes()).hexdigest()
    whole, out = tmp_path / 'whole', tmp_path / 'out'
    here(plan, whole)

    def second_checkpoint(process):
        while process.poll() is None and not list(
                out.glob('cells/*Mona*/run/iter_4.pth')):
            time.sleep(.02)

    killed(plan, out, second_checkpoint, '--cold')
    record = out / 'cells/seg_Mona_final_seed0/run/record.json'
    halfway = not record.exists()
    capsys.readouterr()
    here(plan, out, 'status')
    assert '0/1' in capsys.readouterr().out
    here(plan, out)
    rows = table(out)
    assert rows == table(whole)
    assert {r['status'] for r in rows.values()} == {'done'}
    row = rows['seg_Mona_final_seed0']
    assert 0 < row['metric'] < 100 and row['metrics']['mIoU'] == row['metric']
    assert row['backbone_trainable'] > 0 < row['head_trainable']
    assert rows['seg_Frozen_final_seed0']['ppt'] == \
        rows['seg_Frozen_final_seed0']['metric']
    # It went on, and did not begin again.
    assert not halfway or json.loads(record.read_text())['steps'] < 6
    # Deltas only, of the base as it was.
    work_dir = out / row['work_dir'] / 'run'
    assert not list(out.rglob('*.pth'))
    delta, = work_dir.glob('*_delta.safetensors')
    assert delta.stat().st_size == row['delta_bytes']
    assert any('.peft.' in key for key in read_delta(str(delta))[0])
    assert hashlib.sha256(base.read_bytes()).hexdigest() == before
    capsys.readouterr()
    here(plan, out, 'status', json=True)
    assert len(json.loads(capsys.readouterr().out)) == 3


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Tuning, seeds, a refused method; kills anywhere, also of runs."""
    config = write_config(tmp_path)
    plan = write_plan(
        tmp_path,
        config,
        methods=dict(
            Mona='Mona:dim=4', LoRA='LoRA:rank=2', Refused='LoRA:targets=[x]'),
        costs=dict(image_size=(36, 44), batch_size=2, repeats=1))
    whole, out = tmp_path / 'whole', tmp_path / 'out'
    began = time.monotonic()
    here(plan, whole)
    took = time.monotonic() - began
    draw, kills = random.Random(1), 0
    while killed(plan, out,
                 lambda p: time.sleep(took * draw.uniform(.02, .4))):
        kills += 1
        assert kills < 60
    here(plan, out)
    rows = table(out)
    assert rows == table(whole) and kills > 2
    assert {r['status'] for r in rows.values()} == {'done', 'failed'}
    rows = {
        r['method']: r
        for r in read_rows(str(out / 'results.sqlite'))
        if r['phase'] == 'final' and r['status'] == 'done'
    }
    assert all(r['step_s'] > 0 and r['latency_s'] > 0 and r['saved_bytes'] > 0
               for r in rows.values())
    assert rows['LoRA']['latency_merged_s'] > 0
    assert rows['Mona']['latency_merged_s'] is None
    refused = [r for r in table(out).values() if r['method'] == 'Refused']
    # Two rates and two seeds.
    assert len(refused) == 4
    assert all("'x'" in r['reason'] for r in refused)
