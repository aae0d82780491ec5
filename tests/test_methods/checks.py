"""What every attached module is held to, given its formula."""
from typing import Callable

import torch
import torch.nn as nn
from torch import Tensor

from mmpeft.sites import TokenLayout
from . import reference
from .recorded import difference, digest, fill, load, tensor
from .swins import swin

# Relative to the largest entry. The reference always runs in float64.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def check_close(ours: Tensor, expected, tolerance: float, what: str) -> float:
    """Compare, with the difference in the message."""
    found = difference(ours, expected)
    assert found <= tolerance, (
        f'{what}: differs by {found:.2e} of its largest entry, more than '
        f'{tolerance:.0e}')
    return found


def check_gradients(module: nn.Module, leaves: dict, dtype: torch.dtype,
                    what: str) -> None:
    """Every gradient of a module against those of the reference.

    That of a single number is a sum over a whole map, whose terms cancel: in
    float32 ten times the tolerance is its rounding. float64 tells the rest.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f'{what}: {name} has none'
            cancels = parameter.numel() == 1 and dtype == torch.float32
            check_close(parameter.grad, leaves[name].grad,
                        TOLERANCE[dtype] * (10 if cancels else 1),
                        f'{what}: gradient of {name}')


def check_module(module: nn.Module, formula: Callable, x: Tensor, y: Tensor,
                 layout: TokenLayout, dtype: torch.dtype) -> None:
    """Output and all gradients of one module against its formula.

    Args:
        module (nn.Module): The attached module; filled here.
        formula (Callable): ``(x, y, parameters) -> y`` in plain operations.
        x (Tensor), y (Tensor): Inputs in float64.
        layout (TokenLayout): Arrangement of the tokens.
        dtype (torch.dtype): Precision the module runs in.
    """
    fill(module)
    module.to(dtype).train()
    inputs = [t.to(dtype).requires_grad_() for t in (x, y)]
    plain = [t.to(dtype).double().requires_grad_() for t in (x, y)]
    leaves = reference.parameters(module)
    out, expected = module(*inputs, layout), formula(*plain, leaves)
    check_close(out, expected, TOLERANCE[dtype], 'output')
    # Rounded first, so that both sides are given the same numbers.
    weight = tensor('weight', *out.shape, dtype=dtype)
    (out * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    check_gradients(module, leaves, dtype, type(module).__name__)
    for name, ours, theirs in zip('xy', inputs, plain):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            check_close(ours.grad, theirs.grad, TOLERANCE[dtype],
                        f'gradient of {name}')


def check_block(library: str,
                method: dict,
                composition: Callable,
                drop_path_rate: float = 0.,
                dtype: torch.dtype = torch.float64) -> None:
    """A whole stock block with a method against a composition by hand.

    The second block is taken, as it shifts its windows, with a map of 7 x 5
    tokens that windows of 4 do not divide.

    Args:
        composition (Callable): ``(x, p, attention, mlp, drop) -> x``; gets the
            stock branches of the reference and its drop-path.
    """
    hw, heads, window, seed = (7, 5), 2, 4, 3
    backbone = swin(
        library, method, drop_path_rate=drop_path_rate, depths=(2, ))
    block = backbone.stages[0].blocks[1]
    fill(block)
    block.to(dtype).train()
    leaves = reference.parameters(block)
    x = tensor('stream', 6, hw[0] * hw[1], 16, dtype=dtype)
    ours, plain = x.clone().requires_grad_(), x.double().requires_grad_()
    drop = reference.SeededDropPath(drop_path_rate, seed, dtype)

    def attention(z, p=leaves):
        return reference.attention_branch(z, hw, p, heads, window, window // 2)

    def mlp(z, p=leaves):
        return reference.mlp_branch(z, p)

    torch.manual_seed(seed)
    out = block(ours, hw)
    expected = composition(plain, leaves, attention, mlp, drop)
    check_close(out, expected, TOLERANCE[dtype], f'{library} block')
    weight = tensor('weight', *out.shape, dtype=dtype)
    (out * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    check_close(ours.grad, plain.grad, TOLERANCE[dtype], 'gradient of x')
    check_gradients(block, leaves, dtype, f'{library} block')


def check_released_module(case: str, module: nn.Module, run: Callable,
                          shape: tuple, dtype: torch.dtype) -> float:
    """Output and gradients of a module against the released code.

    Args:
        run (Callable): ``(module, x) -> y``.

    Returns:
        float: The largest difference.
    """
    recorded = load(case)
    # Gradients of the released code in float32 are within 7e-6 of its own
    # float64; what is stored is float32.
    outs, grads = (1e-5, 1e-4) if dtype is torch.float32 else (2e-7, 2e-7)
    fill(module.to(dtype))
    module.train()
    x = tensor('x', *shape, dtype=dtype).requires_grad_()
    y = run(module, x)
    (y * tensor('weight', *y.shape, dtype=dtype)).sum().backward()
    found = {
        n: p.grad
        for n, p in module.named_parameters() if p.grad is not None
    }
    worst = [
        check_close(y, recorded['out'], outs, 'output'),
        check_close(x.grad, recorded['grad_x'], grads, 'gradient of x')
    ]
    return max(worst + _check_digests(recorded, found, grads))


def check_released_backbone(case: str, library: str, method, dtype,
                            **kwargs) -> float:
    """A whole backbone against the released one: what trains, what comes out
    and every gradient."""
    recorded = load(case)
    outs, grads = (1e-5, 1e-4) if dtype is torch.float32 else (2e-7, 2e-7)
    backbone = swin(library, method, **kwargs)
    fill(backbone.to(dtype))
    backbone.train()
    replace_drop_path(backbone)
    features = backbone(tensor('image', 2, 3, 36, 28, dtype=dtype))
    loss, worst = 0., []
    for i, out in enumerate(features):
        loss += (out * tensor(f'weight {i}', *out.shape, dtype=dtype)).sum()
        mine = digest(f'out{i}', out.detach().numpy())
        worst.append(
            check_close(mine, recorded[f'out{i}_digest'], outs, f'output {i}'))
        if f'out{i}' in recorded:
            worst.append(
                check_close(out[0], recorded[f'out{i}'], outs, f'output {i}'))
    loss.backward()
    found = {
        n: p.grad
        for n, p in backbone.named_parameters() if p.requires_grad
    }
    return max(worst + _check_digests(recorded, found, grads))


class Half(nn.Module):
    """In the place of drop-path: a factor, so that its place is seen."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def replace_drop_path(backbone: nn.Module) -> None:
    """Put :class:`Half` wherever the stock blocks have their drop-path."""
    for stage in backbone.stages:
        for block in stage.blocks:
            block.ffn.dropout_layer = Half()
            if hasattr(block, 'attn_drop_path'):
                block.attn_drop_path = Half()
            else:
                block.attn.drop = Half()


def _check_digests(recorded: dict, found: dict, tolerance: float) -> list:
    names = str(recorded['names']).split('\n')
    assert sorted(found) == names
    worst = []
    for name, row in zip(names, recorded['grads']):
        mine = digest(name, found[name].numpy())
        # A digit is a sum with random signs, of the size of the whole
        # gradient, so the gradient's norm and not the digit is the measure.
        gap = abs(mine - row).max() / float(found[name].double().norm())
        assert gap <= 2 * tolerance, f'gradient of {name}: {gap:.2e}'
        worst.append(gap)
        if f'grad {name}' in recorded:
            worst.append(
                check_close(found[name], recorded[f'grad {name}'], tolerance,
                            f'gradient of {name}'))
    return worst
