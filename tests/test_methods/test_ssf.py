import pytest
import torch

from mmpeft.errors import PEFTError
from mmpeft.methods import SSF
from mmpeft.sites import Site
from .checks import (_check_digests, check_block, check_close, check_module,
                     replace_drop_path)
from .recorded import digest, fill, load, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained
from .test_lora_merge import check_merge

DTYPES = (torch.float32, torch.float64)
LAYERS = dict(
    norm1='norm1',
    qkv='attn.w_msa.qkv',
    proj='attn.w_msa.proj',
    norm2='norm2',
    fc1='ffn.layers.0.0',
    fc2='ffn.layers.1')


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', SSF.sites)
def test_formula(name, dtype):
    place = site(name, 12)

    def formula(x, y, p):
        return y * p['scale'] + p['shift']

    check_module(
        SSF(place), formula, tensor('x', 2, 15, place.in_dims),
        tensor('y', 2, 15, place.out_dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
def test_after_every_operation_of_a_block(library):

    def block(x, p, attention, mlp, drop):
        p = dict(p)
        for name, layer in LAYERS.items():
            scale, shift = (
                p[f'peft.ssf.{name}.{leaf}'] for leaf in ('scale', 'shift'))
            weight = p[f'{layer}.weight']
            p[f'{layer}.weight'] = (weight.t() * scale).t()
            p[f'{layer}.bias'] = p[f'{layer}.bias'] * scale + shift
        x = x + drop(attention(x, p))
        return x + drop(mlp(x, p))

    check_block(library, dict(type='SSF'), block, .5)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_released_backbone(library, dtype):
    """The released Swin has no norm after its first stage."""
    recorded = load('released_ssf_swin')
    outs, grads = (1e-5, 1e-4) if dtype is torch.float32 else (2e-7, 2e-7)
    backbone = swin(library, dict(type='SSF'), embed_dims=8)
    fill(backbone.to(dtype))
    backbone.train()
    replace_drop_path(backbone)
    out = backbone(tensor('image', 2, 3, 64, 64, dtype=dtype))[1]
    (out * tensor('weight 1', *out.shape, dtype=dtype)).sum().backward()
    mine = digest('out1', out.detach().numpy())
    check_close(mine, recorded['out1_digest'], outs, 'output')
    check_close(out[0], recorded['out1'], outs, 'output')
    found = {
        n: p.grad
        for n, p in trained(backbone).items() if p.grad is not None
    }
    assert set(trained(backbone)) - set(found) == {
        f'norm0.peft.ssf.out_norm.{leaf}'
        for leaf in ('scale', 'shift')
    }
    _check_digests(recorded, found, grads)


def test_starts_near_the_identity():
    torch.manual_seed(0)
    module = SSF(Site('fc1', 100, 4000))
    assert module.scale.mean().item() == pytest.approx(1, abs=2e-3)
    assert module.shift.mean().item() == pytest.approx(0, abs=2e-3)
    for tensor_ in (module.scale, module.shift):
        assert tensor_.std().item() == pytest.approx(.02, rel=.05)


def test_count():
    backbone = swin('mmdet', 'SSF')
    # 11 d in a block; stem, its norm, merging 4 d, output norms.
    widths = 11 * 2 * (16 + 32) + 2 * 16 + 4 * 16 + (16 + 32)
    assert sum(p.numel() for p in trained(backbone).values()) == 2 * widths


def test_layers_leave_the_parts_out():
    backbone = swin('mmdet', dict(type='SSF', layers='stage:1'))
    assert all(n.startswith('stages.1.blocks') for n in trained(backbone))


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('size', [(36, 28), (33, 50), (64, 64)])
def test_merge(library, size):
    backbone = swin(library, 'SSF')
    fill(backbone)
    for name, parameter in backbone.named_parameters():
        if name.endswith('.scale'):
            parameter.data.add_(1)
    backbone.eval()
    assert all(
        any(f'.ssf.{part}.' in n for n in trained(backbone))
        for part in SSF.parts)
    check_merge(library, backbone, size)


def test_without_a_bias_the_shift_becomes_one():
    module = SSF(site('qkv', 8))
    fill(module.double())
    weight, x = tensor('weight', 24, 8), tensor('x', 5, 8)
    merged, bias = module.merge(weight, None)
    out = module(x, x @ weight.t(), NO_LAYOUT)
    assert torch.allclose(out, x @ merged.t() + bias, atol=1e-12)


def test_it_takes_no_argument():
    with pytest.raises(PEFTError, match="SSF has no argument 'scale'"):
        swin('mmdet', dict(type='SSF', scale=1.))
