"""The commands about deltas, on files of a real run."""
import json
from argparse import Namespace

import pytest
import torch

pytest.importorskip('mmseg')

import segmentor  # noqa: E402
from commands import run_tool  # noqa: E402

from mmpeft.delta_file import read_delta  # noqa: E402
from mmpeft.engine.checkpoint import write_checkpoint  # noqa: E402
from mmpeft.engine.convert import convert_checkpoint  # noqa: E402
from mmpeft.errors import PEFTError  # noqa: E402


def tool(name, *args, code=0):
    done = run_tool(name, *args)
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder of a run with a config file, checkpoints and deltas."""
    folder = tmp_path_factory.mktemp('run')
    segmentor.write_base(str(folder / 'base.pth'))
    cfg = segmentor.config(
        'LoRA:rank=4',
        str(folder),
        iters=2,
        init_cfg=dict(type='Pretrained', checkpoint=str(folder / 'base.pth')))
    cfg.custom_imports = dict(imports=['mmpeft', 'segmentor'])
    cfg.default_hooks.peft_checkpoint = dict(type='mmpeft.PEFTCheckpointHook')
    loader = cfg.train_dataloader.to_dict()
    cfg.val_dataloader = cfg.test_dataloader = dict(loader, batch_size=1)
    cfg.val_cfg, cfg.test_cfg = dict(), dict()
    cfg.val_evaluator = cfg.test_evaluator = dict(
        type='IoUMetric', iou_metrics=['mIoU'])
    cfg.dump(str(folder / 'config.py'))
    segmentor.train(cfg)
    return folder


def test_extract_gives_what_the_hook_wrote(trained, tmp_path):
    out = tmp_path / 'x_delta.safetensors'
    done = tool('extract_peft.py', trained / 'config.py',
                trained / 'iter_2.pth', out)
    assert 'tensors' in done.stdout
    mine, header = read_delta(str(out))
    theirs, other = read_delta(str(trained / 'iter_2_delta.safetensors'))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], v) for k, v in theirs.items())
    assert header.base == other.base
    assert header.meta == other.meta
    again = tool(
        'extract_peft.py',
        trained / 'config.py',
        trained / 'iter_2.pth',
        out,
        code=2)
    assert 'exists already' in again.stderr


def test_inspect(trained):
    file = trained / 'iter_2_delta.safetensors'
    about, = json.loads(tool('inspect_peft.py', file, '--json').stdout)
    assert about['backbones']['backbone']['method'][0]['rank'] == 4
    assert about['parts']['lora']['tensors'] == 2 * 4
    text = tool('inspect_peft.py', file).stdout
    assert 'LoRA(' in text and about['base']['fingerprint'] in text
    assert 'base.pth' in text and "'a', 'b', 'c'" in text
    wrong = tool('inspect_peft.py', trained / 'iter_2.pth', code=2)
    assert 'is a pickle and no safetensors' in wrong.stderr


def test_no_delta_is_converted(trained, tmp_path):
    """It has few weights of a backbone, and names of its own."""
    out = tmp_path / 'x.pth'
    with pytest.raises(PEFTError, match='is a delta, .*convert its base'):
        convert_checkpoint(
            Namespace(
                checkpoint=str(trained / 'iter_2_delta.safetensors'),
                out=str(out),
                force=False,
                source=None,
                to='mm-swin'))
    assert not out.exists()


@pytest.mark.parametrize('kind', ['full', 'delta', 'merged'])
def test_test_takes_all_three(trained, kind):
    """And finds the same."""
    file = trained / 'iter_2.pth'
    if kind == 'delta':
        file = trained / 'iter_2_delta.safetensors'
    elif kind == 'merged':
        file = trained / 'merged.pth'
        tool('merge_peft.py', trained / 'config.py', trained / 'iter_2.pth',
             file)
    tool('test.py', trained / 'config.py', file, '--work-dir', trained / kind)
    scores = json.load(open(next((trained / kind).glob('*/*.json'))))
    assert scores['mIoU'] > 0
    reference = trained / 'scores.json'
    if reference.exists():
        expected = json.load(open(reference))
        assert scores['mIoU'] == pytest.approx(expected['mIoU'], abs=.02)
    else:
        reference.write_text(json.dumps(scores))


def test_merge_takes_a_delta(trained, tmp_path):
    """From its recorded base, or from the one that is given."""
    config, file = trained / 'config.py', trained / 'iter_2_delta.safetensors'
    tool('merge_peft.py', config, trained / 'iter_2.pth', tmp_path / 'a.pth')
    tool('merge_peft.py', config, file, tmp_path / 'b.pth')
    away = tmp_path / 'elsewhere.pth'
    (trained / 'base.pth').rename(away)
    try:
        done = tool('merge_peft.py', config, file, tmp_path / 'c.pth', code=2)
        assert 'Give that file with --base' in done.stderr
        assert not (tmp_path / 'c.pth').exists()
        state = torch.load(away)['state_dict']
        write_checkpoint(
            dict(state_dict={
                f'backbone.{k}': v
                for k, v in state.items()
            }), str(away))
        tool('merge_peft.py', config, file, tmp_path / 'c.pth', '--base', away)
        write_checkpoint(dict(state_dict=state), str(away))
    finally:
        away.rename(trained / 'base.pth')
    one, two, three = (
        torch.load(tmp_path / f'{n}.pth')['state_dict'] for n in 'abc')
    assert one.keys() == two.keys() == three.keys()
    assert all(
        torch.equal(v, two[k]) and torch.equal(v, three[k])
        for k, v in one.items())
