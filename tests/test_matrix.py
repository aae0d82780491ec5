"""Every method on every kind of backbone."""
import copy
import io

import pytest
import torch
from conftest import (METHODS, build_pair, family_of, method_of, peft_cfg,
                      perturb, stock_cfg)
from kinds import KINDS
from mmengine.registry import MODELS

from mmpeft.backbones import find_family
from mmpeft.backbones.attached import BlockPEFT
from mmpeft.engine.listing import refusal
from mmpeft.errors import MergeError, SiteError
from mmpeft.injection import eject
from mmpeft.merging import merged_state_dict
from mmpeft.methods.base import Selector
from mmpeft.registry import METHODS as METHOD_CLASSES
from mmpeft.registry import SITE_MAPS
from mmpeft.state import attached_modules, load_whole

# How far the outputs are from stock's at the start, by the papers: nothing,
# rounding only, or near; the others start somewhere else.
EXACT = ('Full', 'Frozen', 'Partial', 'BitFit', 'LNTune', 'AdaptFormer',
         'LoRA', 'VeRA', 'IA3', 'AdaLoRA', 'FacTTT', 'FacTTK', 'Hydra',
         'RepAdapter', 'Convpass', 'LST', 'DTL', 'DTLPlus', 'GPS')
ROUNDED = ('DoRA', 'LoRA, PiSSA', 'E3VA', 'LAST')
NEAR = ('Adapter', 'AdapterPlus', 'SSF', 'SNF', 'Rein')
# Pairs without a place; the others all work, in these tests and in those of
# the families.
REFUSED = [(m, f'{f}Sites') for m in ('HST', 'ViTAdapter')
           for f in ('Swin', 'SwinV2', 'TimmSwin', 'MiT')]
EACH = pytest.mark.parametrize('name', METHODS, scope='module')
# Of methods whose maps take the place of the outputs.
CHANNELS = {'HST': [4, 6, 8], 'ViTAdapter': [16] * 4}
# Methods of which a part has no place in the stock layers.
UNMERGED = {'swin_v2': ('RepAdapter', 'SSF')}
ATTACHED = [
    name for name in METHODS if not issubclass(method_of(name), Selector)
]


@pytest.fixture(scope='module')
def built(name, kind):
    """One pair for all its tests, and what it was made of."""
    pair = build_pair(kind, METHODS[name])
    values = [v for model in pair for v in model.state_dict().values()]
    return pair, [(v, v.clone()) for v in values]


@pytest.fixture
def pair(built):
    """The stock backbone and the one with the method, as they were made:
    what changes more than weights and modes builds its own."""
    models, values = built
    for value, first in values:
        value.copy_(first)
    for model in models:
        model.train()  # of mmdet: returns None
        model.zero_grad()
        for _, block in find_family(model):
            block.module.with_cp = False
    return models


@torch.no_grad()
def outputs(backbone, image, seed=3):
    torch.manual_seed(seed)
    return list(backbone(image))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def gap(found, expected):
    """Largest difference, relative to the largest entry."""
    return max(
        float((x - y).abs().max() / y.abs().max())
        for x, y in zip(found, expected))


def loss_of(backbone, image, seed=3):
    torch.manual_seed(seed)
    return sum((o**2).mean() for o in backbone(image))


def test_every_method_is_here():
    assert {method_of(n).__name__
            for n in METHODS} == set(METHOD_CLASSES.module_dict)
    for family in SITE_MAPS.module_dict.values():
        for cls in METHOD_CLASSES.module_dict.values():
            reason = refusal(cls, family)
            pair = cls.__name__, family.__name__
            assert (pair in REFUSED) == (reason is not None), (pair, reason)


def test_refusals(kind):
    """At build time, with the reason."""
    family = family_of(kind)
    for name, method in METHODS.items():
        reason = refusal(method_of(name), family)
        if reason is not None:
            with pytest.raises(SiteError) as error:
                MODELS.build(peft_cfg(kind, method))
            assert reason.split(': ')[-1] in str(error.value)


