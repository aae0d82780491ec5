"""Every method on the Swin of every library."""
import copy
import io

import pytest
import torch
from conftest import METHODS, build_pair, perturb, stock_cfg
from mmengine.registry import MODELS

from mmpeft.backbones import find_family
from mmpeft.injection import eject
from mmpeft.state import attached_modules

IDENTITY = ('Full', 'Frozen', 'Partial', 'BitFit', 'LNTune', 'AdaptFormer',
            'LoRA')


def outputs(backbone, image, seed=3):
    torch.manual_seed(seed)
    return [o.detach() for o in backbone(image)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def loss_of(backbone, image, seed=3):
    torch.manual_seed(seed)
    return sum((o**2).mean() for o in backbone(image))


@pytest.mark.parametrize('name', METHODS)
def test_stock_keys_and_weights(name, library):
    stock, peft = build_pair(library, METHODS[name])
    own, state = stock.state_dict(), peft.state_dict()
    assert [k for k in state if '.peft.' not in f'.{k}'] == list(own)
    assert all(torch.equal(state[k], v) for k, v in own.items())
    assert type(peft) is type(stock)
    for key in set(state) - set(own):
        block = key.split('.peft.')[0]
        assert block in {b.path for _, b in find_family(stock)}


@pytest.mark.parametrize('name', METHODS)
def test_start(name, library, image):
    stock, peft = build_pair(library, METHODS[name])
    stock.eval(), peft.eval()
    expected, found = outputs(stock, image), outputs(peft, image)
    if name in IDENTITY:
        assert equal(expected, found)
    else:
        difference = max((x - y).abs().max() for x, y in zip(expected, found))
        # The published starts: near the identity, and not.
        assert difference < (1e-3 if name == 'Adapter' else 1)
        assert difference > 0


def test_sites_without_modules_are_bit_equal(library, image):
    """The block forward of the family itself, in training mode with
    drop-path, with and without checkpointing."""
    stock, _ = build_pair(library, 'Frozen')
    bare = copy.deepcopy(stock)
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


@pytest.mark.parametrize('name', [n for n in METHODS if n != 'Frozen'])
def test_declared_parameters_get_gradients(name, library, image):
    _, peft = build_pair(library, METHODS[name])
    declared = {n for n, p in peft.named_parameters() if p.requires_grad}
    if attached_modules(peft):
        added = {n for n, _ in peft.named_parameters() if '.peft.' in n}
        assert declared == added
    optimizer = torch.optim.SGD(peft.parameters(), lr=.1)
    before = {n: p.clone() for n, p in peft.named_parameters()}
    seen = set()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(peft, image).backward()
        seen |= {
            n
            for n, p in peft.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0
        }
        optimizer.step()
    assert seen == declared
    assert all(
        torch.equal(p, before[n]) for n, p in peft.named_parameters()
        if n not in declared)


@pytest.mark.parametrize('name', ['Adapter', 'AdaptFormer', 'LoRA', 'Mona'])
def test_checkpointing(name, library, image):
    """Equal gradients with and without ``with_cp``, first block included."""
    _, peft = build_pair(library, METHODS[name])
    perturb(peft)
    grads = []
    for with_cp in (False, True):
        for _, block in find_family(peft):
            block.module.with_cp = with_cp
        peft.zero_grad()
        loss_of(peft, image).backward()
        grads.append({
            n: p.grad.clone()
            for n, p in peft.named_parameters() if p.requires_grad
        })
    assert grads[0].keys() == grads[1].keys()
    for key in grads[0]:
        assert torch.equal(grads[0][key], grads[1][key]), key


@pytest.mark.parametrize('name', METHODS)
def test_deepcopy_and_files(name, library, image):
    _, peft = build_pair(library, METHODS[name])
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
    _, fresh = build_pair(library, METHODS[name])
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert equal(outputs(fresh.eval(), image), expected)


@pytest.mark.parametrize('name', METHODS)
def test_init_weights_keeps_the_start(name, library, image):
    """After the stock initialisation by layer type, which hits adapters."""
    _, peft = build_pair(library, METHODS[name])
    torch.manual_seed(5)
    peft.init_weights()
    own = {
        n: m
        for n, m in peft.named_modules() if m in set(attached_modules(peft))
    }
    state = {n: copy.deepcopy(m.state_dict()) for n, m in own.items()}
    for module in own.values():
        module.reset_parameters()
    for n, module in own.items():
        for key, value in module.state_dict().items():
            old = state[n][key]
            if value.unique().numel() == 1:  # constants must be back exactly
                assert torch.equal(old, value), (n, key)
            elif value.numel() > 64:
                assert .7 < float(old.std() / value.std()) < 1.4, (n, key)


@pytest.mark.parametrize('name', METHODS)
def test_bfloat16_autocast(name, library, image):
    _, peft = build_pair(library, METHODS[name])
    with torch.autocast('cpu', torch.bfloat16):
        loss = loss_of(peft, image)
    assert torch.isfinite(loss)
    if name != 'Frozen':
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32
                   for p in peft.parameters() if p.requires_grad)


def test_eject_gives_back_stock(library, image):
    stock, peft = build_pair(library, 'Mona:dim=4+LoRA:rank=2')
    perturb(peft)
    eject(peft)
    assert list(peft.state_dict()) == list(stock.state_dict())
    assert equal(outputs(peft, image), outputs(stock, image))
    assert [type(m) for m in peft.modules()
            ] == [type(m) for m in MODELS.build(stock_cfg(library)).modules()]
