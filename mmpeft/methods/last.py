import math
from typing import Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..recompute import recomputed
from ..registry import METHODS
from ..sites import TokenLayout
from .base import check_width
from .highway import Highway, run
from .side import Trunk, TrunkBlock
from .windows import attention_beside

__all__ = ['LAST', 'LowRankAttention']


class LowRankAttention(nn.Module):
    """Self-attention of width ``rank``, without biases::

        q, k, v = split(W LN(x)),    W3 softmax(q k^T / sqrt(rank)) v

    Args:
        embed_dims (int): Width ``d`` of the tokens.
        rank (int): Width of q, k and v; there is one head.
    """

    def __init__(self, embed_dims: int, rank: int) -> None:
        super().__init__()
        # Bare parameters: initialisation by layer type never meets them.
        self.qkv = nn.Parameter(torch.empty(3 * rank, embed_dims))
        self.out = nn.Parameter(torch.empty(embed_dims, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.qkv, a=math.sqrt(5))
        nn.init.zeros_(self.out)

    def forward(self, x: Tensor, block: TrunkBlock,
                layout: TokenLayout) -> Tensor:
        """(B, N, d) -> (B, N, d)"""
        normed = recomputed(F.layer_norm, x, x.shape[-1:])
        qkv = F.linear(normed, self.qkv)
        return F.linear(attention_beside(qkv, 1, block, layout), self.out)


@METHODS.register_module()
class LAST(Highway):
    """Low-rank attention beside the backbone, fed by its blocks.

    `Low-rank Attention Side-Tuning for Parameter-Efficient Fine-Tuning
    <https://arxiv.org/abs/2402.04009>`_ (2024). There ``v = u + z`` with the
    output ``z`` of a block, ``u <- v + LSA(v)``, and the head reads ``u``
    less the sum of all ``z``, which leaves the sum of the LSA. No code was
    released; here the stream ``u`` is that sum from the start, and what each
    block adds to the backbone's tokens stands for its ``z``, so that the sum
    of the ``z`` is the tokens ``y`` themselves::

        u <- u + LSA(y + u),    out = norm(x + u)

    Sums of whole token streams would grow with the depth, and the softmax
    saturate. For the same reason LSA norms its input, without parameters: the
    count is the four matrices. Attention is in the windows of the block
    beside it. How the stream goes on to the next stage, and what is added at
    the outputs, is :class:`~mmpeft.methods.highway.Highway`'s and not the
    paper's, which is about ViT and reads ``u`` alone.

    It starts at the frozen model (``W3 = 0``), and no gradient passes through
    a block of the backbone.

    Args:
        trunk (Trunk): What it runs beside.
        rank (int): Width of the attention. Defaults to 16.
        with_cp (bool, optional): Whether backward computes LSA again
            instead of keeping what is inside. Defaults to None, which leaves
            it to the ``memory`` of the backbone: ``'lean'`` does, ``'fast'``
            computes again what takes no product, ``'stock'`` keeps all.

    Raises:
        PEFTError: If ``rank`` exceeds the width of a stage.
    """

    key = 'last'

    def __init__(self,
                 trunk: Trunk,
                 rank: int = 16,
                 with_cp: Optional[bool] = None) -> None:
        super().__init__(trunk, with_cp)
        for dims in trunk.stage_dims.values():
            check_width('LAST', 'rank', rank, dims)
        self.blocks = nn.ModuleDict({
            str(b.index):
            LowRankAttention(b.embed_dims, rank)
            for b in trunk.blocks
        })

    def reset_parameters(self) -> None:
        for module in self.blocks.values():
            module.reset_parameters()

    def update(self, u: Tensor, block: TrunkBlock, y: Tensor,
               taps: Dict[str, Tensor], layout: TokenLayout) -> Tensor:
        return run(self, self.blocks[str(block.index)], y + u, block, layout)
