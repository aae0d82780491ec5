"""Each rearrangement against its plain formula, and by finite differences."""
import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmpeft.methods.mona import MonaOp
from mmpeft.methods.mona_fold import fold_op
from mmpeft.ops import (activate, add_rows, filtered_bottleneck, from_windows,
                        low_rank_linear, plan_windows, scale_shift, to_windows,
                        window_attention)
from mmpeft.ops.depthwise import depthwise, depthwise_backward, kernel_grad
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


@pytest.mark.parametrize('shift', [0, 3])
@pytest.mark.parametrize('kind', ['mmdet', 'mmpretrain'])
def test_windows(kind, shift):
    """Against stock code: all windows, their mask and what comes back."""
    module = pytest.importorskip('mmdet.models.backbones.swin' if kind ==
                                 'mmdet' else 'mmpretrain.models.utils')
    stock = module.ShiftWindowMSA(
        4, num_heads=1, window_size=7, shift_size=shift)
    seen, factor = {}, drawn(12, 49, 4)

    def attend(x, mask):
        seen.update(x=x, mask=mask)
        return x * factor

    stock.w_msa.forward = attend
    tokens = drawn(2, 9 * 16, 4)
    windows = plan_windows(2, (9, 16), 7, shift, tokens.device)

    def ours(tokens):
        return from_windows(to_windows(tokens, windows) * factor, windows, 2)

    assert torch.equal(ours(tokens), stock(tokens, (9, 16)))
    assert torch.equal(to_windows(tokens, windows), seen['x'])
    assert (shift == 0) == (windows.mask is None) == (seen['mask'] is None)
    if shift:
        assert torch.equal(windows.mask, seen['mask'])
    compare(ours, lambda t: stock(t, (9, 16)), (tokens, ))


class Bottleneck(nn.Module):
    """Of 5 channels, with 3 inside, on a map of 4 x 6."""

    def __init__(self, rate=0.):
        super().__init__()
        self.down, self.up = nn.Linear(5, 3), nn.Linear(3, 5)
        self.dropout = nn.Dropout(rate)
        self.double()

    def ours(self, y, scale, shift, skip, kernel, point, bias):
        return filtered_bottleneck(y, (scale, shift, skip, 1e-5), self.down,
                                   (kernel, point, bias), self.dropout,
                                   self.up, (4, 6))

    def plain(self, y, scale, shift, skip, kernel, point, bias):
        t = self.down(F.layer_norm(y, (5, ), scale, shift) + y * skip)
        t = F.linear(depthwise(t, kernel, (4, 6)), point, bias)
        return y + self.up(self.dropout(F.gelu(t)))

    def inputs(self):
        return (drawn(2, 24, 5), *(drawn(5) for _ in range(3)),
                drawn(3, 1, 7, 7), drawn(3, 3), drawn(3))


@pytest.mark.parametrize('lean', [None, False, True])
def test_filtered_bottleneck(lean):
    torch.manual_seed(0)
    module = Bottleneck()

    def ours(y, *args):
        if lean is None:
            return module.ours(y, *args)
        with Recipes(y, lean):
            # What follows asks for the output, which is made again if lean.
            return module.ours(y, *args)**2

    def plain(*args):
        return module.plain(*args)**(1 if lean is None else 2)

    compare(ours, plain, module.inputs())
    # Weights of layers are no arguments.
    inputs, results = module.inputs(), []
    for run in (ours, plain):
        module.zero_grad()
        (run(*inputs)**3).sum().backward()
        results.append([p.grad for p in module.parameters()])
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-10)


def test_filtered_bottleneck_drops():
    """The draw is that of nn.Dropout, and the gradient knows it."""
    module = Bottleneck(.4)
    inputs, results = module.inputs(), []
    for run in (module.ours, module.plain):
        torch.manual_seed(0)
        y = run(*inputs)
        results.append((y, *torch.autograd.grad((y**3).sum(), inputs)))
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-10)


def test_fold_op():
    torch.manual_seed(0)
    op = MonaOp(3).double()
    names, parameters = zip(*op.named_parameters())

    def ours(t, *parameters):
        # The children hold plain tensors, so that gradients are of these.
        for name, p in zip(names, parameters):
            child, own = name.split('.')
            op.get_submodule(child)._parameters[own] = p
        kernel, point, bias = fold_op(op)
        t = F.conv2d(t, kernel, padding=3, groups=3)
        return F.conv2d(t, point[:, :, None, None], bias)

    def plain(t, *parameters):
        p = dict(zip(names, parameters))
        return torch.func.functional_call(op, p, t)

    compare(ours, plain, (drawn(2, 3, 4, 6), *parameters))


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


