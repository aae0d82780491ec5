import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmpeft.errors import PEFTError
from mmpeft.methods import DoRA
from mmpeft.sites import Site
from .checks import check_block, check_module, check_released_module
from .recorded import fill, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained
from .test_lora import DTYPES, LAYERS, update
from .test_lora_merge import ALL, check_merge


def bound(name, dims, bias=True, dtype=torch.float64, **kwargs):
    """A module with a stock layer of its own."""
    place = site(name, dims)
    layer = nn.Linear(place.in_dims, place.out_dims, bias=bias)
    fill(layer)
    module = DoRA(place, **kwargs)
    module.bind_layer(layer.to(dtype).requires_grad_(False))
    with torch.no_grad():
        module.start_from_layer()
    return module


def gains(p, weight, targets, rank, scale, prefix=''):
    """``m / |V|`` of each row, 1 where it is no target."""
    v = weight + update(p, targets, rank, scale, prefix)
    names = 'qkv' if targets[0] in 'qkv' else targets
    rows = weight.shape[0] // len(names)
    magnitudes = iter(p[prefix + 'magnitude'].split(rows))
    found = []
    for name, part in zip(names, v.split(rows)):
        # A constant for the gradient.
        length = torch.sqrt((part * part).sum(1)).detach()
        found.append(
            next(magnitudes) / length if name in targets else length / length)
    return torch.cat(found)


