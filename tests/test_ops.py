"""Each rearrangement against its plain formula, and by finite differences."""
import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmpeft.ops import (activate, add_rows, depthwise, gelu_dropout,
                        scale_shift, scaled_norm_linear, window_attention)
from mmpeft.recipes import Recipes


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def plain_attention(qkv, bias, mask, heads, scale):
    windows, size, width = qkv.shape
    q, k, v = qkv.view(windows, size, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = scale * q @ k.transpose(-2, -1) + bias
    if mask is not None:
        scores = scores.view(-1, len(mask), *bias.shape) + mask[:, None]
        scores = scores.view(windows, *bias.shape)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(
        windows, size, width // 3)


def compare(ours, plain, inputs, tolerance=1e-12):
    """Outputs and all gradients."""
    found, expected = ours(*inputs), plain(*inputs)
    assert torch.allclose(found, expected, atol=tolerance)
    grad = torch.randn_like(expected)
    wanted = [i for i in inputs if i is not None and i.requires_grad]
    for a, b in zip(
            torch.autograd.grad(found, wanted, grad),
            torch.autograd.grad(expected, wanted, grad)):
        assert torch.allclose(a, b, atol=tolerance)
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize('chunk', [1, 600, 2**20])
@pytest.mark.parametrize('masked', [False, True])
def test_window_attention(masked, chunk, monkeypatch):
    # The function hides the module of its name.
    module = importlib.import_module('mmpeft.ops.window_attention')
    monkeypatch.setattr(module, 'CHUNK_BYTES', chunk)
    torch.manual_seed(0)
    # Two samples of three windows of four tokens; two heads.
    qkv, bias = drawn(6, 4, 12), drawn(2, 4, 4)
    mask = torch.where(torch.rand(3, 4, 4) > .7, -100., 0.).double()
    mask = mask if masked else None
    compare(lambda t, b: window_attention(t, b, mask, 2, .7),
            lambda t, b: plain_attention(t, b, mask, 2, .7), (qkv, bias))


def test_window_attention_in_half_precision():
    torch.manual_seed(0)
    qkv, bias = drawn(6, 4, 12), drawn(2, 4, 4)
    expected = plain_attention(qkv, bias, None, 2, .7)
    low = qkv.detach().bfloat16().requires_grad_()
    found = window_attention(low, bias.float(), None, 2, .7)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), expected, atol=.05)
    found.sum().backward()
    assert low.grad.dtype == torch.bfloat16


def test_scaled_norm_linear():
    torch.manual_seed(0)
    inputs = (drawn(2, 3,
                    5), *(drawn(5) for _ in range(3)), drawn(4, 5), drawn(4))

    def plain(y, scale, shift, skip, weight, bias):
        u = F.layer_norm(y, (5, ), eps=1e-5) * scale + shift + y * skip
        return u @ weight.t() + bias

    compare(lambda *a: scaled_norm_linear(*a, 1e-5), plain, inputs)


@pytest.mark.parametrize('chunk', [1, 60, 2**20])
def test_scale_shift(chunk, monkeypatch):
    module = importlib.import_module('mmpeft.ops.scale_shift')
    monkeypatch.setattr(module, 'CHUNK_BYTES', chunk)
    torch.manual_seed(0)
    compare(scale_shift, lambda y, s, t: y * s + t,
            (drawn(2, 3, 5), drawn(5), drawn(5)))


@pytest.mark.parametrize('rows', [[(0, 2), (4, 6)], [(1, 6)], [(0, 6)]])
def test_add_rows(rows):
    torch.manual_seed(0)

    def plain(y, *updates):
        out = torch.zeros_like(y)
        for (start, stop), update in zip(rows, updates):
            out = out + F.pad(update, (start, y.shape[-1] - stop))
        return y + out

    updates = [drawn(2, 3, stop - start) for start, stop in rows]
    compare(lambda y, *u: add_rows(y, rows, u), plain,
            (drawn(2, 3, 6), *updates))


@pytest.mark.parametrize('size', [3, 5, 7])
def test_depthwise(size):
    torch.manual_seed(0)
    tokens, kernel = drawn(2, 4 * 6, 3), drawn(3, 1, size, size)

    def plain(t, k):
        grid = t.transpose(1, 2).unflatten(2, (4, 6))
        grid = F.conv2d(grid, k, padding=size // 2, groups=3)
        return grid.flatten(2).transpose(1, 2)

    compare(lambda t, k: depthwise(t, k, (4, 6)), plain, (tokens, kernel))


@pytest.mark.parametrize('rate', [0., .4])
def test_activate(rate):
    """The draw is that of nn.Dropout, and the gradient knows it."""
    dropout = nn.Dropout(rate).double()
    x = drawn(3, 40)
    results = []
    for run in (lambda: dropout(F.gelu(x)), lambda: gelu_dropout(x, dropout)):
        torch.manual_seed(0)
        with Recipes(x, lean=True):
            y = run()
        grad, = torch.autograd.grad((y**3).sum(), x)
        results.append((y.detach(), grad))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-14)
    assert torch.equal(activate(torch.relu, x, dropout.eval()), torch.relu(x))
