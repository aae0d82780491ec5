import math
from typing import Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_width

__all__ = ['PrefixTuning']


@METHODS.register_module()
class PrefixTuning(PEFTModule):
    """Learned keys and values before those of the attention.

    `Prefix-Tuning: Optimizing Continuous Prompts for Generation
    <https://arxiv.org/abs/2101.00190>`_ (ACL 2021)::

        K <- [P_K; K],    V <- [P_V; V]

    In Swin they are the same for all windows of a block, without
    relative-position bias and mask. With ``reparam`` they come from a network,
    as in the paper while it trains (there one network makes the prefixes of
    all layers; here each block, of another width, has its own)::

        [P_K, P_V] = W2 tanh(W1 E + b1) + b2

    There is no identity to start from: even a prefix of zeros takes part of
    the attention's weight. The code under this name in V-PETL Bench joins
    channels instead of tokens and fails on a shape error; this is written
    from the paper.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        num_tokens (int): Keys and values ``p`` of a block. Defaults to 20.
        reparam (bool): Whether a network makes the prefix. Defaults to False.
        dim (int): Hidden channels of that network. Defaults to 512.
        init_std (float): Standard deviation of the normal that the prefix,
            or ``E``, starts from, above 0. The libraries peft and adapters
            take 1. Defaults to 0.02.

    Raises:
        PEFTError: If ``num_tokens`` or ``dim`` is not a whole number above
            0, or ``init_std`` is not above 0.
    """

    sites = ('attn_kv', )
    no_merge = 'its prefix stands in the attention, not in a weight'

    def __init__(self,
                 site: Site,
                 num_tokens: int = 20,
                 reparam: bool = False,
                 dim: int = 512,
                 init_std: float = 0.02) -> None:
        super().__init__(site)
        check_width('PrefixTuning', 'num_tokens', num_tokens, math.inf)
        check_width('PrefixTuning', 'dim', dim, math.inf)
        self.init_std = check_positive('PrefixTuning', 'init_std', init_std)
        dims = site.embed_dims
        self.reparam = reparam
        if reparam:
            self.embedding = nn.Parameter(torch.empty(num_tokens, dims))
            self.hidden = nn.Linear(dims, dim)
            self.out = nn.Linear(dim, 2 * dims)
        else:
            self.keys = nn.Parameter(torch.empty(num_tokens, dims))
            self.values = nn.Parameter(torch.empty(num_tokens, dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=self.init_std)
        for linear in self.children():
            linear.reset_parameters()

    def prefix(self) -> Tuple[Tensor, Tensor]:
        """-> keys (p, d), values (p, d)"""
        if not self.reparam:
            return self.keys, self.values
        hidden = torch.tanh(self.hidden(self.embedding))
        return self.out(hidden).chunk(2, dim=-1)

    def forward(self, x: Tensor, y: Tuple[Tensor, Tensor],
                layout: TokenLayout) -> Tuple[Tensor, Tensor]:
        """(B, N, d), two of (B or 1, others, d) -> two of (B or 1, others + p,
        d)"""
        return tuple(
            torch.cat([t, own.expand(t.shape[0], -1, -1)], dim=1)
            for t, own in zip(y, self.prefix()))
