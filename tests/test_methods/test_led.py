"""A layer whose first module stands for both, against the layer and what is
attached behind it."""
import copy

import pytest
import torch
import torch.nn as nn

import mmpeft
from mmpeft.injection import eject
from mmpeft.methods import low_rank
from .recorded import fill, tensor
from .swins import swin

METHODS = ('LoRA', 'DoRA', 'AdaLoRA', 'VeRA', dict(type='LoRA', init='pissa'))
QKV = 'stages.0.blocks.1.attn.w_msa.qkv'


def built(method, memory='fast', **kwargs):
    cfg = dict(type=method) if isinstance(method, str) else method
    cfg = dict(cfg, rank=3, **kwargs)
    backbone = swin('mmdet', cfg, memory=memory).double().train()
    fill(backbone)
    return backbone


def step(backbone):
    """Outputs and gradients."""
    image = tensor('image', 2, 3, 28, 20)
    backbone.zero_grad()
    outs = backbone(image)
    sum((out**2).sum() for out in outs).backward()
    return outs, {
        n: p.grad
        for n, p in backbone.named_parameters() if p.requires_grad
    }


def count(monkeypatch):
    """How often a weight is formed."""
    calls = []
    for name in ('low_rank', 'dora', 'vera'):
        module = getattr(mmpeft.methods, name)
        plain = module.low_rank_linear
        monkeypatch.setattr(
            module,
            'low_rank_linear',
            lambda *args, plain=plain: calls.append(1) or plain(*args))
    return calls


@pytest.mark.parametrize('method', METHODS)
def test_is_the_layer_and_the_module_behind_it(method, monkeypatch):
    backbone = built(method)
    calls = count(monkeypatch)
    outs, grads = step(backbone)
    assert len(calls) == 4
    monkeypatch.setattr(low_rank.LeadingRows, 'takes_over',
                        lambda *args: False)
    others, other_grads = step(backbone)
    assert len(calls) == 4
    for out, other in zip(outs, others):
        torch.testing.assert_close(out, other, rtol=1e-10, atol=1e-12)
    assert list(grads) == list(other_grads)
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, other_grads[name], rtol=1e-8, atol=1e-10)


def test_norms_scale_and_shift_by_themselves(monkeypatch):
    methods = [dict(type='SSF'), dict(type='LNTune')]
    backbone = swin('mmdet', methods).double().train()
    fill(backbone)
    block, seen = backbone.stages[0].blocks[0], []
    norm, ssf = block.norm1, block.peft.ssf['norm1']
    assert isinstance(norm, nn.LayerNorm) and type(norm) is not nn.LayerNorm
    plain = nn.functional.layer_norm
    monkeypatch.setattr(
        nn.functional, 'layer_norm',
        lambda x, *args: seen.append(args[1]) or plain(x, *args))
    outs, grads = step(backbone)
    assert any(torch.equal(w, ssf.scale * norm.weight) for w in seen)
    monkeypatch.setattr(type(ssf), 'takes_over', lambda *args: False)
    others, other_grads = step(backbone)
    for out, other in zip(outs, others):
        torch.testing.assert_close(out, other, rtol=1e-10, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, other_grads[name], rtol=1e-8, atol=1e-10)
    eject(backbone)
    assert type(norm) is nn.LayerNorm


@pytest.mark.parametrize('method', METHODS)
def test_not_where_a_sum_would_lose_the_update(method, monkeypatch):
    calls = count(monkeypatch)
    backbone = built(method).float()
    image = tensor('image', 1, 3, 28, 20, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        backbone(image)
    backbone.bfloat16()(image.bfloat16())
    assert not calls


def test_not_in_tf32(monkeypatch):
    calls = count(monkeypatch)
    backbone = built('LoRA').float()
    image = tensor('image', 2, 3, 28, 20, dtype=torch.float32)
    try:
        torch.set_float32_matmul_precision('high')
        backbone(image)
        assert not calls
    finally:
        torch.set_float32_matmul_precision('highest')
    backbone(image)
    assert calls


def test_not_with_dropout(monkeypatch):
    calls = count(monkeypatch)
    backbone = built('LoRA', drop_rate=.1)
    image = tensor('image', 2, 3, 28, 20)
    backbone(image)
    assert not calls


def test_in_training_only(monkeypatch):
    calls = count(monkeypatch)
    image = tensor('image', 2, 3, 28, 20)
    built('LoRA').eval()(image)
    built('LoRA', memory='stock')(image)
    assert not calls
    built('LoRA', memory='lean')(image)
    assert len(calls) == 4


def test_not_for_a_few_tokens(monkeypatch):
    calls = count(monkeypatch)
    layer = built('LoRA').get_submodule(QKV)
    layer(tensor('x', 1, layer.in_features - 1, layer.in_features))
    assert not calls
    layer(tensor('x', 1, layer.in_features, layer.in_features))
    assert calls


def test_what_is_listed_before_comes_before(monkeypatch):
    """The first at a layer may stand for it, and no other."""
    calls = count(monkeypatch)
    both = [dict(type='SSF'), dict(type='LoRA', rank=3)]
    found = []
    for methods in (both, both[::-1]):
        backbone = swin('mmdet', methods).double()
        fill(backbone)
        layer = backbone.get_submodule(QKV)
        x, calls[:] = tensor('x', 2, 16, 16), []
        found.append((layer(x), len(calls)))
        peft = backbone.stages[0].blocks[1].peft
        scale, shift = peft.ssf['qkv'].scale, peft.ssf['qkv'].shift
        plain, update = nn.functional.linear(x, layer.weight,
                                             layer.bias), torch.zeros(
                                                 2, 16, 48).double()
        lora = peft.lora['qkv']
        for part, a, b in zip((slice(0, 16), slice(32, 48)),
                              lora.lora_A.split(3), lora.lora_B.split(16)):
            update[..., part] = x @ a.t() @ b.t()
        expected = (
            scale * plain + shift + update if methods is both else scale *
            (plain + update) + shift)
        torch.testing.assert_close(found[-1][0], expected)
    assert [calls for _, calls in found] == [0, 1]


def test_is_stock_again():
    backbone = built('LoRA')
    layer = backbone.get_submodule(QKV)
    assert isinstance(layer, nn.Linear) and type(layer) is not nn.Linear
    copied = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    # The copy forms the weight of its own.
    x = tensor('x', 2, 16, 16)
    assert copied.get_submodule(QKV)(x).abs().sum() > 0
    assert backbone.get_submodule(QKV)(x).abs().sum() == 0
    eject(backbone)
    assert type(layer) is nn.Linear
    assert all(
        type(m) is not type(copied.get_submodule(QKV))
        for m in backbone.modules())


def test_hooks_of_the_module_run():
    """The report hook counts calls of what is attached."""
    backbone, seen = built('LoRA'), []
    for module in backbone.modules():
        if isinstance(module, low_rank.LowRank):
            module.register_forward_hook(
                lambda m, args, out: seen.append(out.shape[-1] // 3))
    step(backbone)
    assert seen == [16, 16, 32, 32]
