"""Processes of cells: how they end, and what becomes of them."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmpeft.bench.cell_run import CellRun
from mmpeft.bench.launch import Launcher, locked, start, tool
from mmpeft.bench.warm import Warm
from mmpeft.errors import PEFTError

ROOT = Path(__file__).resolve().parents[2]
ENV = dict(
    os.environ,
    PYTHONPATH=os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))
# Takes the arguments of tools/train.py, and acts as the config says.
SCRIPT = """
import json, os, runpy, signal, sys, time
config, _, work_dir, _, *rest = sys.argv[1:]
os.makedirs(work_dir, exist_ok=True)
open(work_dir + '/starts', 'a').write('x')
starts = os.path.getsize(work_dir + '/starts')
def record(**values):
    json.dump(dict(values, starts=starts, rest=rest),
              open(work_dir + '/record.json', 'w'))
exec(open(config).read())
"""


@pytest.fixture(params=['cold', 'warm'])
def cell(request, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    warm = Warm([]) if request.param == 'warm' else None

    def run(text, digest='d', env={}):
        return CellRun(
            str(tmp_path / 'cell'), text, digest, ['--method', 'Mona'],
            Launcher(script=str(script), warm=warm), env)

    return run


def kill_self(starts):
    return (f'if starts < {starts}: os.kill(os.getpid(), signal.SIGKILL)\n'
            'record(metric=1)')


def test_a_run_is_recorded(cell):
    result = cell('record(metric=1)').run()
    assert result['exit_status'] == 0
    assert result['record'] == dict(
        metric=1, starts=1, rest=['--method', 'Mona'])
    # What is there is not run again, unless it was another.
    assert cell('record(metric=2)').run() == result
    other = cell('record(metric=2)', 'other').run()
    assert (other['record']['metric'], other['record']['starts']) == (2, 1)


@pytest.mark.parametrize('text, status, reason', [
    ("print('Error: Mona needs a grid.'); sys.exit(2)", 2,
     'Mona needs a grid.'),
    ("raise RuntimeError('no more')", 1, 'RuntimeError: no more'),
    ("print('bye')", 0, 'status 0: bye'),
    (kill_self(9), -9, 'killed by signal 9, 3 times'),
])
def test_a_failure_has_a_reason(cell, text, status, reason):
    result = cell(text).run()
    assert result['exit_status'] == status
    assert reason in result['reason']


def test_a_killed_run_goes_on(cell):
    assert cell(kill_self(3)).run()['record']['starts'] == 3


def test_a_stopped_run_leaves_no_result(cell):
    run = cell('time.sleep(60)')
    threading.Timer(.5, run.stop).start()
    began = time.monotonic()
    assert run.run() is None
    assert time.monotonic() - began < 20


def test_a_run_finds_what_it_is_told(cell, tmp_path):
    """Environment, output, arguments and threads."""
    run = cell(
        'import torch; print("said"); '
        'record(a=os.environ["A"], threads=torch.get_num_threads(), '
        'path=os.environ.get("PYTHONPATH"), argv=sys.argv[1:])',
        env=dict(A='b', OMP_NUM_THREADS='2'))
    record = run.run()['record']
    assert record['a'] == 'b'
    # A new process asks its libraries, which may take fewer.
    assert record['threads'] == 2 or not run.launcher.warm
    assert record['path'] == os.environ.get('PYTHONPATH')
    assert record['argv'][1:4] == ['--work-dir', run.work_dir, '--resume']
    with open(run.log) as log:
        assert log.read() == 'said\n'


PARENT = """
from mmpeft.bench.launch import locked, start
from mmpeft.bench.warm import Warm

if __name__ == '__main__':
    begin = Warm([]).start if {warm} else start
    with locked({lock!r}) as held:
        begin([{python!r}, {script!r}], {log!r}, {{}}, held).wait()
"""
SLEEPER = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'


@pytest.mark.parametrize('warm', [False, True])
def test_runs_do_not_outlive_the_benchmark(tmp_path, warm):
    """Not even one that was killed; and nobody starts beside them."""
    lock, log = tmp_path / 'lock', tmp_path / 'log'
    script, code = tmp_path / 'sleeper.py', tmp_path / 'parent.py'
    script.write_text(SLEEPER)
    code.write_text(
        PARENT.format(
            warm=warm,
            lock=str(lock),
            python=sys.executable,
            script=str(script),
            log=str(log)))
    parent = subprocess.Popen([sys.executable, str(code)], cwd=ROOT, env=ENV)
    while not (log.exists() and log.read_text().endswith('\n')):
        assert parent.poll() is None
        time.sleep(.05)
    child = int(log.read_text())
    with pytest.raises(PEFTError, match='Another process'), locked(str(lock)):
        pass
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    # Returns as soon as the last one that holds it is dead.
    with locked(str(lock), wait=True):
        # A process that ends lets go of its files a moment before.
        for _ in range(100):
            state = state_of(child)
            if state in ('Z', 'X', 'gone'):
                break
            time.sleep(.1)
        assert state in ('Z', 'X', 'gone')


def state_of(process):
    try:
        with open(f'/proc/{process}/stat') as file:
            return file.read().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return 'gone'


def test_commands():
    script = ['c.py', '--work-dir', 'w', '--resume', '--method', 'Mona']
    plain = Launcher().command('c.py', 'w', script[4:])
    assert plain == [sys.executable, tool('train.py'), *script]
    ranks = Launcher(
        'pytorch', 4, extra=['--amp']).command('c.py', 'w', script[4:])
    assert ranks[1:4] == ['-m', 'torch.distributed.run', '--nproc_per_node=4']
    assert ranks[-3:] == ['--amp', '--launcher', 'pytorch']
    slurm = Launcher('slurm', 16, '-p gpu').command('c.py', 'w', script[4:])
    assert slurm[:3] == ['srun', '--ntasks=16', '--ntasks-per-node=8']
    assert slurm[4:6] == ['-p', 'gpu']


def test_gpus_are_shared_out(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 5)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,4,5,6,7')
    pairs = Launcher('pytorch', 2)
    assert [pairs.devices(i)['CUDA_VISIBLE_DEVICES']
            for i in range(3)] == ['3,4', '5,6', '3,4']
    with pytest.raises(PEFTError, match='only 5 GPUs'):
        Launcher('pytorch', 8).devices(0)
    assert json.dumps(Launcher('slurm', 8).devices(0))


def test_start_keeps_the_output(tmp_path):
    log = tmp_path / 'log'
    start([sys.executable, '-c', 'import os; print(os.environ["A"])'],
          str(log), dict(A='b')).wait()
    assert log.read_text() == 'b\n'
