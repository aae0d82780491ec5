import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mmengine.config import Config
from rich.console import Console

import mmpeft
from mmpeft.engine.listing import list_methods

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / 'tools'
METHODS = dict(
    full='Full',
    frozen='Frozen',
    partial='Partial',
    bitfit='BitFit',
    ln_tune='LNTune',
    adapter='Adapter',
    adaptformer='AdaptFormer',
    lora='LoRA',
    mona='Mona')


@pytest.fixture()
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import demo_steps
    return demo_steps


def step_of(steps, folder, code, key='1', **kwargs):
    return steps.Step('probe', [sys.executable, '-c', code], folder, key,
                      kwargs.pop('collect', lambda folder: dict(ok=1)),
                      **kwargs)


@pytest.mark.parametrize(
    'folder, model',
    [(row['name'], 'mask-rcnn')
     for row in list_methods() if not row['families']['Swin']] +
    [(folder, 'upernet') for folder in METHODS])
def test_configs_differ_only_in_the_method(folder, model):
    path = mmpeft.config_path(f'{folder}/{model}_swin-nano_shapes.py')
    assert len(Path(path).read_text().splitlines()) <= 6
    method = {row['name']: row['method'] for row in list_methods()}[folder]
    cfg = Config.fromfile(path)
    full = Config.fromfile(
        mmpeft.config_path(f'full/{model}_swin-nano_shapes.py'))
    assert cfg.model.backbone.pop('method').type == method
    cfg.pop('custom_hooks', None)
    full.model.backbone.pop('method')
    assert cfg.to_dict() == full.to_dict()
    assert cfg.model.backbone.init_cfg.checkpoint == (
        'data/shapes_v1/swin-nano_source.pth')


def test_the_source_is_stock():
    cfg = Config.fromfile(
        mmpeft.config_path('_base_/mask-rcnn_swin-nano_shapes-source.py'))
    assert cfg.model.backbone.type == 'SwinTransformer'
    assert cfg.model.backbone.init_cfg is None


def test_a_failed_step_shows_the_end_of_its_log(steps, tmp_path):
    code = 'print("\\n".join(map(str, range(99)))); raise SystemExit(3)'
    step = step_of(steps, tmp_path / 'a', code)
    with pytest.raises(steps.StepError) as error:
        steps.run_steps([step], 1, Console(quiet=True))
    lines = str(error.value).splitlines()
    assert 'status 3' in lines[0] and 'log.txt' in lines[0]
    assert lines[-1] == '98' and len(lines) < 20


def test_a_failure_stops_the_other_steps(steps, tmp_path):
    bad = step_of(steps, tmp_path / 'bad', 'raise SystemExit(1)')
    long = step_of(steps, tmp_path / 'long', 'import time; time.sleep(99)')
    with pytest.raises(steps.StepError):
        steps.run_steps([bad, long], 2, Console(quiet=True))
    assert long.process.returncode not in (None, 0)


def test_a_finished_step_is_kept_until_its_key_changes(steps, tmp_path):
    count = tmp_path / 'count'
    code = f'open({str(count)!r}, "a").write("x")'
    quiet = Console(quiet=True)
    for key, runs in (('1', 1), ('1', 1), ('2', 2)):
        step = step_of(steps, tmp_path / 'a', code, key)
        result, = steps.run_steps([step], 1, quiet)
        assert result['ok'] == 1 and result['seconds'] >= 0
        assert count.read_text() == 'x' * runs


def test_an_interrupted_step_starts_again(steps, tmp_path):
    step = step_of(steps, tmp_path / 'a', 'pass')
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'epoch_1.pth').write_text('half')
    assert step.result() is None
    steps.run_steps([step], 1, Console(quiet=True))
    assert not (tmp_path / 'a' / 'epoch_1.pth').exists()


