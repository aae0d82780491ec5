import math
from typing import Any, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_rate, check_width

__all__ = ['Prompts', 'VPTDeep', 'VPTShallow']

NO_MERGE = 'its prompts are tokens of the attention, not part of a weight'


class Prompts(nn.Module):
    """Learned tokens that start from ``U(-v, v)``,
    ``v = sqrt(6 / (3 * patch_size**2 + stem_dims))``.

    As in the released code, prompts of wider stages start from the bound of
    the stem, too.

    Args:
        owner (str): Name of the method, for messages.
        site (Site): Gives the width ``d`` of the tokens, and the stem.
        num_tokens (int): Number of tokens ``p``.
        drop_rate (float): Dropout probability, in [0, 1).
    """

    def __init__(self, owner: str, site: Site, num_tokens: int,
                 drop_rate: float) -> None:
        super().__init__()
        # Any number of tokens can join; the cost is the only limit.
        check_width(owner, 'num_tokens', num_tokens, math.inf)
        fan = 3 * site.patch_size**2 + site.stem_dims
        self.bound = math.sqrt(6 / fan)
        self.weight = nn.Parameter(torch.empty(num_tokens, site.embed_dims))
        self.dropout = nn.Dropout(check_rate(owner, 'drop_rate', drop_rate))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tokens."""
        nn.init.uniform_(self.weight, -self.bound, self.bound)

    def forward(self, batch: int) -> Tensor:
        """-> (batch, p, d); every sample has its own dropout."""
        return self.dropout(self.weight.expand(batch, -1, -1))


@METHODS.register_module()
class VPTDeep(PEFTModule):
    """Prompts of its own in every block.

    `Visual Prompt Tuning <https://arxiv.org/abs/2203.12119>`_ (ECCV 2022)::

        x <- x + drop_path(attn(norm1([P; x]))[p:])

    In Swin the prompts join every window, without relative-position bias and
    mask. What becomes of them is dropped at the next block, which has others,
    so here they give keys and values and are not even asked: the same output
    for less. No identity at the start.

    The paper searches ``p`` for each task and its code has 5; 50 is ours, for
    dense tasks, where the Swin code released with CoLin has ``num_tokens=49,
    norm=False``. Not here: the released option that projects prompts of
    another width.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        num_tokens (int): Prompts ``p`` of a block. Defaults to 50.
        norm (bool): Whether the prompts pass the norm before the attention;
            otherwise they join behind it. Defaults to True.
        drop_rate (float): Dropout probability of prompt entries, in [0, 1).
            Defaults to 0.

    Raises:
        PEFTError: If ``num_tokens`` is not a whole number above 0.
    """

    key = 'vpt_deep'
    sites = ('tokens', )
    no_merge = NO_MERGE

    def __init__(self,
                 site: Site,
                 num_tokens: int = 50,
                 norm: bool = True,
                 drop_rate: float = 0.) -> None:
        super().__init__(site)
        self.prompts = Prompts('VPTDeep', site, num_tokens, drop_rate)

    @classmethod
    def sites_for(cls, norm: bool = True, **kwargs) -> Sequence[str]:
        return ('tokens', ) if norm else ('attn_tokens', )

    def reset_parameters(self) -> None:
        self.prompts.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, others, d) -> (B, others + p, d)"""
        return torch.cat([y, self.prompts(x.shape[0])], dim=1)


@METHODS.register_module()
class VPTShallow(PEFTModule):
    """Prompts before the first block, which go through all of them.

    `Visual Prompt Tuning <https://arxiv.org/abs/2203.12119>`_ (ECCV 2022)::

        [P; x] <- block([P; x])

    In Swin the prompts join every window, and their attention output is the
    mean over the windows of a sample; they pass the MLP and the frozen patch
    merging, where a prompt stands for all four neighbours. The released Swin
    code orders its windows in two ways, so that prompts of one sample join
    windows of another; here every sample keeps its own. No identity at the
    start.

    The only parameters, ``p`` tokens of the first block's width, belong to
    the backbone (``backbone.peft.vpt_shallow``). Not here: the released option
    that projects prompts of another width.

    Args:
        site (Site): Where it is attached.
        num_tokens (int): Prompts ``p``. Defaults to 100, as in V-PETL Bench;
            the paper searches it for each task.
        drop_rate (float): Dropout probability of prompt entries, in [0, 1).
            Defaults to 0.

    Raises:
        PEFTError: If ``num_tokens`` is not a whole number above 0, or
            ``layers`` leaves out a block between two others.
    """

    key = 'vpt_shallow'
    sites = ('tokens', )
    carries = True
    no_merge = NO_MERGE

    def __init__(self,
                 site: Site,
                 num_tokens: int = 100,
                 drop_rate: float = 0.) -> None:
        super().__init__(site)

    @classmethod
    def build_shared(cls,
                     sites: Sequence[Site],
                     num_tokens: int = 100,
                     drop_rate: float = 0.,
                     **kwargs: Any) -> Prompts:
        """The prompts, of the width of the first block."""
        indices = sorted(s.index for s in sites)
        gaps = set(range(indices[0], indices[-1])) - set(indices)
        if gaps:
            raise PEFTError('VPTShallow passes its prompts from block to '
                            f'block, but `layers` leaves out block {min(gaps)}'
                            f' of {indices[0]} to {indices[-1]}; include it, '
                            'or use VPTDeep.')
        first = min(sites, key=lambda s: s.index)
        return Prompts('VPTShallow', first, num_tokens, drop_rate)

    def reset_parameters(self) -> None:
        """Nothing: the prompts belong to the shared owner."""

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, p or 0, d) -> (B, p, d)"""
        # Nothing was carried: this is the first block.
        return y if y.shape[1] else self.shared(x.shape[0])
