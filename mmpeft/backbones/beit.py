"""BEiT blocks of mmpretrain and mmseg, and those of mmseg's MAE."""
from typing import Any, Dict, Optional, Sequence, Tuple

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..registry import SITE_MAPS
from ..stream import Stream
from .base import Block
from .grid import layout_of, watch_stem
from .maps import join_maps
from .prenorm import PreNormForward
from .sequence import JoinedSequence
from .split_bias import join_bias, split_bias
from .vit import ViTSites

__all__ = ['BEiTSites', 'MMSegBEiTSites']


class BEiTForward(PreNormForward):
    """The stock forward; the gammas belong to the branches.

    mmpretrain's MLP has a drop-path of its own, before its gamma, which stays
    where it is: the sites of the branch lie between it and the block's.
    """

    # Stock blocks do not checkpoint; set it on one to have it do so.
    with_cp = False
    attn_drop_path = ffn_drop_path = property(lambda self: self.drop_path)
    joined_attention = property(lambda self: self.attn)

    def forward(self,
                x: Tensor,
                rel_pos_bias: Optional[Tensor] = None) -> Tensor:
        """(B, N, C) -> (B, N, C), N = 1 + H * W; mmpretrain gives the bias
        (heads, N, N) that its blocks may share."""
        layout = layout_of(self.peft, x)
        bias = () if rel_pos_bias is None else (rel_pos_bias, )
        return self.peft.call(self._forward, x, layout, self.with_cp, *bias)

    def run_attention(self, normed: Tensor, *bias: Tensor) -> Tensor:
        return self.attn(normed, *bias)

    def _attend(self, *args: Any) -> Tuple:
        both = super()._attend(*args)
        if self.gamma_1 is None:
            return both
        return tuple(t if t is None else self.gamma_1 * t for t in both)

    def run_mlp(self, normed: Tensor) -> Tensor:
        branch = self.ffn(normed)
        return branch if self.gamma_2 is None else self.gamma_2 * branch


class JoinedBEiTAttention(JoinedSequence):
    """The stock attention, with extra tokens before the others.

    They have no place in the image, so no relative-position bias.
    """

    def forward(self,
                x: Tensor,
                rel_pos_bias: Optional[Tensor] = None) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        size = x.shape[1]
        own = self.relative_position_bias_table
        if own is not None:
            own = own[self.relative_position_index.view(-1)]
            own = own.view(size, size, -1).permute(2, 0, 1)

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q * self.scale @ k.transpose(-2, -1)
            padding = (k.shape[2] - size, 0, q.shape[2] - size, 0)
            for bias in (own, rel_pos_bias):
                if bias is not None:
                    scores = scores + F.pad(bias, padding)
            return self.attn_drop(scores.softmax(dim=-1)) @ v

        return self.attend(x, mix)


@SITE_MAPS.register_module()
class BEiTSites(ViTSites):
    """BEiT of mmpretrain: ViT with relative positions in the attention, and
    the bias of its projection in two parts.

    Stock puts that bias together and never calls ``qkv``; here it does.
    """

    block_types = (
        'mmpretrain.models.backbones.beit.BEiTTransformerEncoderLayer', )
    backbone_types = ('mmpretrain.models.backbones.beit.BEiTViT', )
    mixin = BEiTForward
    attention_mixin = JoinedBEiTAttention

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        return dict(
            norm1=block.norm1,
            norm2=block.norm2,
            qkv=block.attn.qkv,
            proj=block.attn.proj,
            fc1=block.ffn.layers[0][0],
            fc2=block.ffn.layers[-2])

    @classmethod
    def stream(cls, block: nn.Module) -> None:
        if block.attn.bias == 'qv_bias':
            join_bias(block.attn, softmax_of_products=True)
            # Any other value, and the stock forward calls qkv.
            block.attn.bias = 'joined'

    @classmethod
    def unstream(cls, block: nn.Module) -> None:
        if block.attn.bias == 'joined':
            split_bias(block.attn)
            block.attn.bias = 'qv_bias'

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.attn.embed_dims

    @classmethod
    def drop_path(cls, block: nn.Module) -> float:
        return float(getattr(block.drop_path, 'drop_prob', 0.))


@SITE_MAPS.register_module()
class MMSegBEiTSites(BEiTSites):
    """BEiT of mmseg and its MAE, whose outputs are maps of inner blocks."""

    block_types = (
        'mmseg.models.backbones.beit.BEiTTransformerEncoderLayer',
        'mmseg.models.backbones.mae.MAETransformerEncoderLayer',
    )
    backbone_types = ('mmseg.models.backbones.beit.BEiT',
                      'mmseg.models.backbones.mae.MAE')

    @classmethod
    def join_outputs(cls, backbone: nn.Module, stream: Stream,
                     stages: Sequence[int]) -> list:
        # The last one is joined before its norm.
        last = len(backbone.layers) - 1 if backbone.final_norm else None
        outs = sorted(backbone.out_indices)
        places = [i for i, out in enumerate(outs) if out != last]
        return super(ViTSites, cls).join_outputs(
            backbone, stream, stages) + join_maps(backbone, stream, places)

    @classmethod
    def watch(cls, backbone: nn.Module, blocks: Sequence[Block]) -> list:
        return watch_stem(backbone.patch_embed, 1, [b.module for b in blocks])

    @classmethod
    def grid_ends(cls, block: Block) -> bool:
        # The class token is no output.
        return False