@pytest.mark.parametrize('with_gain', [False, True])
@pytest.mark.parametrize('with_initial', [False, True])
@pytest.mark.parametrize('rank', [1, 3])
@pytest.mark.parametrize('rows', [[(0, 4), (8, 12)], [(4, 8)], [(0, 12)]])
def test_low_rank_linear(rows, rank, with_initial, with_gain):
    torch.manual_seed(0)
    sizes = [stop - start for start, stop in rows]
    factors = ((len(rows) * rank, 5), (sum(sizes), rank))
    initial = [drawn(*f).detach() for f in factors] if with_initial else None
    weight = drawn(12, 5).detach()

    def ours(x, bias, down, up, gain=None):
        return low_rank_linear(x, weight, bias, rows, down, up, .7, initial,
                               gain)

    def plain(x, bias, down, up, gain=None):
        out = list((x @ weight.t()).split(4, -1))
        for sign, pair in ((1, (down, up)), (-1, initial)):
            if pair is None:
                continue
            parts = zip(rows, pair[0].split(rank), pair[1].split(sizes))
            for (start, stop), a, b in parts:
                update = sign * .7 * (x @ a.t() @ b.t())
                for i, part in zip(
                        range(start // 4, stop // 4), update.split(4, -1)):
                    out[i] = out[i] + part
        out = list(torch.cat(out, -1).split(1, -1))
        for i, row in enumerate(r for pair in rows for r in range(*pair)):
            out[row] = out[row] if gain is None else gain[i] * out[row]
        return torch.cat(out, -1) + bias

    inputs = (drawn(2, 3, 5), drawn(12), *(drawn(*f) for f in factors))
    if with_gain:
        inputs += (drawn(sum(sizes)), )
    compare(ours, plain, inputs)
    # By thin products where all rows have an update of rank 1.
    assert (sum(sizes) > 4 * factors[0][0]) == (sizes == [12] and rank == 1)
    equal = (torch.zeros_like(inputs[2]), torch.zeros_like(inputs[3]))
    stock = F.linear(inputs[0], weight, inputs[1])
    given = initial or equal
    found = low_rank_linear(inputs[0], weight, inputs[1], rows, *given, .7,
                            initial, *(torch.ones_like(g) for g in inputs[4:]))
    assert torch.equal(found, stock)


@pytest.mark.parametrize('size', [3, 5, 7])
def test_depthwise(size):
    torch.manual_seed(0)
    tokens, kernel = drawn(2, 5 * 7, 3), drawn(3, 1, size, size)
    grad = drawn(2, 5 * 7, 3)
    # (B, H * W, C) -> (B, C, H, W) and back
    grid = tokens.transpose(1, 2).unflatten(2, (5, 7))
    grid = F.conv2d(grid, kernel, padding=size // 2, groups=3)
    expected = grid.flatten(2).transpose(1, 2)
    assert torch.allclose(depthwise(tokens, kernel, (5, 7)), expected)
    wanted = torch.autograd.grad(expected, (tokens, kernel), grad)
    found = depthwise_backward(grad, tokens, kernel, (5, 7))
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, atol=1e-12)
    for tile in (1, 3, 4, 32):
        found = kernel_grad(grad, tokens, kernel, (5, 7), tile)
        assert torch.allclose(found, wanted[1], atol=1e-12)


@pytest.mark.parametrize('rate', [0., .4])
def test_activate(rate):
    """The draw is that of nn.Dropout, and the gradient knows it."""
    dropout = nn.Dropout(rate).double()
    x = drawn(3, 40)
    results = []
    for run in (lambda: dropout(F.gelu(x)),
                lambda: activate(F.gelu, x, dropout)):
        torch.manual_seed(0)
        with Recipes(x, lean=True):
            y = run()
        grad, = torch.autograd.grad((y**3).sum(), x)
        results.append((y.detach(), grad))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-14)
    assert torch.equal(activate(torch.relu, x, dropout.eval()), torch.relu(x))
