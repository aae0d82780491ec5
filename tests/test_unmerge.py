"""Merged weights, taken apart again with the delta and its base."""
import copy
from argparse import Namespace

import pytest
import torch
import torch.nn as nn
from commands import run_tool
from conftest import METHODS, build_pair, perturb

import mmpeft
from mmpeft.engine.checkpoint import write_checkpoint
from mmpeft.engine.merge import unmerge_checkpoint
from mmpeft.errors import MergeError, PEFTError


class Model(nn.Module):
    """A backbone with a head that trains."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        torch.manual_seed(3)
        self.head = nn.Linear(32, 3)


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def trained(name):
    """Base as a state dict, a model that trained on it, and a fresh one."""
    pytest.importorskip('mmdet')
    stock, peft = build_pair('mmdet', METHODS[name])
    _, fresh = build_pair('mmdet', METHODS[name])
    peft = Model(perturb(peft))
    with torch.no_grad():
        peft.head.weight.add_(1)
        for parameter in fresh.parameters():
            parameter.zero_()
    return Model(stock).state_dict(), peft, Model(fresh)


@pytest.mark.parametrize('name',
                         ['LoRA', 'SSF', 'RepAdapter', 'FacTTK', 'BitFit'])
def test_gives_back_base_and_delta(name, tmp_path):
    base, peft, fresh = trained(name)
    files = [str(tmp_path / n) for n in ('x_delta.safetensors', 'base.pth')]
    mmpeft.save_delta(peft, files[0])
    write_checkpoint(dict(state_dict=base), files[1])
    whole = copy.deepcopy(peft.state_dict())
    merged = mmpeft.merge(peft).state_dict()
    assert mmpeft.unmerge(fresh, merged, *files) is fresh
    assert equal(fresh.state_dict(), whole)
    # Without a file, from what the model holds.
    fresh.state_dict()['head.weight'].zero_()
    assert equal(mmpeft.unmerge(fresh, merged, files[0]).state_dict(), whole)


def test_refusals_leave_the_model_alone(tmp_path):
    base, peft, fresh = trained('LoRA')
    files = [str(tmp_path / n) for n in ('x_delta.safetensors', 'base.pth')]
    mmpeft.save_delta(peft, files[0])
    write_checkpoint(dict(state_dict=base), files[1])
    merged = mmpeft.merged_state_dict(peft)
    before = copy.deepcopy(fresh.state_dict())
    loaded = set(fresh.backbone.peft.loaded)
    key = 'backbone.stages.0.blocks.1.attn.w_msa.qkv.weight'
    other = {**merged, key: merged[key] * (1 + 1e-6)}
    less = {k: v for k, v in merged.items() if k != 'head.bias'}
    odd = {**merged, 'head.bias': 3}
    for state, match in (
        (other, f'1 of .* tensors differ, such as .{key}'),
        (less, "such as 'head.bias'"),
        (odd, "such as 'head.bias'"),
        (base, 'tensors differ'),
    ):
        with pytest.raises(MergeError, match=match):
            mmpeft.unmerge(fresh, state, *files)
        assert equal(fresh.state_dict(), before)
    assert fresh.backbone.peft.loaded == loaded
    with pytest.raises(PEFTError, match='another base.*with --base'):
        mmpeft.unmerge(fresh, merged, files[0])
    base[key] = base[key].clone()
    base[key].view(-1)[5].add_(1e-3)
    write_checkpoint(dict(state_dict=base), files[1])
    with pytest.raises(PEFTError, match='another base'):
        mmpeft.unmerge(fresh, merged, *files)
    assert equal(fresh.state_dict(), before)


def test_rounded_otherwise_on_another_machine(tmp_path):
    """A last bit of a merged weight is no reason to refuse."""
    base, peft, fresh = trained('LoRA')
    files = [str(tmp_path / n) for n in ('x_delta.safetensors', 'base.pth')]
    mmpeft.save_delta(peft, files[0])
    write_checkpoint(dict(state_dict=base), files[1])
    merged = mmpeft.merged_state_dict(peft)
    key = 'backbone.stages.0.blocks.1.attn.w_msa.qkv.weight'
    value = merged[key].clone()
    value[0, 0] = torch.nextafter(value[0, 0], torch.tensor(9.))
    mmpeft.unmerge(fresh, {**merged, key: value}, *files)
    assert equal(fresh.state_dict(), peft.state_dict())


def test_command(tmp_path):
    """A merged file is a full checkpoint again."""
    pytest.importorskip('mmseg')
    import mmseg.models  # noqa: F401
    import segmentor
    from mmengine.registry import MODELS
    cfg = segmentor.config('LoRA:rank=4', str(tmp_path))
    cfg.custom_imports = dict(imports=['mmpeft', 'segmentor'])
    cfg.dump(str(tmp_path / 'config.py'))
    model = MODELS.build(dict(cfg.model, _scope_='mmseg'))
    base = {
        k: v
        for k, v in model.state_dict().items() if '.peft.' not in f'.{k}'
    }
    write_checkpoint(
        dict(state_dict=copy.deepcopy(base)), str(tmp_path / 'base.pth'))
    perturb(model)
    source = dict(checkpoint=str(tmp_path / 'base.pth'), at='', prefix='')
    mmpeft.save_delta(model, str(tmp_path / 'x_delta.safetensors'), [source])
    write_checkpoint(
        dict(
            state_dict=mmpeft.merged_state_dict(model),
            meta=dict(epoch=3, dataset_meta=dict(classes=('a', )))),
        str(tmp_path / 'merged.pth'))
    merged, out, delta = (
        str(tmp_path / n)
        for n in ('merged.pth', 'out.pth', 'x_delta.safetensors'))
    done = run_tool('merge_peft.py', tmp_path / 'config.py', merged, out,
                    '--unmerge', delta)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / 'out.pth')
    assert equal(found['state_dict'], model.state_dict())
    assert found['meta']['epoch'] == 3
    assert 'LoRA' in found['meta']['cfg']
    args = Namespace(
        out=delta, force=True, checkpoint=merged, unmerge=delta, base=None)
    with pytest.raises(PEFTError, match='never a file that is read'):
        unmerge_checkpoint(args)