@EACH
def test_stock_keys_and_weights(pair):
    stock, peft = pair
    own, state = stock.state_dict(), peft.state_dict()
    assert [k for k in state if '.peft.' not in f'.{k}'] == list(own)
    assert all(torch.equal(state[k], v) for k, v in own.items())
    assert type(peft) is type(stock)
    # Below a block, a stock module outside them, or the backbone.
    modules = {n for n, _ in stock.named_modules()}
    for key in set(state) - set(own):
        assert f'.{key}'.split('.peft.')[0][1:] in modules


@EACH
def test_start(name, kind, pair, image):
    stock, peft = pair
    stock.eval(), peft.eval()
    expected, found = outputs(stock, image), outputs(peft, image)
    if name in CHANNELS:
        assert [o.shape[1] for o in found] == CHANNELS[name]
    elif name in EXACT:
        assert equal(expected, found)
    elif name in ROUNDED:
        assert gap(found, expected) < 1e-5
    else:
        # What is small in front of a norm is not small behind it.
        near = 1 if KINDS[kind].post_norm else .2
        assert 0 < gap(found, expected) < (near if name in NEAR else 10)


def test_sites_without_modules_are_bit_equal(kind, image):
    """The block forward of the family itself, in training mode with
    drop-path, with and without checkpointing."""
    stock, _ = build_pair(kind, 'Frozen')
    bare = copy.deepcopy(stock.requires_grad_())
    for _, block in find_family(bare):
        block.family.swap(block.module)
    for with_cp in (False, True):
        for backbone in (stock, bare):
            for _, block in find_family(backbone):
                block.module.with_cp = with_cp
        assert equal(outputs(stock, image), outputs(bare, image))
        grads = []
        for backbone in (stock, bare):
            backbone.zero_grad()
            loss_of(backbone, image).backward()
            grads.append([p.grad for p in backbone.parameters()])
        assert equal(*grads)
    eject(bare)
    assert [type(m)
            for m in bare.modules()] == [type(m) for m in stock.modules()]


@EACH
def test_declared_parameters_get_gradients(name, kind, pair, image):
    _, peft = pair
    declared = {n for n, p in peft.named_parameters() if p.requires_grad}
    if name == 'Frozen':
        assert not declared
        return
    if name in ATTACHED:
        added = {n for n, _ in peft.named_parameters() if '.peft.' in f'.{n}'}
        norms = KINDS[kind].out_norms if name == 'E3VA' else ()
        if name == 'HST':
            norms = {
                path
                for path, module in peft.named_modules()
                for _, block in find_family(peft) if any(
                    module is block.layer(n) for n in ('norm1', 'norm2'))
            }
        biases = ('bias',
                  'relative_position_bias_table') if name == 'GPS' else ()
        assert {
            n
            for n in declared - added
            if n.rpartition('.')[0] not in norms and not n.endswith(biases)
        } == set()
        assert added <= declared
    optimizer = torch.optim.SGD(peft.parameters(), lr=.1)
    before = {n: p.clone() for n, p in peft.named_parameters()}
    seen = set()
    # In the second step, if drop-path leaves no branch out of a whole batch.
    for seed in range(4, 8):
        optimizer.zero_grad()
        loss_of(peft, image, seed).backward()
        seen |= {
            n
            for n, p in peft.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0
        }
        optimizer.step()
        if seen == declared:
            break
    assert seen == declared
    assert all(
        torch.equal(p, before[n]) for n, p in peft.named_parameters()
        if n not in declared)


@EACH
def test_checkpointing(name, pair, image):
    """Equal gradients with and without ``with_cp``, first block included."""
    _, peft = pair
    perturb(peft)
    grads = []
    for with_cp in (False, True):
        for _, block in find_family(peft):
            block.module.with_cp = with_cp
        peft.zero_grad()
        loss = loss_of(peft, image)
        if name != 'Frozen':
            loss.backward()
        grads.append({
            n: p.grad.clone()
            for n, p in peft.named_parameters() if p.requires_grad
        })
    assert grads[0].keys() == grads[1].keys()
    for key in grads[0]:
        assert torch.equal(grads[0][key], grads[1][key]), key


