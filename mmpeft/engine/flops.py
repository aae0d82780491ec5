"""Operations of the products of a step, forward and backward."""
from math import prod
from typing import Any, Callable, Dict

from torch import Size, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ['FUSED_ATTENTION', 'FlopCounter']


class FlopCounter(TorchDispatchMode):
    """Adds up the floating point operations of matrix products, convolutions
    and fused attention while it is active, a multiplication and an addition
    being two.

    It sees what is computed below autograd: gradients that nobody needs do not
    count, and what is computed twice counts twice. Norms, activations and sums
    do not count, as they wait for memory. ``torch.utils.flop_counter`` takes
    the gradient of a grouped filter for that of a full one, and does not know
    the attention of a CPU.

    Attributes:
        flops (int): The sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(str(func.overloadpacket))
        if formula is not None:
            shapes = tree_map(_shape, args)
            self.flops += 2 * formula(_shape(out), *shapes)
        return out


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else value


def _product(out: Size, a: Size, b: Size, *args: Any) -> int:
    """(..., n, m) (..., m, k)"""
    return prod(out) * a[-1]


def _product_and_sum(out: Size, added: Size, a: Size, b: Size, *args:
                     Any) -> int:
    return _product(out, a, b)


def _convolution(out: Size, x: Size, weight: Size, bias: Any, stride: Any,
                 padding: Any, dilation: Any, transposed: bool, *args:
                 Any) -> int:
    # Each place of the smaller map meets a filter, of its group alone.
    return prod(x if transposed else out) * prod(weight[1:])


def _convolution_backward(out: Any, grad: Size, x: Size, weight: Size,
                          sizes: Any, stride: Any, padding: Any, dilation: Any,
                          transposed: bool, output_padding: Any, groups: int,
                          mask: list) -> int:
    one = prod(x if transposed else grad) * prod(weight[1:])
    return one * sum(mask[:2])


def _attention(out: Any, q: Size, k: Size, v: Size, *args: Any) -> int:
    """(B, heads, tokens, channels); scores, and sums of values."""
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _attention_backward(out: Any, grad: Size, q: Size, k: Size, v: Size, *args:
                        Any) -> int:
    """The scores again, and a gradient of each factor of both products."""
    return prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


#: Kernels of fused attention, of whatever version and device.
FUSED_ATTENTION = tuple(f'_scaled_dot_product_{name}'
                        for name in ('flash_attention_for_cpu',
                                     'flash_attention', 'efficient_attention',
                                     'cudnn_attention'))
# By name, as no version of PyTorch has all of them.
_FORMULAS: Dict[str, Callable[..., int]] = {
    'aten.mm': _product,
    'aten.bmm': _product,
    'aten.addmm': _product_and_sum,
    'aten.baddbmm': _product_and_sum,
    'aten.convolution': _convolution,
    'aten.convolution_backward': _convolution_backward,
}
for _name in FUSED_ATTENTION:
    _FORMULAS[f'aten.{_name}'] = _attention
    _FORMULAS[f'aten.{_name}_backward'] = _attention_backward
