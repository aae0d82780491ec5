"""Checkpoints with the names of the released Mona repository."""

import pytest
import torch
from commands import run_tool
from conftest import peft_cfg, perturb
from mmengine.registry import MODELS

from mmpeft.errors import PEFTError
from mmpeft.key_styles import reorder
from mmpeft.released import convert_released, method_of

# As its classes have them (swin_transformer_*.py of the released code), by
# what is attached.
BOTTLENECK = [
    f'{p}.{q}' for p in ('project1', 'project2') for q in ('weight', 'bias')
]
MONA = [
    *BOTTLENECK, 'norm.weight', 'norm.bias', 'gamma', 'gammax',
    *(f'adapter_conv.{c}.{q}' for c in ('conv1', 'conv2', 'conv3', 'projector')
      for q in ('weight', 'bias'))
]
ADDED = {
    'Mona:dim=4': [f'my_module_{i}.{k}' for i in (1, 2) for k in MONA],
    'Adapter:dim=4':
    [f'my_module_{i}.{k}' for i in (1, 2) for k in BOTTLENECK],
    'AdaptFormer:dim=4': [f'my_module_1.{k}' for k in BOTTLENECK],
    'LoRA:rank=4': ['attn.qkv.lora_A', 'attn.qkv.lora_B'],
    'BitFit': [],
}
STOCK = [
    *(f'{m}.{q}' for m in ('norm1', 'norm2', 'attn.qkv', 'attn.proj',
                           'mlp.fc1', 'mlp.fc2') for q in ('weight', 'bias')),
    'attn.relative_position_bias_table', 'attn.relative_position_index'
]


def released_keys(method):
    """Names in a checkpoint of a Swin of two stages with two blocks each."""
    keys = [
        f'patch_embed.{m}.{q}' for m in ('proj', 'norm')
        for q in ('weight', 'bias')
    ]
    keys += [
        f'layers.{s}.blocks.{b}.{k}' for s in (0, 1) for b in (0, 1)
        for k in STOCK + ADDED[method]
    ]
    keys += [
        f'layers.0.downsample.{k}'
        for k in ('reduction.weight', 'norm.weight', 'norm.bias')
    ]
    keys += [f'norm{i}.{q}' for i in (0, 1) for q in ('weight', 'bias')]
    return [f'backbone.{k}' for k in keys]


def released(method):
    """Such a checkpoint, its values those of our model; and the model."""
    pytest.importorskip('mmdet')
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        dict(
            backbone=perturb(MODELS.build(peft_cfg('mmdet', method)), only=''),
            bbox_head=torch.nn.Linear(4, 2)))
    ours = model.state_dict()
    names = {k: None for k in released_keys(method)}
    # The order of the tensors of a module is the same in both.
    found, _ = convert_released(
        {k: torch.zeros(4, 8)
         for k in [*names, 'bbox_head.weight']})
    assert set(found) <= set(ours), sorted(set(found) - set(ours))
    back = dict(zip(found, [*names, 'bbox_head.weight']))
    state = {}
    for new, old in back.items():
        value = ours[new].clone()
        if '.downsample.' in old:
            value = reorder(value, to_unfold=False)
        state[old] = value
    state['bbox_head.bias'] = ours['bbox_head.bias'].clone()
    state['backbone.layers.0.blocks.1.attn_mask'] = torch.zeros(1)
    return state, model


@pytest.mark.parametrize('method', ADDED)
def test_every_key_and_value(method):
    state, model = released(method)
    name = method.split(':')[0]
    assert method_of(state) == (name if ADDED[method] else 'stock')
    found, report = convert_released(state)
    own = model.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(v, own[k]) for k, v in found.items())
    assert report.dropped == ['backbone.layers.0.blocks.1.attn_mask']
    assert 'bbox_head.weight' in report.kept
    assert len(report.renamed) + len(report.kept) + 1 == len(state)
    model.load_state_dict(found, strict=True)


def test_refusals():
    state, _ = released('Mona:dim=4')
    with pytest.raises(PEFTError, match='my_module_3'):
        convert_released(
            dict(state,
                 **{'backbone.layers.0.blocks.0.my_module_3.x':
                    torch.ones(1)}))
    with pytest.raises(PEFTError, match='no checkpoint of the released Mona'):
        convert_released({'conv.weight': torch.ones(1)})


def test_command(tmp_path):
    state, model = released('LoRA:rank=4')
    torch.save(
        dict(meta=dict(epoch=12, CLASSES=['a']), state_dict=state),
        tmp_path / 'in.pth')
    done = run_tool('convert_checkpoint.py', tmp_path / 'in.pth',
                    tmp_path / 'out.pth', '--from', 'mona')
    assert done.returncode == 0, done.stderr
    # The released scale is 1 / 64, and not our default of 1.
    assert 'mona, LoRA:rank=64,alpha=1 to mm-swin' in done.stdout
    written = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert written['meta'] == dict(epoch=12)
    model.load_state_dict(written['state_dict'], strict=True)
    done = run_tool('convert_checkpoint.py', tmp_path / 'in.pth',
                    tmp_path / 'other.pth')
    assert done.returncode == 2 and '--from mona' in done.stderr
