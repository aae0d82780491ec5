"""Swin Transformer blocks of mmdet, mmseg and mmpretrain."""
from typing import Dict, List

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..registry import SITE_MAPS
from ..sites import TokenLayout
from .base import SiteMap

__all__ = ['SwinSites']


class SwinForward:
    """The stock block forward, with its stream sites called.

    Drop-path is called here and not inside the attention and the MLP, so that
    a branch can be seen before it.
    """

    def forward(self, x: Tensor, hw_shape: tuple) -> Tensor:
        """(B, H*W, C) -> (B, H*W, C)"""
        layout = TokenLayout((int(hw_shape[0]), int(hw_shape[1])))
        # Stock checkpoints only where the input requires a gradient, as the
        # reentrant kind needs that; behind a frozen stem it never does in the
        # first block, whose adapters need gradients all the same.
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(
                self._forward, x, layout, hw_shape, use_reentrant=False)
        return self._forward(x, layout, hw_shape)

    def _forward(self, x: Tensor, layout: TokenLayout,
                 hw_shape: tuple) -> Tensor:
        run = self.peft.run
        branch = self.attn(self.norm1(x), hw_shape)
        branch = run('attn_branch', x, branch, layout)
        y = self.attn_drop_path(branch) + x
        x = run('attn_residual', x, y, layout)

        branch = self.ffn.gamma2(self.ffn.layers(self.norm2(x)))
        branch = run('ffn_branch', x, branch, layout)
        y = x + self.ffn.dropout_layer(branch)
        return run('ffn_residual', x, y, layout)


@SITE_MAPS.register_module()
class SwinSites(SiteMap):
    """Swin: windows inside the attention, a grid of H x W tokens outside."""

    block_types = (
        'mmdet.models.backbones.swin.SwinBlock',
        'mmseg.models.backbones.swin.SwinBlock',
        'mmpretrain.models.backbones.swin_transformer.SwinBlock',
    )
    backbone_types = (
        'mmdet.models.backbones.swin.SwinTransformer',
        'mmseg.models.backbones.swin.SwinTransformer',
        'mmpretrain.models.backbones.swin_transformer.SwinTransformer',
    )
    mixin = SwinForward

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        return dict(
            norm1=block.norm1,
            norm2=block.norm2,
            qkv=block.attn.w_msa.qkv,
            proj=block.attn.w_msa.proj,
            fc1=block.ffn.layers[0][0],
            fc2=block.ffn.layers[1])

    @classmethod
    def stream(cls, block: nn.Module) -> None:
        # Drop-path has no parameters, so moving it changes no key.
        block.attn_drop_path = block.attn.drop
        block.attn.drop = nn.Identity()

    @classmethod
    def unstream(cls, block: nn.Module) -> None:
        block.attn.drop = block.attn_drop_path
        del block.attn_drop_path

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.attn.w_msa.embed_dims

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        # Stages after the last output still run in mmdet and mmseg, but
        # nothing there gets a gradient.
        last = max(backbone.out_indices)
        stages = range(last + 1, len(backbone.stages))
        downsample = [f'stages.{last}.downsample']
        if getattr(backbone, 'out_after_downsample', False):
            downsample = []
        return [f'stages.{i}' for i in stages] + downsample

    @classmethod
    def final_norm(cls, backbone: nn.Module) -> str:
        return f'norm{max(backbone.out_indices)}'
