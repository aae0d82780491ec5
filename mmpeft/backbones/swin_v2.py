"""Swin Transformer V2 blocks of mmpretrain."""
import math
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..registry import SITE_MAPS
from ..sites import TokenLayout
from .split_bias import join_bias, split_bias
from .swin import JoinedWindowMSA, SwinForward, SwinSites

__all__ = ['SwinV2Sites']


class SwinV2Forward(SwinForward):
    """The forward of a stock post-norm block, with its sites called::

        x = x + norm1(attn_drop_path(attention(x)))
        x = x + norm2(ffn_drop_path(mlp(x)))

    and, in some blocks of the huge models, ``x = norm3(x)``.
    """

    def _forward(self, x: Tensor, tokens: Optional[Tensor],
                 layout: TokenLayout, *args: Any) -> Tuple:
        run = self.peft.run
        shortcut = run('attn_shortcut', x, x, layout)
        branch, seen = self._attend(x, tokens, layout, *args)
        branch, seen = self._drop(self.attn_drop_path, branch, seen)
        branch = run('attn_parallel', x, self.norm1(branch), layout)
        branch = run('attn_branch', x, branch, layout)
        y = shortcut + run('attn_add', x, branch, layout)
        x = run('attn_residual', x, y, layout)
        if seen is not None:
            tokens = tokens + self.norm1(seen)
            seen = self.run_mlp(tokens)

        shortcut = run('ffn_shortcut', x, x, layout)
        branch, seen = self._drop(self.ffn_drop_path, self.run_mlp(x), seen)
        branch = run('ffn_parallel', x, self.norm2(branch), layout)
        branch = run('ffn_branch', x, branch, layout)
        y = shortcut + run('ffn_add', x, branch, layout)
        x = run('ffn_residual', x, y, layout)
        if seen is not None:
            tokens = tokens + self.norm2(seen)
        if self.extra_norm:
            x = self.norm3(x)
            tokens = None if seen is None else self.norm3(tokens)
        return x, tokens


class JoinedWindowMSAV2(JoinedWindowMSA):
    """The stock window attention: cosines, and a bias that an MLP makes of
    the relative position.

    It always takes the place of the stock one, which never calls ``qkv``.
    """

    # Its scores are cosines.
    fuses = False
    # What the stock bias is where its MLP has no say.
    placeless = 16 * .5

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """Cosines of queries and keys, with the learned scale of a head."""
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scale = torch.clamp(self.logit_scale, max=math.log(1. / 0.01)).exp()
        return q @ k.transpose(-2, -1) * scale

    def position_bias(self) -> Tensor:
        """Of each pair of tokens in a window, (N * N, heads)."""
        table = self.cpb_mlp(self.relative_coords_table)
        table = table.view(-1, self.num_heads)
        return 16 * table[self.relative_position_index.view(-1)].sigmoid()


@SITE_MAPS.register_module()
class SwinV2Sites(SwinSites):
    """Swin V2: Swin with each norm behind its branch.

    What the attention and the MLP read is the stream itself, and so is ``x``
    at the ``parallel`` sites, and ``tokens`` join the attention as they are.
    A branch ends with its norm, so ``y`` at ``parallel`` and ``branch`` is
    what comes out of ``norm1`` or ``norm2``. Stock has drop-path before that
    norm, so it is no longer ahead, and ``add`` sees the same as ``branch``.
    ``residual`` lies before the extra norm of huge models, which is no site.

    Tokens that join have no relative position. Their bias is that of an MLP
    that returns 0: 16 sigmoid(0) = 8, in the middle of what stock pairs get.
    """

    block_types = (
        'mmpretrain.models.backbones.swin_transformer_v2.SwinBlockV2', )
    backbone_types = (
        'mmpretrain.models.backbones.swin_transformer_v2.SwinTransformerV2', )
    mixin = SwinV2Forward
    attention_mixin = JoinedWindowMSAV2

    @classmethod
    def stream(cls, block: nn.Module) -> None:
        super().stream(block)
        cls.open_attention(block)
        # Its bias of keys moves cosines, so that it is not for nothing.
        join_bias(cls.attention(block), softmax_of_products=False)

    @classmethod
    def unstream(cls, block: nn.Module) -> None:
        super().unstream(block)
        split_bias(cls.attention(block))

    @classmethod
    def merging_paths(cls, backbone: nn.Module) -> Dict[int, str]:
        # They stand before the blocks of a stage, and not behind.
        return {
            i: f'stages.{i}.downsample'
            for i, stage in enumerate(backbone.stages)
            if stage.downsample is not None
        }
