import math

import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import VPTDeep, VPTShallow
from mmpeft.sites import Site
from . import reference as ref
from .checks import (_check_digests, check_block, check_close, check_gradients,
                     check_released_module)
from .recorded import digest, fill, load, tensor
from .reference_prompts import attention, merged_tokens
from .swins import LIBRARIES, NO_LAYOUT, swin, trained

DTYPES = (torch.float32, torch.float64)
DEEP = dict(type='VPTDeep', num_tokens=3)
SHALLOW = dict(type='VPTShallow', num_tokens=3)
HW, HEADS, WINDOW, SHIFT = (7, 5), 2, 4, 2


def place(name='tokens', dims=16, **kwargs):
    return Site(name, dims, dims, stem_dims=16, patch_size=4, **kwargs)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
def test_deep_prompts_join_every_window(library, norm, drop_path_rate):
    site = 'tokens' if norm else 'attn_tokens'

    def block(x, p, _, mlp, drop):
        prompts = p[f'peft.vpt_deep.{site}.prompts.weight']
        if norm:
            prompts = ref.layer_norm(prompts, p['norm1.weight'],
                                     p['norm1.bias'])
        branch, _ = attention(
            x,
            HW,
            p,
            HEADS,
            WINDOW,
            SHIFT,
            tokens=prompts.expand(len(x), -1, -1))
        x = x + drop(branch)
        return x + drop(mlp(x))

    check_block(library, dict(DEEP, norm=norm), block, drop_path_rate)


def deep_in_two(x, p, _, mlp, drop):
    prompts = torch.cat(
        [p[f'peft.{name}.tokens.prompts.weight'] for name in 'ab'])
    prompts = ref.layer_norm(prompts, p['norm1.weight'], p['norm1.bias'])
    branch, _ = attention(
        x, HW, p, HEADS, WINDOW, SHIFT, tokens=prompts.expand(len(x), -1, -1))
    x = x + drop(branch)
    return x + drop(mlp(x))


def test_prompts_of_two_methods_stand_together():
    check_block(
        'mmdet',
        [dict(DEEP, name='a'),
         dict(type='VPTDeep', num_tokens=2, name='b')], deep_in_two)


class DropPath(ref.SeededDropPath):
    """One stream of random numbers for blocks of different rates."""

    def at(self, rate):
        self.keep = 1 - rate
        return self if rate else lambda branch: branch


def shallow(backbone, image, prompts, rates, seed, dtype):
    """All blocks and outputs of a backbone with prompts that travel."""
    x, hw = backbone.patch_embed(image)
    drops, outs = DropPath(0., seed, dtype), []
    tokens = prompts.expand(len(x), -1, -1)
    count = tokens.shape[1]
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage.blocks):
            p = {n: v.detach().double() for n, v in block.named_parameters()}
            branch, seen = attention(
                x,
                hw,
                p,
                2 * 2**i,
                WINDOW,
                SHIFT * (j % 2),
                tokens=ref.layer_norm(tokens, p['norm1.weight'],
                                      p['norm1.bias']))
            # Tokens and map of a sample are dropped together.
            drop = drops.at(rates[2 * i + j])
            both = torch.cat([tokens, x], 1)
            both = both + drop(torch.cat([seen, branch], 1))
            both = both + drop(ref.mlp_branch(both, p))
            tokens, x = both[:, :count], both[:, count:]
        norm = getattr(backbone, f'norm{i}')
        out = ref.layer_norm(x, norm.weight, norm.bias)
        outs.append(out.transpose(1, 2).unflatten(2, hw))
        if i == 0:
            p = dict(stage.downsample.named_parameters())
            tokens = merged_tokens(tokens, p)
            x, hw = stage.downsample(x, hw)
    return outs


@pytest.mark.parametrize('library,drop_path_rate',
                         [('mmdet', 0.), ('mmdet', .5), ('mmseg', .5),
                          ('mmpretrain', .5)])
