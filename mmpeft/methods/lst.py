import math
from typing import Callable, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..recompute import recomputed
from ..registry import METHODS
from ..sites import TokenLayout
from .base import check_positive, check_width
from .highway import run
from .side import SideNetwork, Trunk, TrunkBlock
from .windows import attention_beside, partition

__all__ = ['LST', 'SideBlock', 'SideMerging']


class SideBlock(nn.Module):
    """A plain pre-norm transformer block, with a gate at its input::

        t = g * u + (1 - g) * D z,    g = sigmoid(gate / temperature)
        t <- t + attention(norm1(t))
        t <- t + mlp(norm2(t))

    Args:
        block (TrunkBlock): The block that it runs beside.
        reduction (int): By how much it is narrower.
        temperature (float): Divisor of the gate.
    """

    def __init__(self, block: TrunkBlock, reduction: int,
                 temperature: float) -> None:
        super().__init__()
        dims = block.embed_dims // reduction
        self.place = block
        self.temperature = temperature
        # As many heads as the backbone's block has, narrower ones, as in the
        # released code; fewer where they do not divide the width.
        self.num_heads = math.gcd(dims, block.num_heads)
        self.gate = nn.Parameter(torch.empty(1))
        self.down = nn.Linear(block.embed_dims, dims)
        self.norm1 = nn.LayerNorm(dims)
        self.qkv = nn.Linear(dims, 3 * dims)
        self.proj = nn.Linear(dims, dims)
        self.norm2 = nn.LayerNorm(dims)
        self.fc1 = nn.Linear(dims, block.mlp_dims // reduction)
        self.fc2 = nn.Linear(block.mlp_dims // reduction, dims)

    def forward(self, u: Tensor, z: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d / reduction), (B, N, d) -> (B, N, d / reduction)"""
        gate = torch.sigmoid(self.gate / self.temperature)
        t = gate * u + (1 - gate) * self.down(z)
        qkv = self.qkv(recomputed(self.norm1, t))
        seen = attention_beside(qkv, self.num_heads, self.place, layout)
        t = t + self.proj(seen)
        h = self.fc1(recomputed(self.norm2, t))
        return t + self.fc2(recomputed(F.gelu, h))


class SideMerging(nn.Module):
    """Patch merging: norm and reduction of 2 x 2 tokens.

    Args:
        in_dims (int): Width before.
        out_dims (int): Width after.
    """

    def __init__(self, in_dims: int, out_dims: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dims)
        self.reduction = nn.Linear(4 * in_dims, out_dims, bias=False)

    def forward(self, u: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H * W, in_dims) -> (B, H / 2 * W / 2, out_dims)"""
        # (B, H / 2 * W / 2, 4, in_dims), zeros behind an odd map
        u = partition(u, layout.hw_shape, 2).flatten(2)
        return self.reduction(self.norm(u))


@METHODS.register_module()
class LST(SideNetwork):
    """A narrow transformer beside the backbone, fed by its blocks.

    `LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
    Learning <https://arxiv.org/abs/2206.06522>`_ (NeurIPS 2022)::

        u <- block(g * u + (1 - g) * D z),    g = sigmoid(gate / temperature)
        out = norm(x + U u)

    ``z`` is the output of the backbone's block, ``D`` and ``U`` change the
    width, and ``u`` starts as ``D0`` of the tokens that enter the first
    block. No gradient passes through the backbone.

    The paper is about language; for Swin, each block has one beside it, of
    1 / ``reduction`` of its width, in the same windows and without a
    relative-position bias; the ladder has patch mergings of its own, and one
    ``U`` for each output. The paper's head reads ``U u`` alone, which is
    ``residual=False``: behind a ``U`` of rank ``d / reduction`` the neck would
    see nothing else of the frozen features. With the residual ``U`` starts at
    0, and so at the frozen model. The released code has a norm before ``U``,
    which the published counts do not have; and the paper starts the ladder
    from the backbone's weights, pruned by their Fisher information, where
    here it starts at random.

    Args:
        trunk (Trunk): What it runs beside.
        reduction (int): By how much the ladder is narrower. Defaults to 8.
        temperature (float): Divisor of the gates. Defaults to 0.1.
        residual (bool): Whether ``U u`` is added to the backbone's outputs
            instead of taking their place. Defaults to True.
        with_cp (bool, optional): Whether backward computes the blocks again
            instead of keeping what is inside. Defaults to None, which leaves
            it to the ``memory`` of the backbone: ``'lean'`` does, ``'fast'``
            computes again what takes no product, ``'stock'`` keeps all.

    Raises:
        PEFTError: If ``reduction`` exceeds the width of a stage, or for a
            ``temperature`` that is not above 0.
    """

    key = 'lst'

    def __init__(self,
                 trunk: Trunk,
                 reduction: int = 8,
                 temperature: float = 0.1,
                 residual: bool = True,
                 with_cp: Optional[bool] = None) -> None:
        super().__init__(trunk)
        check_positive('LST', 'temperature', temperature)
        for dims in trunk.stage_dims.values():
            check_width('LST', 'reduction', reduction, dims)
        self.residual = residual
        self.with_cp = with_cp
        widths = {s: d // reduction for s, d in trunk.stage_dims.items()}
        first = trunk.blocks[0]
        self.down = nn.Linear(first.embed_dims, widths[first.stage])
        self.blocks = nn.ModuleDict({
            str(b.index):
            SideBlock(b, reduction, temperature)
            for b in trunk.blocks
        })
        self.mergings = nn.ModuleDict({
            str(s):
            SideMerging(widths[s - 1], widths[s])
            for s in widths if s - 1 in widths
        })
        self.ups = nn.ModuleDict({
            str(s):
            nn.Linear(widths[s], trunk.stage_dims[s])
            for s in trunk.outputs
        })
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        for block in self.blocks.values():
            nn.init.zeros_(block.gate)
        if self.residual:
            for up in self.ups.values():
                nn.init.zeros_(up.weight)
                nn.init.zeros_(up.bias)

    def start(self, x: Tensor, layout: TokenLayout) -> Tensor:
        return self.down(x)

    def step(self, u: Tensor, block: TrunkBlock, x: Tensor, y: Tensor,
             taps: Dict[str, Tensor], layout: TokenLayout) -> Tensor:
        return run(self, self.blocks[str(block.index)], u, y, layout)

    def next_stage(self, u: Tensor, stage: int, downsample: Callable,
                   layout: TokenLayout) -> Tensor:
        return run(self, self.mergings[str(stage)], u, layout)

    def output(self, u: Tensor, x: Tensor, stage: int,
               layout: TokenLayout) -> Tensor:
        out = self.ups[str(stage)](u)
        return x + out if self.residual else out