@EACH
def test_deepcopy_and_files(name, kind, pair, image):
    _, peft = pair
    perturb(peft).eval()
    expected = outputs(peft, image)
    twin = copy.deepcopy(peft)
    assert equal(outputs(twin, image), expected)
    # The copy runs its own modules and guards, not the original's.
    assert twin.train() is twin and twin.eval() is twin
    perturb(peft, only='')
    assert equal(outputs(twin, image), expected)
    assert not equal(outputs(peft, image), expected)

    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    _, fresh = build_pair(kind, METHODS[name])
    load_whole(fresh, torch.load(file, weights_only=True))
    assert equal(outputs(fresh.eval(), image), expected)


@EACH
def test_init_weights_keeps_the_start(name, kind, image):
    """After the stock initialisation by layer type, which hits adapters."""
    stock, peft = build_pair(kind, METHODS[name])
    if KINDS[kind].init_by_layer:
        peft.init_cfg = [dict(type='Normal', layer='Linear', std=.5, bias=.5)]
    torch.manual_seed(5)
    peft.init_weights()
    own = {n: m for n, m in peft.named_modules() if n.endswith('.peft')}
    own['peft'] = peft.peft
    state = {n: copy.deepcopy(m.state_dict()) for n, m in own.items()}
    for module in [*peft.peft.children(), *attached_modules(peft)]:
        module.reset_parameters()
    peft.peft.unsettled = {
        n
        for n, m in peft.named_modules() if getattr(m, 'needs_layer', False)
    }
    peft.state_dict()  # starts those that wait for it
    for n, module in own.items():
        for key, value in module.state_dict().items():
            old = state[n][key]
            if value.unique().numel() == 1:  # constants must be back exactly
                assert torch.equal(old, value), (n, key)
            elif value.numel() > 64:
                assert .7 < float(old.std() / value.std()) < 1.4, (n, key)
    if name in EXACT + ROUNDED and name in ATTACHED:
        load_whole(stock, {
            k: v
            for k, v in peft.state_dict().items() if '.peft.' not in f'.{k}'
        })
        stock.eval(), peft.eval()
        assert gap(outputs(peft, image), outputs(stock, image)) < 1e-5


@EACH
def test_bfloat16_autocast(name, pair, image):
    _, peft = pair
    with torch.autocast('cpu', torch.bfloat16):
        loss = loss_of(peft, image)
    assert torch.isfinite(loss)
    if name != 'Frozen':
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32
                   for p in peft.parameters() if p.requires_grad)


@EACH
def test_merge(name, kind, pair):
    """On maps that the window does not divide, or refused with a reason."""
    stock, peft = pair
    perturb(peft).eval()
    reasons = {getattr(m, 'no_merge', None) for m in peft.modules()} - {None}
    if reasons:
        with pytest.raises(MergeError, match='|'.join(reasons)):
            merged_state_dict(peft)
        return
    if name in UNMERGED.get(kind, ()):
        with pytest.raises(MergeError, match='has no bias of the keys'):
            merged_state_dict(peft)
        return
    load_whole(stock, merged_state_dict(peft))
    stock.eval()
    for size in KINDS[kind].sizes:
        image = torch.randn(1, 3, *size)
        assert gap(outputs(stock, image), outputs(peft, image)) < 1e-5


@EACH
def test_eject_gives_back_stock(name, kind, image):
    stock, peft = build_pair(kind, METHODS[name])
    perturb(peft)
    outputs(peft, image)
    eject(peft)
    assert list(peft.state_dict()) == list(stock.state_dict())
    assert equal(outputs(peft, image), outputs(stock, image))
    assert [type(m) for m in peft.modules()
            ] == [type(m) for m in MODELS.build(stock_cfg(kind)).modules()]
    assert not any(isinstance(m, BlockPEFT) for m in peft.modules())


def test_eject_after_two_methods(kind, image):
    stock, peft = build_pair(kind, 'Mona:dim=4+LoRA:rank=2')
    perturb(peft)
    eject(peft)
    assert list(peft.state_dict()) == list(stock.state_dict())
    assert equal(outputs(peft, image), outputs(stock, image))
