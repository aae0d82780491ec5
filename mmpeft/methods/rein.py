import math
from typing import Dict, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..recompute import recomputed_if_lean
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_width
from .per_stage import PerStage

__all__ = ['Rein', 'StageMLPs']


class StageMLPs(nn.Module):
    """What the blocks of one stage share.

    Args:
        dims (int): Width of the tokens.
        scale_init (float): Start of the factor of the update.
    """

    def __init__(self, dims: int, scale_init: float) -> None:
        super().__init__()
        self.scale_init = scale_init
        self.token_to_feature = nn.Linear(dims, dims)
        self.delta = nn.Linear(dims, dims)
        # Of one entry: FSDP does not take parameters without an axis.
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the released code: the defaults of linear layers."""
        self.token_to_feature.reset_parameters()
        self.delta.reset_parameters()
        nn.init.constant_(self.scale, self.scale_init)


@METHODS.register_module()
class Rein(PEFTModule):
    """Learned tokens that refine the map between two blocks.

    `Stronger, Fewer, & Superior: Harnessing Vision Foundation Models for
    Domain Generalized Semantic Segmentation
    <https://arxiv.org/abs/2312.04265>`_ (CVPR 2024). Behind each block, with
    its own tokens ``T`` (m x d)::

        T = A B
        S = softmax(y T^T / sqrt(d))
        y <- y + scale * M2(S[:, 2:m] M1(T[2:m]) + y)

    ``M1`` and ``M2`` are linear layers, shared by the blocks of a stage, as
    is ``scale``; A (m x r) and B (r x d) are each block's own. The first
    token only takes up attention, so that what the others add may be little.
    Class and register tokens pass by. Starts near the frozen model, at
    ``scale_init`` times a random layer.

    The paper runs it on backbones of one width; a pyramid has layers for each
    width here. Its link from the tokens to the queries of a Mask2Former is
    not here: a stock head has queries of its own. ``M2`` with ``scale`` is
    computed as one layer, so that no map is kept for the gradient of the
    number.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        num_tokens (int): Tokens ``m`` of each block, at least 2. Defaults to
            100.
        rank (int, optional): Rank ``r`` of the tokens, at most the smallest
            width; None means tokens without a decomposition. Defaults to 16.
        scale_init (float): Start of ``scale``, above 0. Defaults to 0.001.

    Raises:
        PEFTError: If there are fewer than 2 tokens, or ``rank`` exceeds a
            width.
    """

    sites = ('ffn_residual', )

    def __init__(self,
                 site: Site,
                 num_tokens: int = 100,
                 rank: Optional[int] = 16,
                 scale_init: float = 0.001) -> None:
        super().__init__(site)
        check_width('Rein', 'num_tokens', num_tokens, math.inf)
        if num_tokens < 2:
            raise PEFTError(
                'Rein: num_tokens must be at least 2, as the first '
                f'one adds nothing, but got {num_tokens}.')
        dims = site.embed_dims
        if rank is None:
            self.tokens = nn.Parameter(torch.empty(num_tokens, dims))
        else:
            check_width('Rein', 'rank', rank, dims)
            self.tokens_a = nn.Parameter(torch.empty(num_tokens, rank))
            self.tokens_b = nn.Parameter(torch.empty(rank, dims))
        self.rank = rank
        self.reset_parameters()

    @classmethod
    def build_shared(cls,
                     sites: Sequence[Site],
                     scale_init: float = 0.001,
                     **kwargs) -> PerStage:
        check_positive('Rein', 'scale_init', scale_init)
        widths: Dict[int, int] = {s.stage: s.embed_dims for s in sites}
        return PerStage({
            s: StageMLPs(dims, scale_init)
            for s, dims in widths.items()
        })

    def reset_parameters(self) -> None:
        # As for the prompts of VPT, by the entries of a patch of the image.
        pixels = 3 * self.site.patch_size**2
        dims = self.site.embed_dims
        if self.rank is not None:
            dims = math.sqrt(dims * self.rank)
        bound = math.sqrt(6 / (pixels + dims))
        for tokens in self.parameters(recurse=False):
            nn.init.uniform_(tokens, -bound, bound)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d)"""
        layers = self.shared.of(self.site)
        tokens = self.tokens if self.rank is None else \
            self.tokens_a @ self.tokens_b
        # A value of zeros for the first token is none.
        values = F.pad(layers.token_to_feature(tokens[1:]), (0, 0, 1, 0))
        extra = layout.num_extra_tokens
        features = y[:, extra:]
        mixed = recomputed_if_lean(mix, features,
                                   tokens * self.site.embed_dims**-.5, values)
        scale = layers.scale
        refined = features + F.linear(mixed, scale * layers.delta.weight,
                                      scale * layers.delta.bias)
        return torch.cat([y[:, :extra], refined], dim=1) if extra else refined


def mix(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``softmax(x keys^T) values + x`` for (B, N, d)."""
    return F.linear(F.linear(x, keys).softmax(dim=-1), values.t()) + x
