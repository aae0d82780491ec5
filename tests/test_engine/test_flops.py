"""Operations of products, against counts by hand."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmpeft.engine.flops import FlopCounter


def flops(call):
    with FlopCounter() as counter:
        call()
    return counter.flops


def test_linear_layers():
    """Nothing passes the first one on, and nobody asks for the gradient of
    what does not train."""
    model = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 6))
    x = torch.randn(2, 3, 8)
    first, second = 2 * 6 * 8 * 4, 2 * 6 * 4 * 6

    def step():
        model(x).sum().backward()

    assert flops(lambda: model(x)) == first + second
    assert flops(step) == 2 * first + 3 * second
    model[0].requires_grad_(False)
    assert flops(step) == first + 2 * second
    model.requires_grad_(False)
    x.requires_grad_(True)
    assert flops(step) == 2 * first + 2 * second


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_convolutions(groups):
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups)
    x = torch.randn(2, 4, 5, 7, requires_grad=True)
    once = 2 * 2 * 8 * 5 * 7 * (4 // groups) * 9
    assert flops(lambda: conv(x)) == once
    assert flops(lambda: conv(x).sum().backward()) == 3 * once
    conv.weight.requires_grad_(False)
    assert flops(lambda: conv(x).sum().backward()) == 2 * once


def test_transposed_convolution():
    conv = nn.ConvTranspose2d(4, 6, 2, stride=2)
    x = torch.randn(2, 4, 5, 7, requires_grad=True)
    once = 2 * 2 * 4 * 5 * 7 * 6 * 4
    assert flops(lambda: conv(x)) == once
    assert flops(lambda: conv(x).sum().backward()) == 3 * once


def test_attention():
    """Fused or not, the scores of a fused one being made again."""
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    once = 2 * 2 * 3 * 5 * 7 * 8

    def plain():
        return F.softmax(q @ k.transpose(-1, -2), -1) @ v

    def fused():
        return F.scaled_dot_product_attention(q, k, v)

    assert flops(plain) == flops(fused) == 2 * once
    assert flops(lambda: plain().sum().backward()) == 6 * once
    assert flops(lambda: fused().sum().backward()) in (6 * once, 7 * once)