def weights(p, weight, targets, rank, scale, prefix=''):
    """``m V / |V|`` of one layer, rows that are no target as they are."""
    v = weight + update(p, targets, rank, scale, prefix)
    return gains(p, weight, targets, rank, scale, prefix)[:, None] * v


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name,targets,shape', [
    ('qkv', ('q', 'v'), (2, 15)),
    ('qkv', ('v', 'q', 'k'), (2, 15)),
    ('qkv', ('k', 'proj'), (3, 5)),
    ('proj', ('proj', ), (2, 15)),
    ('fc1', ('fc1', ), (4, 2, 3)),
    ('fc2', ('fc2', ), (2, 7)),
])
def test_formula(name, targets, shape, bias, dtype):
    """Any y, so that what other methods made of it is seen to be scaled."""
    module = bound(name, 8, bias, dtype, rank=3, alpha=6, targets=targets)
    weight = module.layer.weight.double()
    offset = module.layer.bias.double() if bias else 0.
    own = [t for t in targets if t in 'qkv'] or targets

    def formula(x, y, p):
        low = torch.matmul(x, update(p, own, 3, 2.).t())
        gain = gains(p, weight, own, 3, 2.)
        return gain * (y - offset + low) + offset

    place = site(name, 8)
    check_module(module, formula, tensor('x', *shape, place.in_dims),
                 tensor('y', *shape, place.out_dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('bias', [True, False])
def test_is_the_decomposed_weight(bias):
    """On the layer's own output it is one linear layer with the weight of
    the paper, and the bias stays."""
    module = bound('qkv', 8, bias, rank=3, targets=['q', 'v'])
    fill(module)
    module.double()
    layer, p = module.layer, dict(module.named_parameters())
    x = tensor('x', 2, 5, 8)
    expected = F.linear(x, weights(p, layer.weight, ('q', 'v'), 3, 1.),
                        layer.bias)
    found = module(x, layer(x), NO_LAYOUT)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('targets', [('q', 'v'), ALL])
def test_inside_the_linear_layers(library, targets):
    qkv = tuple(t for t in 'qkv' if t in targets)
    sites = dict({t: (t, ) for t in targets if t not in 'qkv'}, qkv=qkv)

    def block(x, p, attention, mlp, drop):
        p = dict(p)
        for name, own in sites.items():
            key = f'{LAYERS[name]}.weight'
            p[key] = weights(p, p[key].detach(), own, 3, 1.,
                             f'peft.dora.{name}.')
        x = x + drop(attention(x, p))
        return x + drop(mlp(x, p))

    check_block(library, dict(type='DoRA', rank=3, targets=targets), block, .5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):

    class Layer(nn.Module):

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(
                torch.empty(10, 12), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(10))
            dora = DoRA(Site('fc1', 12, 10), rank=4, alpha=6, targets=['fc1'])
            dora.bind_layer(self)
            # Under names of its own, as the module is no child.
            self.lora_A, self.lora_B = dora.lora_A, dora.lora_B
            self.magnitude = dora.magnitude
            self.dora = (dora, )

        def forward(self, x):
            return self.dora[0](x, F.linear(x, self.weight, self.bias),
                                NO_LAYOUT)

    check_released_module('released_dora', Layer(), lambda m, x: m(x),
                          (2, 15, 12), dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_starts_at_the_identity_bit_for_bit(dtype):
    module = bound('qkv', 16, rank=4, dtype=dtype).to(dtype)
    with torch.no_grad():
        module.start_from_layer()
    x, y = tensor(
        'x', 2, 5, 16, dtype=dtype), tensor(
            'y', 2, 5, 48, dtype=dtype)
    assert torch.equal(module(x, y, NO_LAYOUT), y)
    v = module.layer.weight[32:].double()
    torch.testing.assert_close(module.magnitude[16:].double(), v.norm(dim=1))


@pytest.mark.parametrize('library', LIBRARIES)
def test_magnitude_follows_the_weights_that_are_loaded(library):
    backbone, other = swin(library, dict(type='DoRA', rank=3)), swin(library)
    fill(other)
    backbone.load_state_dict(other.state_dict(), strict=False)
    backbone.eval()
    # stock eval() returns None in some of the libraries
    other.eval()
    image = tensor('image', 2, 3, 36, 28, dtype=torch.float32)
    for found, expected in zip(backbone(image), other(image)):
        assert torch.equal(found, expected)
    weight = other.state_dict()['stages.1.blocks.0.attn.w_msa.qkv.weight']
    own = backbone.stages[1].blocks[0].peft['dora']['qkv'].magnitude
    torch.testing.assert_close(own[32:], weight[64:].norm(dim=1))


def test_magnitude_of_a_checkpoint_is_kept():
    backbone = swin('mmdet', dict(type='DoRA', rank=3))
    fill(backbone)
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    fresh = swin('mmdet', dict(type='DoRA', rank=3))
    fresh.load_state_dict(state)
    fresh(tensor('image', 1, 3, 36, 28, dtype=torch.float32))
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_keeps_half_precision():
    module = bound('qkv', 16, rank=4, dtype=torch.float32)
    fill(module)
    x, y = (tensor(n, 2, 5, c, dtype=torch.float32)
            for n, c in (('x', 16), ('y', 48)))
    exact = module(x, y, NO_LAYOUT)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = module(x.bfloat16(), y.bfloat16(), NO_LAYOUT)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < .03 * exact.abs().max()


def test_count():
    backbone = swin('mmdet', dict(type='DoRA', rank=3))
    # 4 r d + 2 d in each of two blocks of two stages.
    expected = sum(2 * (4 * 3 * d + 2 * d) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


@pytest.mark.parametrize('targets', [('q', 'v'), ALL])
@pytest.mark.parametrize('library,size', [('mmdet', (33, 50)),
                                          ('mmseg', (36, 28)),
                                          ('mmpretrain', (64, 64))])
def test_merge(library, targets, size):
    backbone = swin(library, dict(type='DoRA', rank=3, targets=targets))
    fill(backbone)
    backbone.eval()
    check_merge(library, backbone, size)


@pytest.mark.parametrize('methods', [
    ['LoRA:rank=3,targets=[q,k]', 'IA3', 'DoRA:rank=3,targets=[k,v,fc2]'],
    ['DoRA:rank=3,targets=[k,v,fc2]', 'IA3', 'LoRA:rank=3,targets=[q,k]'],
])
def test_merge_in_the_order_of_the_list(methods):
    backbone = swin('mmdet', methods)
    fill(backbone)
    backbone.eval()
    check_merge('mmdet', backbone)


def test_dropout_acts_on_the_update_in_training_only():
    module = bound('proj', 8, rank=4, targets=['proj'], drop_rate=.5)
    fill(module)
    module.double()
    x, y = (tensor(n, 2, 3, 8) for n in 'xy')
    assert not torch.equal(module(x, y, NO_LAYOUT), module(x, y, NO_LAYOUT))
    module.eval()
    assert torch.equal(module(x, y, NO_LAYOUT), module(x, y, NO_LAYOUT))


@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=17), 'DoRA: rank=17 is larger than the width 16'),
    (dict(alpha=0), 'DoRA: alpha must be'),
    (dict(targets=['w']), 'DoRA: targets=.*at least one of q, k, v'),
    (dict(init='pissa'), "DoRA has no argument 'init'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='DoRA', **dict(dict(rank=3), **kwargs)))
