import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmpeft.errors import PEFTError
from mmpeft.methods import VeRA
from mmpeft.sites import Site
from .checks import check_block, check_module, check_released_module
from .recorded import fill, load, tensor, value
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained
from .test_lora import DTYPES, LAYERS
from .test_lora_merge import ALL, check_merge


def bound(place, dtype=torch.float64, **kwargs):
    """A module with an owner of its own, filled by the rule."""
    module = VeRA(place, **kwargs)
    module.bind_shared(VeRA.build_shared([place], **kwargs).to(dtype))
    return module


def update(pair, d, b):
    """``diag(b) B diag(d) A``"""
    down, up = pair
    return torch.diag(b) @ up @ torch.diag(d) @ down


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name,targets', [
    ('qkv', ('q', 'v')),
    ('qkv', ('v', 'k', 'q')),
    ('qkv', ('k', 'fc1')),
    ('proj', ('proj', )),
    ('fc1', ('fc1', )),
    ('fc2', ('fc2', )),
])
def test_formula(name, targets, dtype):
    """The rank may be larger than the width."""
    place = site(name, 8)
    module = bound(place, dtype, rank=20, targets=targets)
    rows = 8 if name == 'qkv' else place.out_dims
    shape = f'{rows}x{place.in_dims}'
    pair = [getattr(module.shared, f'{f}_{shape}').double() for f in 'AB']
    own = [t for t in 'qkv' if t in targets] if name == 'qkv' else [name]

    def formula(x, y, p):
        found = {
            t: update(pair, d, b)
            for t, d, b in zip(own, p['lambda_d'].split(20),
                               p['lambda_b'].split(rows))
        }
        if name != 'qkv':
            return y + x @ found[name].t()
        zero = torch.zeros(8, 8).double()
        whole = torch.cat([found.get(t, zero) for t in 'qkv'])
        return y + x @ whole.t()

    check_module(module, formula, tensor('x', 2, 5, place.in_dims),
                 tensor('y', 2, 5, place.out_dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('projection', ['shape', 'largest'])
@pytest.mark.parametrize('library', LIBRARIES)
def test_inside_the_linear_layers(library, projection):
    shapes = dict(qkv=(16, 16), proj=(16, 16), fc1=(64, 16), fc2=(16, 64))
    pairs = {}
    for rows, dims in set(shapes.values()):
        place = Site('fc1', dims, rows)
        owner = VeRA.build_shared([place], rank=20, targets=['fc1'])
        pairs[rows, dims] = [f.double() for f in owner.pair(rows, dims)]
    if projection == 'largest':
        owner = VeRA.build_shared([Site('fc1', 64, 64)],
                                  rank=20,
                                  targets=['fc1'])
        down, up = (f.double() for f in owner.pair(64, 64))
        pairs = {(r, d): (down[:, :d], up[:r]) for r, d in pairs}

    def block(x, p, attention, mlp, drop):
        p = dict(p)
        for name, layer in LAYERS.items():
            d, b = (p[f'peft.vera.{name}.lambda_{v}'] for v in 'db')
            rows = shapes[name][0]
            change = [
                update(pairs[shapes[name]], *part)
                for part in zip(d.split(20), b.split(rows))
            ]
            key = f'{layer}.weight'
            p[key] = p[key] + torch.cat(change)
        x = x + drop(attention(x, p))
        return x + drop(mlp(x, p))

    # The pairs belong to the backbone, whose precision stays.
    check_block(
        library,
        dict(type='VeRA', rank=20, targets=ALL, projection=projection),
        block,
        .25,
        dtype=torch.float32)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    """A layer that is smaller than the pair, which is cut."""

    class Layer(nn.Module):

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(
                torch.empty(10, 12), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(10))
            place = Site('fc1', 12, 10)
            kwargs = dict(rank=20, targets=['fc1'], projection='largest')
            vera = VeRA(place, **kwargs)
            owner = VeRA.build_shared([place, Site('fc1', 16, 14)], **kwargs)
            for name, buffer in owner.named_buffers():
                buffer.copy_(torch.from_numpy(value(name[0], buffer.shape)))
            if dtype is torch.float64:
                owner.double()
                for name, buffer in owner.named_buffers():
                    buffer.copy_(
                        torch.from_numpy(value(name[0], buffer.shape)))
            vera.bind_shared(owner)
            self.lambda_d, self.lambda_b = vera.lambda_d, vera.lambda_b
            self.vera = (vera, )

        def forward(self, x):
            return self.vera[0](x, F.linear(x, self.weight, self.bias),
                                NO_LAYOUT)

    check_released_module('released_vera', Layer(), lambda m, x: m(x),
                          (2, 15, 12), dtype)


def test_released_projection():
    """The numbers that the released code draws for a seed."""
    recorded = load('released_vera_projection')
    owner = VeRA.build_shared(
        [site('proj', 16), site('fc1', 8)],
        rank=20,
        targets=['proj', 'fc1'],
        projection='largest',
        projection_prng_key=7)
    assert {
        n: tuple(b.shape)
        for n, b in owner.named_buffers()
    } == {
        'A_32x16': (20, 16),
        'B_32x16': (32, 20)
    }
    for name, buffer in owner.named_buffers():
        assert (buffer.numpy() == recorded[name[0]]).all()


def test_starts_at_the_identity():
    module = bound(site('qkv', 16), torch.float32, rank=20)
    x = tensor('x', 2, 5, 16, dtype=torch.float32)
    y = tensor('y', 2, 5, 48, dtype=torch.float32)
    assert torch.equal(module(x, y, NO_LAYOUT), y)
    assert (module.lambda_d == .1).all() and (module.lambda_b == 0).all()
    for factor in module.shared.buffers():
        bound_ = math.sqrt(6 / factor.shape[1])
        assert .8 * bound_ < factor.abs().max() <= bound_


def test_one_pair_for_each_shape():
    backbone = swin('mmdet', dict(type='VeRA', rank=20, targets=ALL))
    # Both stages of 16 and 32 channels.
    shapes = ['16x16', '64x16', '16x64', '32x32', '128x32', '32x128']
    keys = [k for k in backbone.state_dict() if k.startswith('peft.vera.')]
    assert sorted(keys) == sorted(f'peft.vera.{f}_{s}' for f in 'AB'
                                  for s in shapes)
    backbone = swin(
        'mmdet', dict(type='VeRA', rank=20, targets=ALL, projection='largest'))
    keys = [k for k in backbone.state_dict() if k.startswith('peft.vera.')]
    assert sorted(keys) == ['peft.vera.A_128x128', 'peft.vera.B_128x128']


def test_pairs_come_from_the_seed_alone():
    first = swin('mmdet', dict(type='VeRA', rank=20)).state_dict()
    torch.manual_seed(5)
    backbone = swin('mmdet', dict(type='VeRA', rank=20))
    backbone.init_weights()
    other = swin('mmdet', dict(type='VeRA', rank=20,
                               projection_prng_key=1)).state_dict()
    for key, pair in backbone.state_dict().items():
        if key.startswith('peft.vera.'):
            assert torch.equal(first[key], pair)
            assert not torch.equal(other[key], pair)


def test_a_copy_has_pairs_of_its_own():
    backbone = swin('mmdet', dict(type='VeRA', rank=20))
    twin = copy.deepcopy(backbone)
    owner = twin.peft.vera
    assert twin.stages[0].blocks[0].peft['vera']['qkv'].shared is owner
    assert owner is not backbone.peft.vera


def test_keeps_half_precision():
    module = bound(site('qkv', 16), torch.float32, rank=20)
    fill(module)
    x, y = (tensor(n, 2, 5, c, dtype=torch.float32).bfloat16()
            for n, c in (('x', 16), ('y', 48)))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert module(x, y, NO_LAYOUT).dtype == torch.bfloat16


def test_count():
    backbone = swin('mmdet', dict(type='VeRA', rank=20))
    expected = sum(2 * 2 * (20 + d) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


@pytest.mark.parametrize('projection', ['shape', 'largest'])
@pytest.mark.parametrize('library,size', [('mmdet', (33, 50)),
                                          ('mmseg', (36, 28)),
                                          ('mmpretrain', (64, 64))])
def test_merge(library, projection, size):
    backbone = swin(
        library,
        dict(type='VeRA', rank=20, targets=ALL, projection=projection))
    fill(backbone)
    backbone.eval()
    check_merge(library, backbone, size)


def test_dropout_acts_on_the_update_in_training_only():
    module = bound(site('proj', 8), rank=4, targets=['proj'], drop_rate=.5)
    fill(module)
    module.double()
    x, y = (tensor(n, 2, 3, 8) for n in 'xy')
    assert not torch.equal(module(x, y, NO_LAYOUT), module(x, y, NO_LAYOUT))
    module.eval()
    assert torch.equal(module(x, y, NO_LAYOUT), module(x, y, NO_LAYOUT))


@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=0), 'VeRA: rank must be a whole number'),
    (dict(rank='r'), 'VeRA: rank must be a whole number'),
    (dict(targets=['w']), 'VeRA: targets=.*at least one of q, k, v'),
    (dict(d_init=0), 'VeRA: d_init must be a number other than 0'),
    (dict(d_init='.1'), 'VeRA: d_init must be a number'),
    (dict(projection='max'), "unknown projection 'max'; use .*largest"),
    (dict(projection_prng_key=.5), 'projection_prng_key must be a whole'),
    (dict(drop_rate=1.), r'drop_rate .*\[0, 1\)'),
    (dict(overrides={'stage:0': dict(rank=3)}), 'shares weights'),
    (dict(alpha=3), "VeRA has no argument 'alpha'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='VeRA', **dict(dict(rank=3), **kwargs)))
