"""PiSSA, an initialisation of LoRA, and LoRA+, rates of its own for B."""
import copy

import pytest
import torch
import torch.nn as nn
from mmengine.optim import build_optim_wrapper

from mmpeft.errors import PEFTError
from mmpeft.methods import LoRA
from .checks import check_module
from .recorded import difference, fill, load, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained
from .test_lora import DTYPES, update
from .test_lora_merge import ALL, check_merge


def bound(name, dims, dtype=torch.float64, **kwargs):
    """A module that started from a stock layer of its own."""
    place = site(name, dims)
    layer = nn.Linear(place.in_dims, place.out_dims)
    fill(layer)
    module = LoRA(place, init='pissa', **kwargs).to(dtype)
    module.bind_layer(layer.to(dtype).requires_grad_(False))
    with torch.no_grad():
        module.start_from_layer()
    return module


@pytest.mark.parametrize('name,targets', [
    ('qkv', ('q', 'v')),
    ('qkv', ('k', )),
    ('proj', ('proj', )),
    ('fc1', ('fc1', )),
    ('fc2', ('fc2', )),
])
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(alpha=6),
    dict(alpha=2, rslora=True),
])
def test_starts_from_the_leading_singular_triplets(name, targets, kwargs):
    module = bound(name, 8, rank=3, targets=targets, **kwargs)
    weight = module.layer.weight
    for down, up, (start, stop) in zip(
            module.lora_A.split(3), module.lora_B.split(module.sizes),
            module.rows):
        u, s, vh = torch.linalg.svd(weight[start:stop])
        expected = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        # Decomposed in float32.
        assert difference(module.scale * up @ down, expected) < 1e-5
        # The singular values are shared out evenly.
        roots = (s[:3] / module.scale).sqrt()
        assert difference(up.norm(dim=0), roots) < 1e-5
        assert difference(down.norm(dim=1), roots) < 1e-5


def test_signs_are_settled():
    """The same on every device: the largest entry of u is positive."""
    module = bound('proj', 8, rank=3, targets=['proj'])
    largest = module.lora_B.abs().argmax(0)
    assert (module.lora_B.gather(0, largest[None]) > 0).all()