def test_shallow_prompts_go_through_all_blocks(library, drop_path_rate):
    backbone = swin(library, SHALLOW, drop_path_rate=drop_path_rate).double()
    fill(backbone)
    image, seed = tensor('image', 3, 3, 36, 28), 3
    stock = swin(library).double()
    fill(stock)
    prompts = backbone.peft.vpt_shallow.weight.detach().clone()
    prompts.requires_grad_()
    rates = torch.linspace(0, drop_path_rate, 4).tolist()
    torch.manual_seed(seed)
    outs = backbone(image)
    expected = shallow(stock, image, prompts, rates, seed, torch.float64)
    loss = 0.
    for i, (out, wanted) in enumerate(zip(outs, expected)):
        check_close(out, wanted, 1e-12, f'output {i}')
        weight = tensor(f'weight {i}', *out.shape)
        loss += (out * weight).sum()
        expected[i] = (wanted * weight).sum()
    loss.backward()
    sum(expected).backward()
    check_gradients(backbone, {'peft.vpt_shallow.weight': prompts},
                    torch.float64, 'VPTShallow')


@pytest.mark.parametrize('method', [SHALLOW, DEEP, dict(DEEP, norm=False)])
@pytest.mark.parametrize('size', [(36, 28), (33, 50), (64, 64)])
def test_samples_do_not_mix(method, size):
    """In the released Swin code, prompts of one sample join windows of
    another; there the first output below would move by a tenth."""
    backbone = swin('mmdet', method).double()
    fill(backbone)
    images = tensor('image', 3, 3, *size)
    others = torch.cat([images[:1], tensor('others', 2, 3, *size)])
    with torch.no_grad():
        outs, moved = backbone(images), backbone(others)
        alone = [backbone(image[None]) for image in images]
    for i, out in enumerate(outs):
        assert torch.equal(out[0], moved[i][0])
        assert not torch.allclose(out[1], moved[i][1])
        check_close(out, torch.cat([a[i] for a in alone]), 1e-12, 'alone')


