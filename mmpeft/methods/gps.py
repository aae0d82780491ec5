import math
from typing import Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import LINEAR_SITES, Site, TokenLayout
from .base import Selector, check_width
from .calibrated import Calibrated

__all__ = ['GPS']

#: Entries of a row up to which each is a gather of its own.
FEW = 3
NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class Biases(Selector):
    """All biases but those of norms, tables of positions included."""

    def selects(self, module: nn.Module, leaf: str) -> bool:
        # Fused in nn.MultiheadAttention; that of q and v may be apart.
        return not isinstance(module, NORMS) and leaf in (
            'bias', 'in_proj_bias', 'q_bias', 'v_bias',
            'relative_position_bias_table')


@METHODS.register_module()
class GPS(Calibrated):
    """Train a few input weights of each neuron, and the biases.

    `Gradient-based Parameter Selection for Efficient Fine-Tuning
    <https://arxiv.org/abs/2312.10136>`_ (CVPR 2024). Of each row of a weight
    the ``num_inputs`` entries with the largest gradient of the loss are
    chosen, by one pass over training data::

        y_o <- y_o + sum_k values[o, k] * x[index[o, k]]

    The paper trains the whole weight and masks its gradient. Here the weight
    stays frozen, and what is added to the chosen entries is a parameter of its
    own, with the same gradient: no dense gradients, masks or states of the
    optimizer, and decay and momentum cannot move other entries, whatever the
    optimizer. A delta holds indices and values, and merging adds them up. The
    optimizer's steps are the same but for weight decay, 0 in the paper, which
    pulls here to the base and there to 0.

    Starts at the identity (``values = 0``). Weights are those of all linear
    layers of the blocks, of the stem and of patch mergings. All biases train
    in place, with tables of relative positions, as in the released code.
    Norms, positions and class token stay frozen.

    The gradient is that of the task's own loss. The paper takes a contrastive
    one for classification: ``CalibrateHook(loss='contrastive')``.

    Args:
        site (Site): Where it is attached; gives the widths.
        num_inputs (int): Entries of each row. Defaults to 1.

    Raises:
        PEFTError: For more inputs than a layer has.
    """

    key = 'gps'
    sites = LINEAR_SITES
    parts = ('patch_embed', 'merge_linear')
    needs_layer = True
    needs_gradients = True
    no_merge = None

    def __init__(self, site: Site, num_inputs: int = 1) -> None:
        super().__init__(site)
        # How many there are is known with the layer.
        check_width('GPS', 'num_inputs', num_inputs, math.inf)
        shape = (site.out_dims, num_inputs)
        self.values = nn.Parameter(torch.empty(shape))
        self.register_buffer('index', torch.empty(shape, dtype=torch.int32))
        self.reset_parameters()

    @classmethod
    def selector(cls, **kwargs) -> Selector:
        return Biases()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.values)
        self.forget()

    def bind_layer(self, layer: nn.Module) -> None:
        super().bind_layer(layer)
        check_width('GPS', 'num_inputs', self.values.shape[1],
                    self.num_candidates)

    def start_from_layer(self) -> None:
        # Another base has other gradients.
        self.forget()

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        if not self.ready():
            return y
        layer = self.stock_layer
        if layer.weight[0].numel() == x.shape[-1]:
            return SparseProduct.apply(x, y, self.values, self.index)
        # A stem: (B, H, W, C) -> (B, C, H, W), and back
        kernel = dense(self.values, self.index, self.num_candidates)
        kernel = kernel.view_as(layer.weight)
        added = layer._conv_forward(x.movedim(-1, 1), kernel, None)
        return y + added.movedim(1, -1).to(y.dtype)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        if self.is_calibrated:
            values = self.values.to(weight)
            weight = weight + dense(values, self.index, weight.shape[1])
        return weight, bias

    @property
    def num_candidates(self) -> int:
        return self.stock_layer.weight[0].numel()

    def total(self, num_classes: int) -> Tensor:
        weight = self.stock_layer.weight
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return grad.flatten(1)

    def chosen(self, total: Tensor) -> Tensor:
        if not torch.isfinite(total).all():
            raise PEFTError(f'{self.title}: the gradient of the loss is not '
                            'finite, so there is nothing to choose by.')
        return self.largest(total.abs(), self.values.shape[1])


class SparseProduct(Function):
    """``y + S x`` for a matrix S with the same few entries in each row.

    Keeps ``x`` alone. With more than :data:`FEW` entries a product with a
    dense S takes less time than one for each.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, values: Tensor,
                index: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, index)
        if values.shape[1] > FEW:
            weight = dense(values, index, x.shape[-1])
            return y + (x.to(weight.dtype) @ weight.t()).to(y.dtype)
        for value, inputs in zip(values.t(), index.t()):
            y = y + (x.index_select(-1, inputs) * value).to(y.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple:
        x, values, index = ctx.saved_tensors
        few = values.shape[1] <= FEW
        # (tokens, out_dims), (tokens, in_dims)
        flat, rows = (t.flatten(0, -2).to(values.dtype) for t in (grad, x))
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            if few:
                # Transposed, as rows can be added at once.
                total = flat.new_zeros(rows.shape[::-1])
                for value, inputs in zip(values.t(), index.t()):
                    total.index_add_(0, inputs,
                                     (flat * value).t().contiguous())
                # GELU of torch 2.1 takes any strides for those of rows.
                total = total.t().contiguous()
            else:
                total = flat @ dense(values, index, x.shape[-1])
            grad_x = total.view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[2]:
            if few:
                grad_values = torch.stack(
                    [(flat * rows.index_select(-1, inputs)).sum(0)
                     for inputs in index.t()], 1)
            else:
                grad_values = (flat.t() @ rows).gather(1, index.long())
        return grad_x, grad, grad_values, None


def dense(values: Tensor, index: Tensor, in_dims: int) -> Tensor:
    """The matrix with these entries, (out_dims, in_dims)."""
    zeros = values.new_zeros(len(values), in_dims)
    return zeros.scatter_add(1, index.long(), values)