@pytest.mark.parametrize('name,targets', [
    ('qkv', ('q', 'v')),
    ('qkv', ('q', 'k', 'v')),
    ('fc1', ('fc1', )),
])
@pytest.mark.parametrize('dtype', DTYPES)
def test_formula(name, targets, dtype):
    """``W - s B0 A0 + s B A`` on the stock output."""
    module = bound(name, 8, dtype, rank=3, alpha=6, targets=targets)
    initial = {n: b.double() for n, b in module.named_buffers()}
    initial = {n[:-1]: b for n, b in initial.items()}
    own = [t for t in targets if t in 'qkv'] or targets

    def formula(x, y, p):
        change = update(p, own, 3, 2.) - update(initial, own, 3, 2.)
        return y + torch.matmul(x, change.t())

    place = module.site
    check_module(module, formula, tensor('x', 2, 5, place.in_dims),
                 tensor('y', 2, 5, place.out_dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_start(dtype):
    """Product of the factors that peft starts from, and the output of its
    layer after a step away from them."""
    recorded = load('released_pissa')
    module = bound(
        'proj', 12, torch.float32, rank=4, alpha=6, targets=['proj'])
    assert difference(module.lora_B @ module.lora_A, recorded['start']) < 1e-5
    module.to(dtype)
    layer = module.layer.to(dtype)
    with torch.no_grad():
        for name, factor in (('lora_A', module.lora_A), ('lora_B',
                                                         module.lora_B)):
            factor.mul_(1.5)
    x = tensor('x', 2, 15, 12, dtype=dtype)
    assert difference(module(x, layer(x), NO_LAYOUT), recorded['out']) < 1e-5


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('targets', [('q', 'v'), ALL])
def test_starts_at_the_loaded_model_bit_for_bit(library, targets):
    backbone = swin(library,
                    dict(type='LoRA', rank=3, init='pissa', targets=targets))
    stock = swin(library)
    fill(stock)
    backbone.load_state_dict(stock.state_dict(), strict=False)
    backbone.eval()
    stock.eval()
    image = tensor('image', 2, 3, 36, 28, dtype=torch.float32)
    for found, expected in zip(backbone(image), stock(image)):
        assert torch.equal(found, expected)
    own = backbone.stages[1].blocks[0].peft['lora']
    for name, module in own.items():
        rows = module.layer.weight[slice(*module.rows[0])]
        product = module.lora_B[:module.sizes[0]] @ module.lora_A[:3]
        # What is left of the rows has only the smaller singular values.
        left = torch.linalg.matrix_norm(rows - product, ord=2)
        assert abs(left - torch.linalg.svdvals(rows)[3]) < 1e-5, name


def test_buffers_only_with_pissa():
    plain, pissa = (
        swin('mmdet', dict(type='LoRA', rank=3, init=init))
        for init in ('lora', 'pissa'))
    extra = set(pissa.state_dict()) - set(plain.state_dict())
    assert len(extra) == 8 and all(k.endswith(('A0', 'B0')) for k in extra)
    assert list(trained(plain)) == list(trained(pissa))


def test_checkpoint_keeps_the_initial_factors():
    """Also with the weights of the base in the same file."""
    backbone = swin('mmdet', dict(type='LoRA', rank=3, init='pissa'))
    fill(backbone)
    backbone.eval()
    image = tensor('image', 1, 3, 36, 28, dtype=torch.float32)
    expected = backbone(image)
    fresh = swin('mmdet', dict(type='LoRA', rank=3, init='pissa'))
    fresh.load_state_dict(backbone.state_dict())
    fresh.eval()
    for out, wanted in zip(fresh(image), expected):
        assert torch.equal(out, wanted)
    twin = copy.deepcopy(backbone)
    module = twin.stages[0].blocks[0].peft['lora']['qkv']
    assert module.layer is twin.stages[0].blocks[0].attn.w_msa.qkv


@pytest.mark.parametrize('targets', [('q', 'v'), ALL])
@pytest.mark.parametrize('library,size', [('mmdet', (33, 50)),
                                          ('mmseg', (36, 28)),
                                          ('mmpretrain', (64, 64))])
def test_merge(library, targets, size):
    backbone = swin(
        library,
        dict(type='LoRA', rank=3, alpha=5, init='pissa', targets=targets))
    fill(backbone)
    # Small, as in test_lora_merge.
    for name, parameter in backbone.named_parameters():
        if name.endswith('lora_B'):
            parameter.data.mul_(.25)
    backbone.eval()
    check_merge(library, backbone, size)


def test_dropout_leaves_the_initial_term_alone():
    """In the paper that term is part of the frozen weight."""
    module = bound('proj', 8, rank=4, targets=['proj'], drop_rate=.5)
    x, y = tensor('x', 2, 3, 8), tensor('y', 2, 3, 8)
    torch.manual_seed(1)
    found = module(x, y, NO_LAYOUT)
    torch.manual_seed(1)
    dropped = module.dropout(x)
    product = module.lora_B @ module.lora_A
    expected = y + (dropped - x) @ product.t()
    torch.testing.assert_close(found, expected)
    module.eval()
    assert torch.equal(module(x, y, NO_LAYOUT), y)


def test_unknown_init():
    with pytest.raises(PEFTError, match="unknown init 'svd'.*'pissa'"):
        swin('mmdet', dict(type='LoRA', rank=3, init='svd'))


@pytest.mark.parametrize('extra', [{}, {'norm': dict(decay_mult=0.)}])
def test_lora_plus_groups(extra):
    """A rate for B that is 16 times that of A, by the stock constructor."""
    model = nn.Module()
    model.backbone = swin('mmdet', dict(type='LoRA', rank=3, targets=ALL))
    model.head = nn.Linear(4, 2)
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=.05),
            paramwise_cfg=dict(custom_keys={
                '.lora_B': dict(lr_mult=16),
                **extra
            })))
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {
        names[id(p)]: group['lr']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = name.endswith('.lora_B')
            counts[is_b] += 1
            assert rates[name] == pytest.approx(1e-4 * (16 if is_b else 1))
    # A and B at four sites in four blocks, and the head.
    assert counts == {True: 16, False: 18}
