import copy
import math

import pytest
import torch
import torch.nn as nn

from mmpeft.errors import PEFTError
from mmpeft.methods import FacTTK, FacTTT
from mmpeft.sites import Site
from . import reference as ref
from .checks import check_module, check_released_module
from .recorded import fill, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained
from .test_lora_merge import check_merge

DTYPES = (torch.float32, torch.float64)
SITES = ('qkv', 'proj', 'fc1', 'fc2')
BOTH = [('FacTTT', {}), ('FacTTK', {}), ('FacTTK', dict(interleave=True))]


class Bound(nn.Module):
    """One module with the factors that it shares."""

    def __init__(self, cls, place, **kwargs):
        super().__init__()
        self.factors = cls.build_shared([place], **kwargs)
        self.fact = cls(place, **kwargs)
        self.fact.bind_shared(self.factors)

    def forward(self, x, y, layout=NO_LAYOUT):
        return self.fact(x, y, layout)


def core_of(p, name, slice_, rank, interleave):
    """(r out, r in) of one slice, entry by entry."""
    if 'fact.core' in p:
        rows = slice(slice_ * rank, slice_ * rank + rank)
        core = p['fact.core']
        return core[:, rows] if name == 'fc2' else core[rows]
    core, columns = p['factors.stage0.core'], p['fact.columns']
    result = [[None] * rank for _ in range(rank)]
    for out in range(rank):
        for in_ in range(rank):
            a, b, column = in_, out, slice_
            if interleave and name in ('fc1', 'fc2'):
                # The released reshape: position among the slices' channels.
                flat = slice_ * rank + (in_ if name == 'fc2' else out)
                a, b, column = in_, flat // 4, flat % 4
                if name == 'fc2':
                    a = out
            result[out][in_] = (core[a, b] * columns[:, column]).sum()
    return torch.stack([torch.stack(row) for row in result])


def update(x, p, name, dims, rank, scale, interleave=False):
    """What is added to the output of one linear layer, slice by slice."""
    u, v = p['factors.stage0.u'], p['factors.stage0.v']
    count = dict(qkv=3, proj=1, fc1=4, fc2=4)[name]
    cores = [core_of(p, name, i, rank, interleave) for i in range(count)]
    if name == 'fc2':
        parts = x.split(dims, dim=-1)
        low = sum(part @ u.t() @ c.t() for part, c in zip(parts, cores))
        return scale * low @ v.t()
    return torch.cat([scale * x @ u.t() @ c.t() @ v.t() for c in cores], -1)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', SITES)
@pytest.mark.parametrize('cls,extra', [(FacTTT, {}), (FacTTK, {}),
                                       (FacTTK, dict(interleave=True))])
def test_formula(cls, extra, name, dtype):
    place = site(name, 12)
    module = Bound(cls, place, rank=4, scale=.5, drop_rate=0., **extra)

    def formula(x, y, p):
        return y + update(x, p, name, 12, 4, .5, **extra)

    check_module(module, formula, tensor('x', 2, 7, place.in_dims),
                 tensor('y', 2, 7, place.out_dims), NO_LAYOUT, dtype)


def released_block(cls, dims, rank, **kwargs):
    """The stock layers of a ViT block, frozen, and what belongs to them."""
    kwargs.update(rank=rank, scale=.5, drop_rate=0.)
    places = {name: site(name, dims) for name in SITES}
    block = nn.Module()
    block.factors = cls.build_shared(list(places.values()), **kwargs)
    block.fact = nn.ModuleDict({
        n: cls(place, **kwargs)
        for n, place in places.items()
    })
    for name, place in places.items():
        block.fact[name].bind_shared(block.factors)
        layer = nn.Linear(place.in_dims, place.out_dims)
        block.add_module(name, layer.requires_grad_(False))
    return block


def run_released(block, x):
    """Global attention with two heads, then the MLP; no norms, no skips."""

    def layer(name, x):
        return block.fact[name](x, block.get_submodule(name)(x), NO_LAYOUT)

    heads = [
        t.unflatten(-1, (2, -1)).transpose(1, 2)
        for t in layer('qkv', x).chunk(3, dim=-1)
    ]
    scores = heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(12)
    out = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    return layer('fc2', ref.gelu(layer('fc1', layer('proj', out))))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case,cls,kwargs',
                         [('fact_tt', FacTTT, {}),
                          ('fact_tk', FacTTK, dict(interleave=True))])
def test_released_block(case, cls, kwargs, dtype):
    block = released_block(cls, 24, 4, **kwargs)
    check_released_module(f'released_{case}', block, run_released, (2, 15, 24),
                          dtype)


def test_released_code_mixes_the_slices_of_the_mlp():
    for name in SITES:
        place = site(name, 12)
        plain, mixed = (
            Bound(FacTTK, place, rank=4, interleave=i) for i in (False, True))
        fill(plain)
        fill(mixed)
        same = torch.equal(*(b.fact.matrix(torch.float32)
                             for b in (plain, mixed)))
        assert same == (name in ('qkv', 'proj'))


