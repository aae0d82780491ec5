import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import PrefixTuning
from mmpeft.sites import Site
from . import reference as ref
from .checks import TOLERANCE, check_block, check_close, check_gradients
from .recorded import fill, tensor
from .reference_prompts import attention
from .swins import LIBRARIES, NO_LAYOUT, swin, trained

DTYPES = (torch.float32, torch.float64)
PLACE = Site('attn_kv', 16, 16)
REPARAM = dict(reparam=True, dim=7)


def prefix(p, at='', reparam=False):
    """Keys and values, given or made by the network."""
    if not reparam:
        return p[f'{at}keys'], p[f'{at}values']
    hidden = ref.linear(p[f'{at}embedding'], p[f'{at}hidden.weight'],
                        p[f'{at}hidden.bias'])
    hidden = 1 - 2 / (torch.exp(2 * hidden) + 1)
    both = ref.linear(hidden, p[f'{at}out.weight'], p[f'{at}out.bias'])
    dims = both.shape[-1] // 2
    return both[:, :dims], both[:, dims:]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kwargs', [{}, REPARAM])
@pytest.mark.parametrize('batch,others', [(1, 0), (1, 2), (4, 2)])
def test_formula(kwargs, batch, others, dtype):
    module = PrefixTuning(PLACE, num_tokens=3, **kwargs)
    fill(module)
    module.to(dtype)
    leaves = ref.parameters(module)
    before = [tensor(n, batch, others, 16, dtype=dtype) for n in 'kv']
    found = module(tensor('x', 4, 5, 16, dtype=dtype), before, NO_LAYOUT)
    own = prefix(leaves, reparam=bool(kwargs))
    loss = expected = 0.
    for name, new, old, given in zip('kv', found, before, own):
        wanted = torch.cat([old.double(), torch.stack([given] * batch)], dim=1)
        check_close(new, wanted, TOLERANCE[dtype], name)
        weight = tensor(f'weight {name}', *wanted.shape, dtype=dtype)
        loss += (new * weight).sum()
        expected += (wanted * weight.double()).sum()
    loss.backward()
    expected.backward()
    check_gradients(module, leaves, dtype, 'PrefixTuning')


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('kwargs', [{}, REPARAM])
def test_keys_and_values_of_every_window(library, kwargs):

    def block(x, p, _, mlp, drop):
        extra = prefix(p, 'peft.prefix_tuning.attn_kv.', bool(kwargs))
        branch, _ = attention(x, (7, 5), p, 2, 4, 2, extra=extra)
        x = x + drop(branch)
        return x + drop(mlp(x))

    check_block(library, dict(type='PrefixTuning', num_tokens=3, **kwargs),
                block, 0.5)


def test_stands_together_with_prompts():

    def block(x, p, _, mlp, drop):
        prompts = ref.layer_norm(p['peft.vpt_deep.tokens.prompts.weight'],
                                 p['norm1.weight'], p['norm1.bias'])
        branch, _ = attention(
            x, (7, 5),
            p,
            2,
            4,
            2,
            tokens=prompts.expand(len(x), -1, -1),
            extra=prefix(p, 'peft.prefix_tuning.attn_kv.'))
        x = x + drop(branch)
        return x + drop(mlp(x))

    check_block('mmdet', [
        dict(type='VPTDeep', num_tokens=2),
        dict(type='PrefixTuning', num_tokens=3)
    ], block)


@pytest.mark.parametrize('size', [(36, 28), (64, 64)])
def test_samples_do_not_mix(size):
    backbone = swin('mmdet', dict(type='PrefixTuning')).double()
    fill(backbone)
    images = tensor('image', 3, 3, *size)
    with torch.no_grad():
        outs = backbone(images)
        alone = [backbone(image[None]) for image in images]
    for i, out in enumerate(outs):
        check_close(out, torch.cat([a[i] for a in alone]), 1e-12, 'alone')


@pytest.mark.parametrize('std', [.02, 1.])
def test_init(std):
    torch.manual_seed(0)
    site = Site('attn_kv', 64, 64)
    module = PrefixTuning(site, num_tokens=50, init_std=std)
    for table in (module.keys, module.values):
        assert table.std().item() == pytest.approx(std, rel=.1)
    module = PrefixTuning(site, num_tokens=50, init_std=std, reparam=True)
    assert module.embedding.std().item() == pytest.approx(std, rel=.1)
    for linear in (module.hidden, module.out):
        bound = linear.in_features**-.5
        assert .9 * bound < linear.weight.abs().max() <= bound
        assert .8 * bound < linear.bias.abs().max() <= bound


def test_init_survives_that_of_the_backbone():
    backbone = swin('mmdet', dict(type='PrefixTuning', reparam=True, dim=9))
    backbone.init_weights()
    module = backbone.stages[1].blocks[0].peft.prefix_tuning.attn_kv
    # Stock would set a normal of std 0.02 and zero biases.
    assert module.hidden.bias.abs().min() > 0
    assert module.hidden.weight.abs().max() > .1


@pytest.mark.parametrize('kwargs,of_width', [
    (dict(num_tokens=3), lambda d: 2 * 3 * d),
    ({}, lambda d: 2 * 20 * d),
    (dict(num_tokens=3, reparam=True, dim=7), lambda d: 3 * d + (d * 7 + 7) +
     (7 * 2 * d + 2 * d)),
])
def test_count(kwargs, of_width):
    backbone = swin('mmdet', dict(type='PrefixTuning', **kwargs))
    expected = sum(2 * of_width(d) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='PrefixTuning .*prefix stands in'):
        merged_state_dict(swin('mmdet', dict(type='PrefixTuning')))


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_tokens=0), 'num_tokens must be a whole number'),
    (dict(num_tokens=2.), 'num_tokens must be a whole number'),
    (dict(reparam=True, dim=0), 'dim must be a whole number'),
    (dict(init_std=0.), 'init_std must be'),
    (dict(length=3), "no argument 'length'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='PrefixTuning', **kwargs))
