"""The commands as a user types them, on a tiny generated data set."""
import json
import os
import os.path as osp
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

pytest.importorskip('mmseg')

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
sys.path.insert(0, osp.join(ROOT, 'tests'))

import segmentor  # noqa: E402
from commands import run_tool  # noqa: E402


def command(tool, *args, status=0, script=False):
    if script:
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHON=sys.executable)
        env['PYTHONPATH'] = osp.join(ROOT, 'tests')
        done = subprocess.run(
            ['bash', osp.join(ROOT, 'tools', tool), *args],
            capture_output=True,
            text=True,
            env=env,
            timeout=300)
    else:
        done = run_tool(tool, *args)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope='module')
def stock_config(tmp_path_factory):
    """A stock config file that knows nothing of mmpeft."""
    folder = tmp_path_factory.mktemp('stock')
    cfg = segmentor.config(iters=3)
    cfg.pop('work_dir')
    cfg.custom_imports = dict(imports=['segmentor'])
    cfg.val_dataloader = dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='TinyScenes'))
    cfg.test_dataloader = cfg.val_dataloader
    cfg.val_cfg, cfg.test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
    cfg.train_cfg.val_interval = 3
    cfg.val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    cfg.test_evaluator = cfg.val_evaluator
    path = folder / 'tiny.py'
    folder = osp.join(ROOT, 'tests')
    path.write_text(f'import sys\nsys.path.insert(0, {folder!r})\ndel sys\n' +
                    cfg.pretty_text)
    return str(path)


RANDOM = 'model.backbone.allow_random_base=True'


@pytest.fixture(scope='module')
def trained(stock_config, tmp_path_factory):
    work_dir = str(tmp_path_factory.mktemp('run'))
    done = command('train.py', stock_config, '--method', 'LoRA:rank=4',
                   '--lr-scale', '2', '--work-dir', work_dir, '--cfg-options',
                   RANDOM, 'log_level=INFO')
    return work_dir, done.stdout + done.stderr


def test_train_says_what_it_does(trained):
    work_dir, log = trained
    assert 'backbone [lora]' in log
    assert 'Learning rate: 0.1 in this config; the recipe of LoRA uses 6e-05' \
        in log
    dumped = Config.fromfile(osp.join(work_dir, 'tiny.py'))
    assert dumped.model.backbone.method == 'LoRA:rank=4'
    assert dumped.model.backbone.stock == 'mmseg.SwinTransformer'
    state = torch.load(
        osp.join(work_dir, 'iter_3.pth'), weights_only=False)['state_dict']
    assert 'backbone.stages.0.blocks.0.peft.lora.qkv.lora_A' in state


def test_test_merge_and_test_again(trained, stock_config, tmp_path):
    work_dir, _ = trained
    checkpoint = osp.join(work_dir, 'iter_3.pth')
    config = osp.join(work_dir, 'tiny.py')
    merged = str(tmp_path / 'merged.pth')
    command('merge_peft.py', config, checkpoint, merged)

    # Strictly into the stock model.
    from mmengine.registry import MODELS, init_default_scope
    init_default_scope('mmseg')
    model = MODELS.build(segmentor.config().model)
    model.load_state_dict(torch.load(merged)['state_dict'], strict=True)

    results = []
    for cfg, file in ((config, checkpoint), (config, merged), (stock_config,
                                                               merged)):
        out = str(tmp_path / f'out{len(results)}')
        command('test.py', cfg, file, '--work-dir', out)
        scores = []
        for folder, _, files in os.walk(out):
            scores += [
                json.load(open(osp.join(folder, f))) for f in files
                if f.endswith('.json') and f != 'scalars.json'
            ]
        results.append(scores[0]['mIoU'])
    assert results[0] == results[1] == results[2]

    again = command('merge_peft.py', config, checkpoint, merged, status=2)
    assert 'exists already' in again.stderr
    wrong = command('test.py', stock_config, checkpoint, status=2)
    assert 'holds lora, but the config attaches no method' in wrong.stderr


