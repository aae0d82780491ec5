"""What holds for the merged weights of every method that merges."""
import copy

import pytest
import torch
from conftest import METHODS, build_pair, method_of, perturb
from kinds import KINDS

from mmpeft.errors import MergeError
from mmpeft.merging import merged_state_dict
from mmpeft.methods.base import PEFTModule
from mmpeft.state import attached_modules

MERGED = [
    n for n in METHODS
    if issubclass(method_of(n), PEFTModule) and method_of(n).no_merge is None
]


def trained(kind, name):
    pytest.importorskip(KINDS[kind].library)
    return perturb(build_pair(kind, METHODS[name])[1])


@pytest.mark.parametrize('kind,dtype', [('mmdet', torch.float32),
                                        ('mmdet', torch.float16),
                                        ('mmdet', torch.bfloat16),
                                        ('vit', torch.bfloat16),
                                        ('beit', torch.bfloat16)])
@pytest.mark.parametrize('name', MERGED)
def test_rounded_once(name, kind, dtype):
    """Equal to what float64 gives, in the type of the model."""
    peft = trained(kind, name).to(dtype)
    base = {k: v.clone() for k, v in peft.state_dict().items()}
    merged = merged_state_dict(peft)
    exact = merged_state_dict(copy.deepcopy(peft).double())
    changed = 0
    for key, value in merged.items():
        if value.is_floating_point():
            assert value.dtype == dtype
            assert torch.equal(value, exact[key].to(dtype)), key
        changed += not torch.equal(value, base[key])
    assert changed
    for key, value in peft.state_dict().items():
        assert torch.equal(value, base[key]), key


@pytest.mark.parametrize('value', [float('nan'), float('-inf')])
@pytest.mark.parametrize('name', MERGED)
def test_numbers_that_are_not_finite(name, value):
    """Are refused, with the name of the tensor."""
    peft = trained('mmdet', name)
    module = attached_modules(peft)[-1]
    count = 0
    for owner in (module, *module._shared):
        for leaf, tensor in owner.state_dict().items():
            if not tensor.is_floating_point():
                continue
            kept = tensor.clone()
            tensor.view(-1)[-1] = value
            with pytest.raises(MergeError, match=f'{leaf} of .* not finite'):
                merged_state_dict(peft)
            tensor.copy_(kept)
            count += 1
    assert count and merged_state_dict(peft)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['LoRA', 'LNTune'])
def test_stock_numbers_that_are_not_finite(name, value):
    peft = trained('mmdet', name)
    key = 'stages.1.blocks.0.norm2.weight'
    peft.get_parameter(key).data[3] = value
    with pytest.raises(MergeError, match=f'^{key} has values that are not'):
        merged_state_dict(peft)


def test_infinite_masks_are_no_fault():
    peft = trained('mmdet', 'LoRA')
    peft.stages[0].register_buffer('mask', torch.tensor([0., -float('inf')]))
    assert 'stages.0.mask' in merged_state_dict(peft)
    peft.stages[0].mask[0] = float('nan')
    with pytest.raises(MergeError, match='^stages.0.mask has values'):
        merged_state_dict(peft)
