"""Several ranks: the runs that a user starts, against one process."""
import os
import os.path as osp
import socket
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

pytest.importorskip('mmseg')

import dist_parts  # noqa: E402
from mmengine.config import Config  # noqa: E402

import mmpeft  # noqa: E402
from mmpeft.datasets import ensure_shapes  # noqa: E402
from mmpeft.delta_file import read_delta  # noqa: E402
from mmpeft.engine.extract import extract_delta  # noqa: E402
from mmpeft.engine.run import build_runner  # noqa: E402

HERE = osp.dirname(osp.abspath(__file__))
ROOT = osp.dirname(HERE)
pytestmark = pytest.mark.dist
# What one process and several may differ by, in float64, a tenth of what is
# promised. The loss of mmseg adds float32's epsilon to its number of pixels,
# 1e-11 of it, which halves with the batch; each step with this rate multiplies
# that, so that the fourth gradient was 1e-10 off on one machine and 1.6e-9 on
# another. In float32 they are up to 9e-7.
CLOSE = 1e-7


def start(command):
    """Run a command with several ranks, of one thread each."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    env = dict(
        os.environ, OMP_NUM_THREADS='1', PYTHON=sys.executable, PORT=port)
    env['PYTHONPATH'] = os.pathsep.join([HERE, ROOT])
    command = [c.format(port=port) for c in command]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def dist_train(cfg, ranks, *args):
    """tools/dist_train.sh on a file, as a user types it."""
    path = cfg.work_dir + '.py'
    cfg.dump(path)
    start([
        'bash',
        osp.join(ROOT, 'tools', 'dist_train.sh'), path,
        str(ranks), '--no-validate', *args
    ])


def seen(work_dir, rank=0):
    """What RecordHook wrote."""
    return torch.load(osp.join(work_dir, f'rank{rank}.pth'))


def alone(cfg):
    """A run in this process."""
    build_runner(cfg).train()
    return seen(cfg.work_dir)


def gap(a, b):
    """The largest difference, relative to the largest entry of its tensor, or
    to 1e-3 where that is smaller."""
    assert set(a) == set(b)
    return max(
        float((v - b[k]).abs().max() / v.abs().max().clamp(min=1e-3))
        for k, v in a.items() if v.is_floating_point())


def off(a, b):
    """The same for gradients, by the norms of tensors, or a hundredth of the
    norm of all of them where that is more: sums that cancel have few bits."""
    assert set(a) == set(b)
    whole = torch.stack([v.norm() for v in a.values()]).norm()
    return max(
        float((v - b[k]).norm() / v.norm().clamp(min=whole / 100))
        for k, v in a.items())


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope='module')
def start_at(tmp_path_factory):
    """The checkpoint that all runs begin with."""
    folder = tmp_path_factory.mktemp('start')
    return dist_parts.write_start(str(folder / 'start.pth'))


@pytest.fixture
def config(start_at, tmp_path):
    """Config of a run in a folder of this test."""

    def of(batch_size, name='run', **changes):
        return dist_parts.config(
            tmp_path / name, batch_size, load_from=start_at, **changes)

    return of


@pytest.fixture(scope='module')
def one(start_at, tmp_path_factory):
    """Four steps with four samples each, in one process."""
    folder = tmp_path_factory.mktemp('one')
    found = alone(dist_parts.config(folder / 'run', 4, load_from=start_at))
    assert len(found['gradients']) == 4
    still = [
        k for k in found['trained']
        if torch.equal(found['first'][k], found['weights'][k])
    ]
    assert not still
    return found


@pytest.mark.parametrize('ranks', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equal_to_one_process(one, config, ranks):
    """The same gradients and weights with the same batch in total."""
    cfg = config(4 // ranks)
    dist_train(cfg, ranks)
    for rank in range(ranks):
        many = seen(cfg.work_dir, rank)
        # Each rank has other samples.
        assert many['losses'] != one['losses']
        assert gap(one['weights'], many['weights']) <= CLOSE
        assert len(many['gradients']) == 4
        for a, b in zip(one['gradients'], many['gradients']):
            assert set(a) == set(one['trained'])
            assert off(a, b) <= CLOSE
        # Momentum of what trains, and of nothing else.
        assert many['with_state'] == many['trained'] == one['trained']
        assert many['deltas'] == ([] if rank else ['iter_4_delta.safetensors'])
    saved = torch.load(
        osp.join(cfg.work_dir, 'iter_4.pth'), weights_only=False)
    assert len(saved['optimizer']['state']) == len(one['trained'])
    assert equal(saved['state_dict'], many['weights'])


@pytest.fixture(scope='module')
def featured(start_at, tmp_path_factory):
    """FEATURES on two ranks."""
    folder = tmp_path_factory.mktemp('features')
    start([
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
        '--master_port={port}',
        osp.join(HERE, 'dist_parts.py'),
        str(folder), start_at
    ])

    def of(name):
        error = folder / name / 'error.txt'
        if error.exists():
            pytest.fail(error.read_text()[-3000:])
        return seen(folder / name, 0), seen(folder / name, 1)

    of.folder = folder
    return of


def test_accumulation(featured, config):
    """As in one process; and twice four samples are one step with eight."""
    single = alone(config(4, **dist_parts.FEATURES['accumulation']))
    large = alone(config(8, 'large', **{'train_cfg.max_iters': 2}))
    for many in featured('accumulation'):
        assert len(many['losses']) == 4
        assert len(many['gradients']) == len(large['gradients']) == 2
        for a, b, c in zip(many['gradients'], single['gradients'],
                           large['gradients']):
            assert off(b, a) <= CLOSE and off(c, a) <= CLOSE
        assert gap(single['weights'], many['weights']) <= CLOSE
        assert gap(large['weights'], many['weights']) <= CLOSE


def test_checkpointed_activations(one, featured):
    for many in featured('with_cp'):
        assert many['with_cp'] and not one['with_cp']
        assert gap(one['weights'], many['weights']) <= CLOSE


def test_averages(featured, config):
    single = alone(config(4, **dist_parts.FEATURES['ema']))
    name = 'decode_head.conv_seg.weight'
    average = single['averages'][f'module.{name}']
    assert gap({0: single['weights'][name]}, {0: average}) > 1e-3
    for many in featured('ema'):
        assert gap(single['averages'], many['averages']) <= CLOSE
        assert gap(single['weights'], many['weights']) <= CLOSE


def test_supernet(featured, config):
    """The same subnet on all ranks, and gradients of zero where it has no
    part: there is no find_unused_parameters."""
    single = alone(config(4, **dist_parts.FEATURES['supernet']))
    zeros = [[n for n, g in grads.items() if not g.any()]
             for grads in single['gradients']]
    assert any(zeros) and len(set(map(str, zeros))) > 1
    for many in featured('supernet'):
        assert gap(single['weights'], many['weights']) <= CLOSE
        for a, b in zip(single['gradients'], many['gradients']):
            assert off(a, b) <= CLOSE
        assert many['with_state'] == many['trained']


def test_bfloat16(one, featured, config):
    """Products are rounded to 8 bits on each rank, before the mean over
    ranks: the first gradients differ by less than one rounding, 2 ** -8, in
    the norm, and what four steps move weights by, by less than four."""
    rounded = alone(config(4, **dist_parts.FEATURES['bfloat16']))
    assert gap(one['weights'], rounded['weights']) > 1e-4  # it did round

    def flat(tensors):
        return torch.cat([tensors[k].flatten() for k in one['trained']])

    def error(a, b):
        return (a - b).norm() / a.norm()

    for many in featured('bfloat16'):
        gradients = [flat(f['gradients'][0]) for f in (rounded, many)]
        assert error(*gradients) <= 2**-8
        moved = [
            flat(f['weights']) - flat(f['first']) for f in (rounded, many)
        ]
        assert error(*moved) <= 4 * 2**-8


def sharded(name, featured):
    """What a run with FSDP wrote, if this torch has it for a CPU."""
    error = featured.folder / name / 'error.txt'
    if error.exists() and 'Stream() takes no arguments' in error.read_text():
        pytest.skip('FSDP of this torch needs a GPU, for its streams')
    return featured(name)


def test_fsdp_keeps_no_delta_alone(featured):
    with pytest.raises(
            pytest.fail.Exception,
            match="keep='delta' needs whole parameters"):
        sharded('fsdp_delta', featured)


def test_fsdp(one, featured, config, tmp_path):
    """The shards of two ranks, put together, are the weights of one process.

    No delta is written from shards, but one can be taken from the checkpoint.
    """
    shards = sharded('fsdp', featured)
    path = str(featured.folder / 'fsdp' / 'iter_4.pth')
    saved = torch.load(path, weights_only=False)
    assert gap(one['weights'], saved['state_dict']) <= CLOSE
    # Of every parameter that trains a part on some rank, of the frozen none.
    states = [set(s['with_state']) for s in shards]
    assert states[0] | states[1] == set(one['trained'])
    assert set(saved['optimizer']['state']) == set(one['trained'])
    assert [s['deltas'] for s in shards] == [[], []]
    delta = str(tmp_path / 'run_delta.safetensors')
    cfg = config(4)
    cfg.dump(str(tmp_path / 'config.py'))
    extract_delta(
        Namespace(
            config=str(tmp_path / 'config.py'),
            checkpoint=path,
            out=delta,
            method=None,
            at=None,
            cfg_options=[],
            force=False))
    tensors, _ = read_delta(delta)
    assert set(one['trained']) <= set(tensors)
    assert all(
        torch.equal(v, saved['state_dict'][k]) for k, v in tensors.items())


def test_resume(config, tmp_path):
    """Each rank goes on with its own random numbers: what dropout drops
    differs between ranks, and is what it is in the run that did not stop."""

    def dropping(name):
        method = 'Mona:dim=4,drop_rate=0.5+LoRA:rank=4'
        cfg = config(2, name, **{'model.backbone.method': method})
        cfg.model.type = 'EncoderDecoder'
        cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=.01)
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler')
        cfg.randomness = dict(seed=0, diff_rank_seed=True)
        cfg.default_hooks.checkpoint.interval = 2
        return cfg

    dist_train(dropping('whole'), 2)
    boundary = str(tmp_path / 'whole' / 'iter_2.pth')
    dist_train(dropping('rest'), 2, '--resume', boundary)
    states = torch.load(boundary, weights_only=False)['peft_randomness']
    assert len(states) == 2
    assert not torch.equal(states[0]['torch'], states[1]['torch'])
    ends = [
        torch.load(tmp_path / name / 'iter_4.pth', weights_only=False)
        for name in ('whole', 'rest')
    ]
    for rank in range(2):
        whole, rest = (seen(tmp_path / n, rank) for n in ('whole', 'rest'))
        assert rest['losses'] == whole['losses'][2:]
        assert equal(whole['weights'], rest['weights'])
        assert torch.equal(*(e['peft_randomness'][rank]['torch']
                             for e in ends))
    assert seen(tmp_path / 'whole', 0)['losses'] != whole['losses']
    moments = [e['optimizer']['state'] for e in ends]
    assert all(equal(v, moments[1][k]) for k, v in moments[0].items())
    deltas = [
        read_delta(str(tmp_path / name / 'iter_4_delta.safetensors'))[0]
        for name in ('whole', 'rest')
    ]
    assert equal(*deltas)


def test_detector(tmp_path):
    """Mask R-CNN on the embedded shapes; losses differ between ranks, and
    weights do not."""
    pytest.importorskip('mmdet')
    data = ensure_shapes(
        tmp_path / 'shapes',
        dict(source_train=1, source_val=1, target_train=8, target_val=1))
    cfg = Config.fromfile(
        mmpeft.config_path('mona/mask-rcnn_swin-nano_shapes.py'))
    cfg.merge_from_dict(
        dict(
            work_dir=str(tmp_path / 'run'),
            model=dict(backbone=dict(init_cfg=None, allow_random_base=True)),
            train_dataloader=dict(
                batch_size=2, dataset=dict(data_root=str(data))),
            train_cfg=dict(max_epochs=1, val_interval=1),
            custom_hooks=[dict(type='RecordHook')]))
    cfg.custom_imports.imports = ['mmpeft', 'dist_parts']
    dist_train(cfg, 2)
    first, second = seen(cfg.work_dir, 0), seen(cfg.work_dir, 1)
    for found in (first, second):
        assert len(found['losses']) == 2
        assert torch.tensor(found['losses']).isfinite().all()
    assert first['losses'] != second['losses']
    assert equal(first['weights'], second['weights'])
    assert not equal(first['first'], first['weights'])
    tensors, _ = read_delta(
        osp.join(cfg.work_dir, 'epoch_1_delta.safetensors'))
    assert equal({k: first['weights'][k] for k in tensors}, tensors)