def test_resume(trained, stock_config, tmp_path):
    done = command('train.py', stock_config, '--method', 'LoRA:rank=4',
                   '--work-dir', str(tmp_path), '--resume',
                   osp.join(trained[0], 'iter_3.pth'), '--cfg-options', RANDOM,
                   'train_cfg.max_iters=4', 'log_level=INFO')
    assert 'resumed epoch: 0, iter: 3' in done.stdout + done.stderr
    assert osp.isfile(tmp_path / 'iter_4.pth')


def test_merge_refusals(stock_config, tmp_path):
    out = str(tmp_path / 'x.pth')
    missing = command(
        'merge_peft.py',
        stock_config,
        'no.pth',
        out,
        '--method',
        'Mona:dim=4',
        status=2)
    assert "There is no checkpoint 'no.pth'" in missing.stderr
    assert missing.stderr.count('\n') == 1 or 'Error:' in \
        missing.stderr.splitlines()[-1]
    garbage = tmp_path / 'garbage.pth'
    garbage.write_bytes(b'not a checkpoint')
    for method in ('Mona:dim=4', 'LoRA:rank=4'):
        done = command(
            'merge_peft.py',
            stock_config,
            str(garbage),
            out,
            '--method',
            method,
            status=2)
        assert 'cannot be read as a checkpoint' in done.stderr
    assert not osp.exists(out)
    # --force over a file, from a checkpoint that is not there.
    done = command(
        'merge_peft.py',
        stock_config,
        'no.pth',
        str(garbage),
        '--method',
        'LoRA:rank=4',
        '--force',
        status=2)
    assert "There is no checkpoint 'no.pth'" in done.stderr
    assert garbage.read_bytes() == b'not a checkpoint'


@pytest.mark.parametrize('arguments, says', [
    (['--method', 'Moan'], "did you mean 'Mona'"),
    (['--method', 'LoRA:rank=0'], 'rank must be a whole number'),
    (['--method', 'Mona'], 'dim=64 is larger than the width 16'),
    (['--method', 'LoRA:rank=4'], 'were never loaded'),
    (['--at', 'model.backbone'], 'give both'),
    (['--cfg-options', 'x'], 'is not KEY=VALUE'),
    ([
        '--method', 'Mona:dim=4', '--cfg-options',
        'model.backbone.frozen_stages=1'
    ], 'frozen_stages=1'),
])
def test_mistakes_are_one_sentence(stock_config, tmp_path, arguments, says):
    done = command(
        'train.py',
        stock_config,
        '--work-dir',
        str(tmp_path),
        *arguments,
        status=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('Error: ') and says in last
    assert 'Traceback' not in done.stderr


def test_count_params_json(stock_config):
    done = command('count_params.py', stock_config, '--method', 'Mona:dim=4',
                   '--method', 'BitFit', '--metric', '50', '--json')
    rows = json.loads(done.stdout)
    assert [r['method'] for r in rows] == ['Mona:dim=4', 'BitFit']
    assert rows[0]['backbone_trainable'] == rows[0]['backbone_added'] > 0
    assert rows[1]['backbone_added'] == 0
    assert set(rows[0]) == {
        'config', 'method', 'backbone_total', 'backbone_trainable',
        'backbone_added', 'model_total', 'model_trainable', 'by_stage',
        'ppt_factor', 'ppt'
    }
    assert rows[0]['ppt'] < 50


@pytest.mark.dist
def test_dist_train_and_test(stock_config, tmp_path):
    os.environ['PORT'] = str(29700 + os.getpid() % 200)
    method = ['--method', 'Mona:dim=4']
    command(
        'dist_train.sh',
        stock_config,
        '2',
        *method,
        '--work-dir',
        str(tmp_path),
        '--cfg-options',
        RANDOM,
        script=True)
    checkpoint = str(tmp_path / 'iter_3.pth')
    command(
        'dist_test.sh',
        stock_config,
        checkpoint,
        '2',
        *method,
        '--work-dir',
        str(tmp_path),
        script=True)
    failed = subprocess.run([
        'bash',
        osp.join(ROOT, 'tools', 'dist_train.sh'), stock_config, '2',
        '--method', 'Moan'
    ],
                            env=dict(os.environ, PYTHON=sys.executable),
                            capture_output=True)
    assert failed.returncode != 0
