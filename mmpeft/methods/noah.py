import math
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_rate, check_width

__all__ = ['Elastic', 'NOAH', 'NOAHAdapter', 'NOAHLoRA', 'NOAHPrompts']


class Elastic(PEFTModule):
    """A module of which any first part can run.

    With a ``width`` below the ``full`` one it computes with the first rows or
    columns of its weights, bit for bit what a module of that width with these
    values does; with 0 it changes nothing. Parts that do not run get a
    gradient of zero and not none, so that DistributedDataParallel needs no
    ``find_unused_parameters``.

    Args:
        site (Site): Where it is attached.
        full (int): Its width, above 0.
        limit (float): The largest that makes sense.
        drop_rate (float): Dropout probability, in [0, 1).
    """

    #: The argument of :class:`NOAH` that is its width.
    argument = ''

    def __init__(self, site: Site, full: int, limit: float,
                 drop_rate: float) -> None:
        super().__init__(site)
        self.full = check_width('NOAH', self.argument, full, limit)
        #: How much of it runs.
        self.width = full
        self.dropout = nn.Dropout(check_rate('NOAH', 'drop_rate', drop_rate))

    def set_width(self, width: int) -> None:
        """Let the first ``width`` tokens, ranks or channels run.

        Raises:
            PEFTError: If it has fewer.
        """
        if not 0 <= width <= self.full:
            raise PEFTError(f'NOAH: {self.argument}={width} is outside of 0 '
                            f'to {self.full}, the width in '
                            f'{self.site.block}.')
        self.width = width

    def count(self, width: int) -> int:
        """Parameters of a module of that width at this site."""
        raise NotImplementedError


