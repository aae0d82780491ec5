"""EVA-02 blocks of mmpretrain."""
from typing import Dict, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..registry import SITE_MAPS
from ..sites import TokenLayout
from .base import Block
from .prenorm import PreNormForward
from .sequence import JoinedSequence
from .vit import ViTSites

__all__ = ['EVA02Sites']


class EVA02Forward(PreNormForward):
    """The stock forward, which is told the shape of the map."""

    # Stock blocks do not checkpoint; set it on one to have it do so.
    with_cp = False
    attn_drop_path = ffn_drop_path = property(lambda self: self.drop_path)
    joined_attention = property(lambda self: self.attn)

    def forward(self, x: Tensor, patch_resolution: tuple) -> Tensor:
        """(B, N, C) -> (B, N, C), N = 1 or 0 + H * W"""
        height, width = (int(size) for size in patch_resolution)
        layout = TokenLayout((height, width), x.shape[1] - height * width)
        return self.peft.call(self._forward, x, layout, self.with_cp,
                              patch_resolution)

    def run_attention(self, normed: Tensor, patch_resolution: tuple) -> Tensor:
        return self.attn(normed, patch_resolution)

    def run_mlp(self, normed: Tensor) -> Tensor:
        return self.mlp(normed)


class JoinedRoPEAttention(JoinedSequence):
    """The stock attention, with extra tokens before the others.

    Like the class token they have no place in the image, so their queries and
    keys are not rotated.
    """

    def forward(self, x: Tensor, patch_resolution: tuple) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        extra = 1 if self.with_cls_token else 0

        def rotate(t: Tensor) -> Tensor:
            grid = self.rope(t[:, :, extra:], patch_resolution)
            # Positions are in float32, under autocast, too.
            return torch.cat([t[:, :, :extra], grid.type_as(t)], dim=2)

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q * self.scale @ k.transpose(-2, -1)
            weights = scores.softmax(dim=-1).type_as(v)
            return self.attn_drop(weights) @ v

        return self.attend(x, mix, rotate if self.rope else None)


@SITE_MAPS.register_module()
class EVA02Sites(ViTSites):
    """EVA-02: ViT with rotated queries and keys, and with SwiGLU, whose
    ``fc1`` is the fused layer of gate and value.

    The norm that base and large have inside the MLP is no site.
    """

    block_types = (
        'mmpretrain.models.backbones.vit_eva02.EVA02EndcoderLayer', )
    backbone_types = ('mmpretrain.models.backbones.vit_eva02.ViTEVA02', )
    mixin = EVA02Forward
    attention_mixin = JoinedRoPEAttention

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        return dict(
            norm1=block.norm1,
            norm2=block.norm2,
            qkv=block.attn.qkv,
            proj=block.attn.proj,
            fc1=block.mlp.w12,
            fc2=block.mlp.w3)

    @classmethod
    def stream(cls, block: nn.Module) -> None:
        pass  # Its drop-path is in the block, and its branches are alone.

    unstream = stream

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.attn.embed_dims

    @classmethod
    def drop_path(cls, block: nn.Module) -> float:
        return float(getattr(block.drop_path, 'drop_prob', 0.))

    @classmethod
    def watch(cls, backbone: nn.Module, blocks: Sequence[Block]) -> list:
        return []