def test_progress_is_read_from_the_log(steps, tmp_path):
    step = step_of(steps, tmp_path, 'pass', epochs=4)
    step.log.write_text('Config: ...')
    assert step.progress() == (0, None, 'starting')
    step.log.write_text('INFO - Epoch(train)  [2][10/19]  lr: 1e-3  eta: 1\n')
    assert step.progress() == (29, 76, 'training')
    step.log.write_text('INFO - Epoch(train)  [4][19/19]  lr: 1e-3  eta: 0\n')
    assert step.progress() == (76, 76, 'validating')


def test_scores_and_times_are_collected(steps, tmp_path):
    folder = tmp_path / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    records = [
        dict(loss=1., time=9.),
        dict(loss=1., time=.5),
        dict(loss=1., time=.4), {
            'coco/bbox_mAP': .25,
            'coco/segm_mAP': .5
        }
    ]
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, records)))
    (tmp_path / 'last_checkpoint').write_text('epoch_4.pth\n')
    assert steps.collect_training(tmp_path) == dict(
        bbox=.25, segm=.5, step_seconds=.5, checkpoint='epoch_4.pth')


def test_rows_hold_mean_and_spread(steps):
    pytest.importorskip('mmdet')
    from demo_report import table_rows
    run = dict(bbox=.2, segm=.3, step_seconds=.5)
    row = dict(
        name='Mona',
        runs=[run, dict(run, segm=.4)],
        backbone_trainable=50,
        backbone_total=1000,
        step_cpu_seconds=.5,
        saved_bytes=3 * 2**20)
    header, (cells, ) = table_rows([row])
    assert len(header) == len(cells)
    assert cells == [
        'Mona', '50', '5.0', '20.0 ± 0.0', '35.0 ± 7.1', '35.0', '0.50',
        '3 MiB'
    ]


@pytest.mark.slow
def test_all_of_it_and_again(tmp_path):
    pytest.importorskip('mmdet')
    command = [
        sys.executable, 'tools/demo.py', '--fast', '--work-dir',
        str(tmp_path / 'demo'), '--methods', 'frozen', 'lora'
    ]
    run = dict(
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ, 'XDG_CACHE_HOME': str(tmp_path)
        })
    first = subprocess.run(command, **run)
    assert first.returncode == 0, first.stdout + first.stderr
    facts = json.loads((tmp_path / 'demo' / 'results.json').read_text())
    assert [row['name'] for row in facts['target']] == ['Frozen', 'LoRA']
    assert facts['target'][0]['backbone_trainable'] == 0
    assert facts['merged_lora']['images'] == 100
    assert facts['merged_lora']['scores'] < 1e-5
    for name in ('table.md', 'predictions.png'):
        assert (tmp_path / 'demo' / name).stat().st_size > 200
    second = subprocess.run(command, **run)
    assert second.returncode == 0, second.stdout + second.stderr
    # Two trainings, the merge and its check.
    for name in ('Frozen, seed 0', 'LoRA, seed 0', 'LoRA: merge',
                 'LoRA: check'):
        assert f'  {name}: done before, kept.' in second.stdout


def test_a_terminated_demo_leaves_nothing_running(tmp_path):
    code = f'''
import sys
sys.path.insert(0, {str(TOOLS)!r})
import demo_steps
from pathlib import Path
from rich.console import Console
child = ('import os, time; open("pid", "w").write(str(os.getpid())); '
         'time.sleep(99)')
step = demo_steps.Step('probe', [sys.executable, '-c', child],
                       Path({str(tmp_path)!r}) / 'a', '1', lambda f: dict())
demo_steps.ROOT = Path({str(tmp_path)!r})
demo_steps.run_steps([step], 1, Console(quiet=True))
'''
    demo = subprocess.Popen([sys.executable, '-c', code])
    pid = tmp_path / 'pid'
    for _ in range(300):
        if pid.exists() and pid.read_text():
            break
        time.sleep(.1)
    demo.terminate()
    assert demo.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