class NOAHPrompts(Elastic):
    """Tokens that join the attention of one block::

        x <- x + drop_path(attn(norm1([x; dropout(P)])))
    """

    argument = 'num_tokens'
    no_merge = 'its prompts are tokens of the attention, not part of a weight'

    def __init__(self, site: Site, full: int, drop_rate: float) -> None:
        super().__init__(site, full, math.inf, drop_rate)
        self.weight = nn.Parameter(torch.empty(full, site.embed_dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Xavier's bound for (1, p, d), as which the released code holds them.
        nn.init.xavier_uniform_(self.weight[None])

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, others, d) -> (B, others + p, d)"""
        prompts = self.weight[:self.width].expand(x.shape[0], -1, -1)
        return torch.cat([y, self.dropout(prompts)], dim=1)

    def count(self, width: int) -> int:
        return width * self.site.embed_dims


class NOAHLoRA(Elastic):
    """One pair of factors for queries, keys and values together::

        [q, k, v] <- [q, k, v] + B A dropout(x)
    """

    argument = 'rank'
    no_merge = None

    def __init__(self, site: Site, full: int, drop_rate: float) -> None:
        super().__init__(site, full, site.in_dims, drop_rate)
        self.lora_A = nn.Parameter(torch.empty(full, site.in_dims))
        self.lora_B = nn.Parameter(torch.empty(site.out_dims, full))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., d), (..., 3 * d) -> (..., 3 * d)"""
        hidden = F.linear(self.dropout(x), self.lora_A[:self.width])
        return y + F.linear(hidden, self.lora_B[:, :self.width])

    def count(self, width: int) -> int:
        return width * (self.site.in_dims + self.site.out_dims)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        down, up = self.lora_A.to(weight), self.lora_B.to(weight)
        return weight + up[:, :self.width] @ down[:self.width], bias


class NOAHAdapter(Elastic):
    """Bottleneck on the MLP branch, behind its drop-path::

        y <- y + W2 dropout(quick_gelu(W1 y + b1)) + b2
        quick_gelu(z) = z * sigmoid(1.702 z)
    """

    argument = 'dim'

    def __init__(self, site: Site, full: int, drop_rate: float) -> None:
        super().__init__(site, full, site.embed_dims, drop_rate)
        self.down = nn.Linear(site.embed_dims, full)
        self.up = nn.Linear(full, site.embed_dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d)"""
        n = self.width
        hidden = F.linear(y, self.down.weight[:n], self.down.bias[:n])
        hidden = self.dropout(hidden * torch.sigmoid(1.702 * hidden))
        # Without channels there is no adapter, and so no bias either.
        bias = self.up.bias if n else 0 * self.up.bias
        return y + F.linear(hidden, self.up.weight[:, :n], bias)

    def count(self, width: int) -> int:
        dims = self.site.embed_dims
        return width * (2 * dims + 1) + dims if width else 0


PARTS = dict(tokens=NOAHPrompts, qkv=NOAHLoRA, ffn_add=NOAHAdapter)


@METHODS.register_module()
class NOAH(PEFTModule):
    """Prompts, LoRA and an adapter, each block with widths of its own.

    `Neural Prompt Search <https://arxiv.org/abs/2206.04673>`_ (2022)::

        x <- x + drop_path(attn(norm1([x; P])))     P: num_tokens x d
        [q, k, v] <- [q, k, v] + B A x              A: rank x d, B: 3d x rank
        x <- x + adapter(drop_path(mlp(norm2(x))))  dim channels

    The widths are what the paper searches, for each data set: a supernet with
    the largest ones trains while ``SubnetHook`` draws others in each
    iteration, ``tools/search_noah.py`` finds the best below a number of
    parameters, and the config it writes has them as ``overrides``. That
    config trains from the start, like any other. A width of 0 leaves a part
    out.

    The pieces differ from :class:`VPTDeep`, :class:`LoRA` and
    :class:`Adapter`: A is shared by q, k and v, which gets no scale, and the
    adapter has QuickGELU and lies outside of drop-path. Not an identity at
    the start.

    Not as in the released code: it leaves the prompts of the last block that
    has any in the sequence, through all blocks without; here they end with
    their block, as between others. Its stem has prompts besides that the
    first block replaces, and which it counts when it searches; they have no
    effect and are left out. It sets all linear layers to a normal of std .02
    after their own initialisation, B included.

    Args:
        site (Site): Where it is attached; gives the widths.
        num_tokens (int): Prompts of a block. Defaults to 10.
        rank (int): Rank of the update of q, k and v. Defaults to 10.
        dim (int): Channels of the adapter. Defaults to 10.
        drop_rate (float): Dropout probability of prompt entries, of what
            enters A, and behind the adapter's activation, in [0, 1).
            Defaults to 0.1.

    Raises:
        PEFTError: If a width is not a whole number from 0 to that of the
            layer; of prompts there can be any number.
    """

    key = 'noah'
    sites = tuple(PARTS)
    recipe_lr = dict(mmpretrain=1e-3)
    recipe_source = 'released VTAB retraining of NOAH, AdamW'
    no_merge = NOAHPrompts.no_merge

    def __init__(self,
                 site: Site,
                 num_tokens: int = 10,
                 rank: int = 10,
                 dim: int = 10,
                 drop_rate: float = 0.1) -> None:
        raise TypeError('NOAH is what NOAH.build makes for a site.')

    @classmethod
    def sites_for(cls,
                  num_tokens: int = 10,
                  rank: int = 10,
                  dim: int = 10,
                  **kwargs: Any) -> Sequence[str]:
        """The parts that are not left out; :meth:`build` refuses what is no
        width."""
        widths = dict(num_tokens=num_tokens, rank=rank, dim=dim)
        return tuple(
            name for name, part in PARTS.items()
            if type(widths[part.argument]) is not int or widths[part.argument])

    @classmethod
    def build(cls,
              site: Site,
              num_tokens: int = 10,
              rank: int = 10,
              dim: int = 10,
              drop_rate: float = 0.1) -> Elastic:
        """The part that belongs to a site."""
        widths = dict(num_tokens=num_tokens, rank=rank, dim=dim)
        part = PARTS[site.name]
        return part(site, widths[part.argument], drop_rate)