@pytest.mark.parametrize('method', [SHALLOW, DEEP, dict(DEEP, norm=False)])
def test_prompts_take_part(method):
    backbone, stock = swin('mmdet', method), swin('mmdet')
    fill(backbone)
    fill(stock)
    image = tensor('image', 1, 3, 36, 28, dtype=torch.float32)
    for out, plain in zip(backbone(image), stock(image)):
        assert out.shape == plain.shape
        assert not torch.allclose(out, plain, atol=1e-3)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_dense_block(dtype):
    block = swin(
        'mmdet', dict(type='VPTDeep', num_tokens=5, norm=False),
        depths=(2, )).stages[0].blocks[1]
    check_released_module('released_vpt_dense', block, lambda m, x: m(x, HW),
                          (2, 35, 16), dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('method,batch', [(DEEP, 2), (SHALLOW, 1)])
def test_released_backbone(method, batch, dtype):
    """Shallow with one sample, as the released code mixes them."""
    kind = method['type'][3:].lower()
    recorded = load(f'released_vpt_{kind}_swin')
    tolerance, grads = (1e-5, 1e-4) if dtype is torch.float32 else (2e-7, 2e-7)
    backbone = swin(
        'mmdet',
        method,
        embed_dims=8,
        depths=(2, 2, 2, 1),
        num_heads=(1, 2, 4, 8))
    fill(backbone.to(dtype))
    loss = 0.
    outs = backbone(tensor('image', batch, 3, 128, 128, dtype=dtype))
    for i, out in enumerate(outs):
        check_close(
            digest(f'out{i}',
                   out.detach().numpy()), recorded[f'out{i}_digest'],
            tolerance, f'output {i}')
        loss += (out * tensor(f'weight {i}', *out.shape, dtype=dtype)).sum()
    check_close(outs[3][0], recorded['out3'], tolerance, 'output 3')
    loss.backward()
    _check_digests(recorded, {
        n: p.grad
        for n, p in trained(backbone).items()
    }, grads)


@pytest.mark.parametrize('stage,dims', [(0, 16), (1, 32)])
def test_every_stage_starts_from_the_bound_of_the_stem(stage, dims):
    backbone = swin('mmdet', dict(type='VPTDeep', num_tokens=50))
    backbone.init_weights()
    weight = backbone.stages[stage].blocks[
        0].peft.vpt_deep.tokens.prompts.weight
    assert weight.shape == (50, dims)
    bound = math.sqrt(6 / (3 * 4 * 4 + 16))
    assert .9 * bound < weight.abs().max() <= bound
    assert abs(weight.mean()) < .1 * bound


@pytest.mark.parametrize('layers,dims', [(None, 16), ('stage:1', 32)])
def test_shallow_prompts_have_the_width_of_the_first_block(layers, dims):
    kwargs = {} if layers is None else dict(layers=layers)
    backbone = swin('mmdet', dict(type='VPTShallow', **kwargs))
    backbone.init_weights()
    names = trained(backbone)
    assert list(names) == ['peft.vpt_shallow.weight']
    weight = names['peft.vpt_shallow.weight']
    assert weight.shape == (100, dims)
    bound = math.sqrt(6 / (3 * 4 * 4 + 16))
    assert .9 * bound < weight.abs().max() <= bound
    backbone(tensor('image', 2, 3, 36, 28, dtype=torch.float32))


@pytest.mark.parametrize('method,expected', [
    (DEEP, 2 * 3 * (16 + 32)),
    (dict(DEEP, norm=False), 2 * 3 * (16 + 32)),
    (dict(type='VPTDeep'), 2 * 50 * (16 + 32)),
    (SHALLOW, 3 * 16),
])
def test_count(method, expected):
    backbone = swin('mmdet', method)
    assert sum(p.numel() for p in trained(backbone).values()) == expected


@pytest.mark.parametrize('method', [DEEP, SHALLOW])
def test_checkpointing_changes_nothing(method):
    results = []
    for with_cp in (False, True):
        backbone = swin(
            'mmdet',
            dict(method, drop_rate=.3),
            drop_path_rate=.5,
            with_cp=with_cp).double()
        fill(backbone)
        torch.manual_seed(3)
        outs = backbone(tensor('image', 2, 3, 36, 28))
        sum((o * tensor(f'weight {i}', *o.shape)).sum()
            for i, o in enumerate(outs)).backward()
        results.append([*outs, *(p.grad for p in trained(backbone).values())])
    for plain, checkpointed in zip(*results):
        torch.testing.assert_close(plain, checkpointed)


def test_dropout_differs_between_samples_and_ends_with_training():
    module = VPTDeep(place(), num_tokens=4, drop_rate=.5)
    x, y = torch.zeros(3, 5, 16), torch.zeros(3, 0, 16)
    found = module(x, y, NO_LAYOUT)
    assert not torch.equal(found[0] == 0, found[1] == 0)
    module.eval()
    expected = module.prompts.weight.expand(3, -1, -1)
    assert torch.equal(module(x, y, NO_LAYOUT), expected)


def test_shallow_prompts_start_once():
    module = VPTShallow(place(), num_tokens=4)
    owner = VPTShallow.build_shared([place(index=1), place(index=0)], 4)
    module.bind_shared(owner)
    x, y = torch.zeros(3, 5, 16), torch.zeros(3, 0, 16)
    assert torch.equal(module(x, y, NO_LAYOUT), owner.weight.expand(3, -1, -1))
    carried = torch.ones(3, 4, 16)
    assert module(x, carried, NO_LAYOUT) is carried


@pytest.mark.parametrize('method', [DEEP, SHALLOW])
def test_merge_is_refused_with_a_reason(method):
    with pytest.raises(MergeError, match='VPT.*prompts are tokens'):
        merged_state_dict(swin('mmdet', method))


@pytest.mark.parametrize('type', ['VPTDeep', 'VPTShallow'])
@pytest.mark.parametrize('kwargs,message', [
    (dict(num_tokens=0), 'num_tokens must be a whole number'),
    (dict(num_tokens='5'), 'num_tokens must be a whole number'),
    (dict(drop_rate=1), r'drop_rate .*\[0, 1\)'),
    (dict(dim=4), "no argument 'dim'"),
])
def test_arguments(type, kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(dict(type=type), **kwargs))


@pytest.mark.parametrize('kwargs,message', [
    (dict(layers=[0, 1, 3]), r'leaves out block 2 of 0 to 3.*VPTDeep'),
    (dict(overrides={0: dict(num_tokens=5)}), 'cannot differ per block'),
])
def test_shallow_needs_every_block_alike(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(SHALLOW, **kwargs))