@pytest.mark.parametrize('type_,extra', BOTH)
def test_starts_at_the_identity(type_, extra):
    backbone = swin('mmdet', dict(type=type_, rank=4, **extra))
    stock = swin('mmdet')
    stock.load_state_dict(backbone.state_dict(), strict=False)
    image = tensor('image', 2, 3, 36, 28, dtype=torch.float32)
    backbone.eval(), stock.eval()
    for a, b in zip(backbone(image), stock(image)):
        assert torch.equal(a, b)


def test_init_is_that_of_the_released_code():
    torch.manual_seed(0)
    backbone = swin('mmdet', dict(type='FacTTK', rank=8))
    factors = backbone.peft.fact_tk
    assert list(factors) == ['stage0', 'stage1']
    # Xavier over P of the whole stage: two blocks with 12 columns each.
    assert factors['stage1'].num_slices == 24
    bound = math.sqrt(6 / (8 + 24))
    columns = backbone.stages[1].blocks[0].peft['fact_tk']['fc1'].columns
    assert columns.shape == (8, 4)
    assert .7 * bound < columns.abs().max() <= bound
    bound = math.sqrt(6 / (2 * 8 * 8))
    assert .9 * bound < factors['stage0'].core.abs().max() <= bound
    assert .8 / 4 < factors['stage0'].u.abs().max() <= 1 / 4
    assert (factors['stage0'].v == 0).all()
    module = Bound(FacTTT, site('fc2', 16), rank=4).fact
    assert module.core.shape == (4, 16)
    assert .7 / 4 < module.core.abs().max() <= 1 / 4


@pytest.mark.parametrize('mlp_ratio', [1, 2, 4])
def test_count(mlp_ratio):
    slices = 2 * (4 + 2 * mlp_ratio)
    for type_, expected in [
        ('FacTTT', sum(2 * d * 4 + slices * 4**2 for d in (16, 32))),
        ('FacTTK', sum(2 * d * 4 + 4**3 + slices * 4 for d in (16, 32))),
    ]:
        backbone = swin('mmdet', dict(type=type_, rank=4), mlp_ratio=mlp_ratio)
        assert sum(p.numel() for p in trained(backbone).values()) == expected


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('type_,extra', BOTH)
def test_merge(library, type_, extra):
    backbone = swin(library, dict(type=type_, rank=4, scale=.25, **extra))
    fill(backbone)
    backbone.eval()
    for size in [(36, 28), (33, 50)]:
        check_merge(library, backbone, size)


@pytest.mark.parametrize('type_,extra', BOTH)
def test_merge_with_another_mlp_ratio(type_, extra):
    module = Bound(
        dict(FacTTT=FacTTT, FacTTK=FacTTK)[type_],
        site('fc1', 12),
        rank=3,
        scale=.5,
        **extra)
    fill(module.double().eval())
    weight, bias = tensor('weight', 48, 12), tensor('bias', 48)
    merged, same = module.fact.merge(weight, bias)
    x = tensor('x', 5, 12)
    out = module(x, x @ weight.t() + bias)
    assert torch.allclose(out, x @ merged.t() + bias, atol=1e-12)
    assert same is bias


def test_a_stage_alone():
    backbone = swin('mmdet', dict(type='FacTTK', rank=4, layers='stage:1'))
    assert list(backbone.peft.fact_tk) == ['stage1']
    assert not any('stages.0' in n for n in trained(backbone))


def test_a_copy_has_factors_of_its_own():
    backbone = swin('mmdet', dict(type='FacTTT', rank=4))
    fill(backbone)
    twin = copy.deepcopy(backbone)
    module = twin.stages[0].blocks[0].peft['fact_tt']['fc1']
    assert module.shared is twin.peft.fact_tt
    assert module.shared is not backbone.peft.fact_tt
    assert not any('shared' in n for n, _ in backbone.named_parameters())


def test_dropout_acts_on_the_update_in_training_only():
    module = Bound(FacTTT, site('proj', 8), rank=4, drop_rate=.5)
    fill(module)
    x, y = (tensor(n, 2, 3, 8, dtype=torch.float32) for n in 'xy')
    assert not torch.equal(module(x, y), module(x, y))
    module.eval()
    assert torch.equal(module(x, y), module(x, y))


@pytest.mark.parametrize('type_', ['FacTTT', 'FacTTK'])
@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=0), 'rank must be a whole number'),
    (dict(rank=1.5), 'rank must be a whole number'),
    (dict(rank=17), 'rank=17 is larger than the width 16 of stage 0.*layers'),
    (dict(scale=0), 'scale must be'),
    (dict(drop_rate=1.), r'drop_rate .*\[0, 1\)'),
    (dict(alpha=1), "no argument 'alpha'"),
    (dict(overrides={'stage:1': dict(rank=8)}), 'shares weights.*overrides'),
])
def test_arguments(type_, kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type=type_, **dict(dict(rank=4), **kwargs)))


def test_rank_that_only_the_default_makes_too_large():
    with pytest.raises(PEFTError, match='FacTTK: rank=32 .* width 16'):
        swin('mmdet', 'FacTTK')


def test_mlp_that_cannot_be_cut_is_refused():
    for name, widths in dict(fc1=(16, 40), fc2=(40, 16)).items():
        with pytest.raises(PEFTError, match=f'{name} is .*: 40 is no multi'):
            FacTTT.build_shared([Site(name, *widths)])
