import json
import math
import os.path as osp
from random import Random

import pytest
import torch
import torch.nn as nn

from mmpeft.counting import count_params
from mmpeft.engine.subnets import SubnetSpace
from mmpeft.errors import PEFTError
from mmpeft.injection import inject
from mmpeft.merging import merged_state_dict
from mmpeft.methods.noah import NOAH
from mmpeft.sites import Site
from . import reference as ref
from .checks import (Half, _check_digests, check_block, check_close,
                     check_module)
from .recorded import DATA, fill, load, tensor
from .reference_prompts import attention
from .swins import NO_LAYOUT, site, swin

DTYPES = (torch.float32, torch.float64)
WIDE = dict(type='NOAH', num_tokens=6, rank=6, dim=6, drop_rate=0.)
CHOICES = dict(num_tokens=(1, 3, 6), rank=(1, 3, 6), dim=(1, 3, 6))


def vit(method, **kwargs):
    """timm's ViT, whose keys are those of the released model."""
    timm = pytest.importorskip('timm')
    kwargs = dict(
        dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3),
        **kwargs)
    model = timm.models.VisionTransformer(num_classes=0, **kwargs)
    return inject(model, method, allow_random_base=True)


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


@pytest.mark.parametrize('dtype', DTYPES)
def test_adapter(dtype):

    def formula(x, y, p):
        hidden = ref.linear(y, p['down.weight'], p['down.bias'])
        return y + ref.linear(quick_gelu(hidden), p['up.weight'], p['up.bias'])

    module = NOAH.build(site('ffn_add', 16), dim=4, drop_rate=0.)
    check_module(module, formula, tensor('x', 2, 15, 16),
                 tensor('y', 2, 15, 16), NO_LAYOUT, dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_lora(dtype):
    """A is shared by queries, keys and values, and there is no scale."""

    def formula(x, y, p):
        return y + x @ p['lora_A'].t() @ p['lora_B'].t()

    module = NOAH.build(site('qkv', 16), rank=4, drop_rate=0.)
    assert module.lora_A.shape == (4, 16) and module.lora_B.shape == (48, 4)
    check_module(module, formula, tensor('x', 2, 15, 16),
                 tensor('y', 2, 15, 48), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain'])
@pytest.mark.parametrize('drop_path_rate', [0., .5])
def test_block(library, drop_path_rate):
    """All three in a Swin block; drop-path ends before the adapter."""

    def block(x, p, _, mlp, drop):
        own = {k[len('peft.noah.'):]: v for k, v in p.items() if '.noah.' in k}
        prompts = ref.layer_norm(own['tokens.weight'], p['norm1.weight'],
                                 p['norm1.bias'])
        update = own['qkv.lora_B'] @ own['qkv.lora_A']
        key = 'attn.w_msa.qkv.weight'
        branch, _ = attention(
            x, (7, 5), {
                **p, key: p[key] + update
            },
            2,
            4,
            2,
            tokens=prompts.expand(len(x), -1, -1))
        x = x + drop(branch)
        y = drop(mlp(x))
        hidden = quick_gelu(
            ref.linear(y, own['ffn_add.down.weight'],
                       own['ffn_add.down.bias']))
        return x + y + ref.linear(hidden, own['ffn_add.up.weight'],
                                  own['ffn_add.up.bias'])

    check_block(library, dict(WIDE, num_tokens=3, rank=4, dim=4), block,
                drop_path_rate)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_subnet(dtype):
    """A subnet of the released supernet: outputs, and the gradients of the
    supernet's weights."""
    recorded = load('released_noah')
    outs, grads = (1e-5, 1e-4) if dtype is torch.float32 else (2e-7, 2e-7)
    model = vit(
        dict(type='NOAH', num_tokens=10, rank=10, dim=10, drop_rate=0.))
    fill(model.to(dtype))
    space = SubnetSpace(
        model, dict.fromkeys(('num_tokens', 'rank', 'dim'), range(1, 6)))
    space.activate(((3, 5, 1), (2, 4, 5), (5, 1, 3)))
    for block in model.blocks:
        block.drop_path1 = block.drop_path2 = Half()
    image = tensor('image', 2, 3, 32, 32, dtype=dtype).requires_grad_()
    out = model.train().forward_features(image)[:, 0]
    (out * tensor('weight', 2, 24, dtype=dtype)).sum().backward()
    check_close(out, recorded['out'], outs, 'output')
    check_close(image.grad, recorded['grad_x'], grads, 'gradient of x')
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    _check_digests(recorded, found, grads)


def cut(wide, narrow):
    """Give a model of fixed widths the first part of each weight."""
    state = wide.state_dict()
    for name, value in narrow.state_dict(keep_vars=True).items():
        whole = state[name]
        assert name in state
        value.data.copy_(whole[tuple(slice(n) for n in value.shape)])


def fixed(space, subnet, method=WIDE):
    """The method of a subnet, as the search writes it."""
    overrides = {
        str(i): widths
        for i, widths in space.by_block(subnet).items() if any(widths.values())
    }
    return dict(method, num_tokens=0, rank=0, dim=0, overrides=overrides)


SUBNETS = [
    ((1, 3, 6, 0), (6, 6, 1, 3), (3, 1, 0, 0)),
    ((0, 0, 0, 0), (3, 0, 0, 0), (6, 6, 6, 6)),
    ((6, 6, 6, 6), (0, 0, 0, 0), (0, 0, 0, 0)),
    ((3, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0)),
]


@pytest.mark.parametrize('make,image', [
    (lambda m: swin('mmdet', m), (36, 28)),
    (lambda m: vit(m, depth=4), (32, 32)),
])
@pytest.mark.parametrize('subnet', SUBNETS)
def test_a_subnet_is_the_supernet_at_its_widths(make, image, subnet):
    """Outputs, gradients of what it has, and zeros, not none, for the rest:
    what DistributedDataParallel needs."""
    wide = make(WIDE).double()
    fill(wide)
    space = SubnetSpace(wide, CHOICES)
    narrow = make(fixed(space, subnet)).double()
    cut(wide, narrow)
    space.activate(subnet)
    added = sum(p.numel() for p in narrow.parameters() if p.requires_grad)
    assert count_params(narrow)['backbone_added'] == added
    assert space.count(subnet) == added
    grads, outs = [], []
    for model in (wide, narrow):
        out = model.train()(tensor('image', 2, 3, *image))
        outs.append([out] if torch.is_tensor(out) else list(out))
        sum((o * tensor(f'weight {i}', *o.shape)).sum()
            for i, o in enumerate(outs[-1])).backward()
        grads.append({
            n: p.grad
            for n, p in model.named_parameters() if p.requires_grad
        })
    for ours, theirs in zip(*outs):
        check_close(ours, theirs, 1e-12, 'output')
    for name, grad in grads[0].items():
        assert grad is not None, name
        own = grads[1].get(name)
        if own is None:
            assert not grad.any(), name
            continue
        inside = tuple(slice(n) for n in own.shape)
        check_close(grad[inside], own, 1e-11, name)
        rest = grad.clone()
        rest[inside] = 0
        assert not rest.any(), name


def published():
    with open(osp.join(DATA, 'noah_subnets.json')) as file:
        return json.load(file)


def vit_b(method):
    with torch.device('meta'):
        return vit(
            method,
            img_size=224,
            patch_size=16,
            embed_dim=768,
            depth=12,
            num_heads=12)


def test_published_subnets():
    """The 19 of VTAB-1k; V-PETL Bench prints the largest, .43 M."""
    space = SubnetSpace(
        vit_b('NOAH'), dict.fromkeys(('num_tokens', 'rank', 'dim'),
                                     (1, 5, 10)))
    counts = {}
    for name, subnet in published().items():
        subnet = tuple(map(tuple, subnet))
        counts[name] = space.count(subnet)
        prompts, rank, dim = (sum(widths) for widths in subnet)
        assert counts[name] == 768 * prompts + 4 * 768 * rank + \
            (2 * 768 + 1) * dim + 12 * 768
    assert len(counts) == 19
    assert min(counts.values()) == counts['sun397'] == 287_278
    assert max(counts.values()) == counts['svhn'] == 431_686
    assert round(sum(counts.values()) / 19) == 360_134
    for name in ('caltech101', 'kitti'):
        subnet = tuple(map(tuple, published()[name]))
        built = count_params(vit_b(fixed(space, subnet, dict(type='NOAH'))))
        assert built['backbone_trainable'] == counts[name]


def test_start():
    """As each class of the released code starts; B = 0."""
    torch.manual_seed(0)
    prompts = NOAH.build(Site('tokens', 96, 96), num_tokens=100)
    bound = math.sqrt(6 / (101 * 96))
    assert .99 < float(prompts.weight.data.abs().max()) / bound <= 1
    lora = NOAH.build(site('qkv', 96), rank=20)
    assert not lora.lora_B.any()
    assert .99 < float(lora.lora_A.data.abs().max()) * math.sqrt(96) <= 1
    adapter = NOAH.build(site('ffn_add', 96), dim=20)
    for linear in (adapter.down, adapter.up):
        bound = math.sqrt(6 / 116)
        assert .99 < float(linear.weight.data.abs().max()) / bound <= 1
        assert 0 < linear.bias.abs().max() < 1e-5


def test_dropout():
    """Of prompt entries, of what enters A, behind the activation."""
    torch.manual_seed(0)
    prompts = NOAH.build(Site('tokens', 16, 16), drop_rate=.5).train()
    out = prompts(torch.zeros(50, 4, 16), torch.zeros(50, 0, 16), NO_LAYOUT)
    kept = out[out != 0]
    assert .4 < kept.numel() / out.numel() < .6
    lora = NOAH.build(site('qkv', 16), drop_rate=.5).train()
    nn.init.ones_(lora.lora_A), nn.init.ones_(lora.lora_B)
    out = lora(torch.ones(400, 16), torch.zeros(400, 48), NO_LAYOUT)
    assert set((out[:, 0] / 20).round(decimals=4).tolist()) <= set(range(17))
    adapter = NOAH.build(site('ffn_add', 16), dim=4, drop_rate=.5).train()
    nn.init.zeros_(adapter.down.weight), nn.init.ones_(adapter.down.bias)
    nn.init.ones_(adapter.up.weight), nn.init.zeros_(adapter.up.bias)
    out = adapter(torch.zeros(400, 16), torch.zeros(400, 16), NO_LAYOUT)
    steps = out[:, 0] / (2 * torch.sigmoid(torch.tensor(1.702)))
    assert set(steps.round(decimals=4).tolist()) == set(range(5))
    for module in (prompts, lora, adapter):
        assert module.eval().dropout(torch.ones(3)).eq(1).all()


def test_lora_alone_merges():
    backbone = swin('mmdet', dict(WIDE, num_tokens=0, dim=0))
    stock = swin('mmdet')
    fill(backbone)
    SubnetSpace(backbone, CHOICES).activate(((1, 3, 6, 6), ))
    stock.load_state_dict(merged_state_dict(backbone))
    image = tensor('image', 2, 3, 36, 28, dtype=torch.float32)
    backbone.eval(), stock.eval()
    for a, b in zip(backbone(image), stock(image)):
        check_close(a, b, 1e-5, 'output')


def test_blocks_may_have_nothing():
    method = dict(
        type='NOAH',
        num_tokens=0,
        rank=0,
        dim=0,
        overrides={'1': dict(rank=2)})
    backbone = swin('mmdet', method)
    names = [n for n, p in backbone.named_parameters() if p.requires_grad]
    assert names == [f'stages.0.blocks.1.peft.noah.qkv.lora_{x}' for x in 'AB']
    assert not getattr(backbone.stages[0].blocks[0], 'peft', {})


@pytest.mark.parametrize('method,said', [
    ('NOAH:num_tokens=0,rank=0,dim=0', 'nothing to attach'),
    ('NOAH:rank=17', 'rank=17 is larger than the width 16'),
    ('NOAH:dim=-1', 'dim must be a whole number'),
    ('NOAH:num_tokens=None', 'num_tokens must be a whole number'),
    ('NOAH:num_tokens=False', 'num_tokens must be a whole number'),
    ('NOAH:dim=2.5', 'dim must be a whole number'),
    ('NOAH:drop_rate=1', 'drop_rate must be a number in'),
    ('NOAH:width=3', "no argument 'width'"),
])
def test_wrong_arguments(method, said):
    with pytest.raises(PEFTError, match=said):
        swin('mmdet', method)


@pytest.mark.parametrize('choices,depths,said', [
    (dict(CHOICES, rank=(1, 7)), None, r'rank=\[1, 7\] must be .* the 6 '),
    (dict(CHOICES, rank=(0, 1)), None, 'whole numbers above 0'),
    (dict(CHOICES, dim=()), None, r'dim=\[\] must be'),
    (CHOICES, (1, 5), 'from 0 to 4'),
    (CHOICES, (), 'from 0 to 4'),
])
def test_wrong_spaces(choices, depths, said):
    with pytest.raises(PEFTError, match=said):
        SubnetSpace(swin('mmdet', WIDE), choices, depths)


def test_no_space_without_noah():
    with pytest.raises(PEFTError, match='There is no NOAH'):
        SubnetSpace(swin('mmdet', 'LoRA:rank=2'), CHOICES)


def test_space():
    space = SubnetSpace(swin('mmdet', WIDE), CHOICES)
    assert space.depths == [[1, 2, 3, 4]] * 3
    assert space.kinds == ['num_tokens', 'rank', 'dim']
    assert space.smallest() == ((1, 0, 0, 0), ) * 3
    assert space.largest() == ((6, ) * 4, ) * 3
    rng, seen = Random(0), set()
    for _ in range(400):
        subnet = space.sample(rng)
        seen |= {(k, i, w)
                 for k, widths in enumerate(subnet)
                 for i, w in enumerate(widths)}
        other = space.mutate(subnet, rng, .2, .4)
        child = space.cross(subnet, other, rng)
        for each in (subnet, other, child):
            for widths in each:
                depth = sum(w > 0 for w in widths)
                assert depth > 0 and not any(widths[depth:])
                assert set(widths[:depth]) <= {1, 3, 6}
        assert all(c in pair for c, *pair in zip(child, subnet, other))
    # Everything is drawn; the first block always has something.
    assert seen == {(k, i, w)
                    for k in range(3)
                    for i in range(4)
                    for w in (0, 1, 3, 6) if i or w}
    assert space.mutate(subnet, rng, 0., 0.) == subnet
    widths = SubnetSpace(swin('mmdet', WIDE), CHOICES, [2]).sample(rng)
    assert all(w[1] and not w[2] for w in widths)
