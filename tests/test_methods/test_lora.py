import math

import pytest
import torch
import torch.nn.functional as F

from mmpeft.errors import PEFTError
from mmpeft.methods import LoRA
from .checks import (check_block, check_module, check_released_backbone,
                     check_released_module)
from .recorded import fill, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)
# Where each target lives in a stock block.
LAYERS = dict(
    qkv='attn.w_msa.qkv',
    proj='attn.w_msa.proj',
    fc1='ffn.layers.0.0',
    fc2='ffn.layers.1')


def update(p, targets, rank, scale, prefix=''):
    """``scale * B A`` of one layer, a block of rows for each target; zero
    rows for the parts of q, k, v that are no target."""
    down, up = p[prefix + 'lora_A'], p[prefix + 'lora_B']
    parts = [t for t in 'qkv' if t in targets] or list(targets)
    rows = up.shape[0] // len(parts)
    found = {}
    for i, part in enumerate(parts):
        low = down[i * rank:i * rank + rank]
        found[part] = scale * up[i * rows:i * rows + rows] @ low
    if parts[0] not in 'qkv':
        return found[parts[0]]
    zero = down.new_zeros(rows, down.shape[1])
    return torch.cat([found.get(part, zero) for part in 'qkv'])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name,dims,targets,shape', [
    ('qkv', 12, ('q', 'v'), (2, 15)),
    ('qkv', 12, ('v', 'q', 'k'), (2, 15)),
    ('qkv', 9, ('k', ), (3, 5)),
    ('qkv', 8, ('q', 'proj'), (1, 1)),
    ('proj', 12, ('proj', ), (2, 15)),
    ('fc1', 8, ('fc1', 'v'), (4, 2, 3)),
    ('fc2', 8, ('fc2', ), (2, 7)),
])
def test_formula(name, dims, targets, shape, dtype):
    place = site(name, dims)
    module = LoRA(place, rank=3, alpha=6, targets=targets)
    own = targets if name == 'qkv' else (name, )

    def formula(x, y, p):
        return y + torch.matmul(x, update(p, own, 3, 2.).t())

    check_module(module, formula, tensor('x', *shape, place.in_dims),
                 tensor('y', *shape, place.out_dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('kwargs,scale', [
    (dict(rank=4), 1.),
    (dict(rank=4, alpha=1), .25),
    (dict(rank=4, alpha=6.), 1.5),
    (dict(rank=4, rslora=True), 2.),
    (dict(rank=5, alpha=2, rslora=True), 2 / math.sqrt(5)),
])
def test_scale(kwargs, scale):
    module = LoRA(site('proj', 8), targets=['proj'], **kwargs)
    fill(module)
    x, y = (tensor(n, 2, 3, 8, dtype=torch.float32) for n in 'xy')
    expected = y + scale * x @ (module.lora_B @ module.lora_A).t()
    torch.testing.assert_close(module(x, y, NO_LAYOUT), expected)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('targets', [('q', 'v'), ('k', ),
                                     ('q', 'k', 'v', 'proj', 'fc1', 'fc2')])
def test_inside_the_linear_layers(library, targets):
    """Pad tokens get the update too: with a map that windows do not divide,
    an update outside the windows would differ."""
    qkv = [t for t in targets if t in 'qkv']
    sites = ['qkv'] * bool(qkv) + [t for t in targets if t not in qkv]

    def block(x, p, attention, mlp, drop):
        p = dict(p)
        for name in sites:
            own = qkv if name == 'qkv' else [name]
            weight = f'{LAYERS[name]}.weight'
            p[weight] = p[weight] + update(p, own, 3, 1., f'peft.lora.{name}.')
        x = x + drop(attention(x, p))
        return x + drop(mlp(x, p))

    check_block(library, dict(type='LoRA', rank=3, targets=targets), block,
                0.5)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('targets', ['qv', 'qkv'])
def test_released_module(targets, dtype):

    class Layer(torch.nn.Module):

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(
                torch.empty(36, 12), requires_grad=False)
            self.bias = torch.nn.Parameter(torch.empty(36))
            lora = LoRA(site('qkv', 12), 4, alpha=6, targets=list(targets))
            # Under the names of the released code.
            self.lora_A, self.lora_B = lora.lora_A, lora.lora_B
            self.lora = (lora, )

        def forward(self, x):
            return self.lora[0](x, F.linear(x, self.weight, self.bias),
                                NO_LAYOUT)

    layer = Layer()
    check_released_module(f'released_lora_{"_".join(targets)}', layer,
                          lambda m, x: m(x), (2, 15, 12), dtype)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_released_backbone(library, dtype):
    check_released_backbone(
        'released_lora_swin',
        library,
        dict(type='LoRA', rank=64, alpha=1),
        dtype,
        embed_dims=64)


def test_starts_at_the_identity():
    module = LoRA(site('qkv', 16), rank=4)
    x = tensor('x', 2, 5, 16, dtype=torch.float32)
    y = tensor('y', 2, 5, 48, dtype=torch.float32)
    assert torch.equal(module(x, y, NO_LAYOUT), y)
    assert (module.lora_B == 0).all()
    # Kaiming-uniform of each factor of its own.
    bound = 1 / 4
    for factor in module.lora_A.split(4):
        assert 0.8 * bound < factor.abs().max() <= bound


@pytest.mark.parametrize('targets,per_width', [
    (('q', 'v'), 4),
    (('q', 'k', 'v'), 6),
    (('proj', ), 2),
    (('fc1', ), 5),
    (('fc1', 'fc2', 'k'), 12),
])
def test_count(targets, per_width):
    backbone = swin('mmdet', dict(type='LoRA', rank=3, targets=targets))
    expected = sum(2 * per_width * 3 * d for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_dropout_acts_on_the_update_in_training_only():
    module = LoRA(site('proj', 8), 4, targets=['proj'], drop_rate=.5)
    fill(module)
    x, y = (tensor(n, 2, 3, 8, dtype=torch.float32) for n in 'xy')
    assert not torch.equal(module(x, y, NO_LAYOUT), module(x, y, NO_LAYOUT))
    module.eval()
    assert torch.equal(module(x, y, NO_LAYOUT), module(x, y, NO_LAYOUT))


def test_eval_changes_no_weight():
    """The released code merges on eval(), so that what a checkpoint holds
    depends on the mode it was saved in."""
    backbone = swin('mmdet', dict(type='LoRA', rank=3))
    fill(backbone)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.eval()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=0), 'rank must be a whole number'),
    (dict(rank=1.5), 'rank must be a whole number'),
    (dict(rank=17), 'rank=17 is larger than the width 16'),
    (dict(rank=17, targets=['fc1']), 'rank=17 is larger than the width 16'),
    (dict(alpha=0), 'alpha must be'),
    (dict(alpha='2r'), 'alpha must be'),
    (dict(targets=['q', 'w']), "targets=.*'w'.*at least one of q, k, v"),
    (dict(targets=[]), 'at least one of q, k, v'),
    (dict(targets='q'), 'must be a list'),
    (dict(targets=3), 'must be a list'),
    (dict(drop_rate=1.), r'drop_rate .*\[0, 1\)'),
    (dict(r=8), "no argument 'r'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='LoRA', **dict(dict(rank=3), **kwargs)))
