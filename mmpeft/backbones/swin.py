"""Swin Transformer blocks of mmdet, mmseg and mmpretrain."""
from typing import Dict, List, Optional, Tuple

import torch.nn as nn
from torch import Tensor

from ..ops import from_windows, plan_windows, to_windows, window_attention
from ..recipes import current
from ..registry import SITE_MAPS
from ..sites import TokenLayout
from .base import Block, Part, SiteMap, TrunkBlock
from .places import parts_of
from .prenorm import PreNormForward
from .windowed import JoinedWindows

__all__ = ['SwinSites']


class SwinForward(PreNormForward):
    """The stock forward, which is told the shape of the map."""

    ffn_drop_path = property(lambda self: self.ffn.dropout_layer)
    joined_attention = property(lambda self: self.attn.w_msa)

    def forward(self, x: Tensor, hw_shape: tuple) -> Tensor:
        """(B, H*W, C) -> (B, H*W, C)"""
        layout = TokenLayout((int(hw_shape[0]), int(hw_shape[1])))
        return self.peft.call(self._forward, x, layout, self.with_cp, hw_shape)

    def run_attention(self, normed: Tensor, hw_shape: tuple) -> Tensor:
        attn, hw_shape = self.attn, tuple(map(int, hw_shape))
        # In maps of one window mmpretrain shifts and pads by rules of its own.
        if current() is None or min(hw_shape) <= attn.window_size:
            return attn(normed, hw_shape)
        batch = len(normed)
        windows = plan_windows(batch, hw_shape, attn.window_size,
                               attn.shift_size, normed.device)
        out = attn.w_msa(to_windows(normed, windows), mask=windows.mask)
        return attn.drop(from_windows(out, windows, batch))

    def run_mlp(self, normed: Tensor) -> Tensor:
        return self.ffn.gamma2(self.ffn.layers(normed))


class JoinedWindowMSA(JoinedWindows):
    """The stock window attention, where extra tokens join every window."""

    #: Whether :func:`window_attention` computes what the stock one does.
    fuses = True

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """(B * windows, N, C) -> (B * windows, N, C)"""
        if self.joined is not None or not self.fuses:
            return self.attend(x, lambda scores, q: self.place(scores, mask))
        if current() is None or self.training and self.attn_drop.p > 0:
            return super().forward(x, mask)
        size = x.shape[1]
        bias = self.position_bias().view(size, size, -1).permute(2, 0, 1)
        out = window_attention(
            self.qkv(x), bias.contiguous(), mask, self.num_heads, self.scale)
        return self.proj_drop(self.proj(out))

    def place(self, scores: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Add the relative positions, and mask what a shift brought
        together."""
        size = scores.shape[-1]
        bias = self.position_bias().view(size, size, -1).permute(2, 0, 1)
        scores = scores + bias
        if mask is not None:
            # (B, windows, heads, N, N) + (windows, 1, N, N)
            scores = scores.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)
            scores = scores.flatten(0, 1)
        return scores

    def position_bias(self) -> Tensor:
        """Of each pair of tokens in a window, (N * N, heads)."""
        return self.relative_position_bias_table[
            self.relative_position_index.view(-1)]


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
    attention_mixin = JoinedWindowMSA

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
    def attention(cls, block: nn.Module) -> nn.Module:
        return block.attn.w_msa

    @classmethod
    def save_memory(cls, block: nn.Module) -> None:
        super().save_memory(block)
        cls.open_attention(block)

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.attn.w_msa.embed_dims

    @classmethod
    def drop_path(cls, block: nn.Module) -> float:
        return float(getattr(block.ffn.dropout_layer, 'drop_prob', 0.))

    @classmethod
    def stem(cls, backbone: nn.Module) -> Tuple[int, int]:
        projection = backbone.patch_embed.projection
        return projection.out_channels, projection.kernel_size[0]

    @classmethod
    def parts(cls, backbone: nn.Module) -> List[Part]:
        stem, last = backbone.patch_embed, max(backbone.out_indices)
        parts = [('patch_embed', 'patch_embed.projection', 0, stem.projection),
                 ('patch_norm', 'patch_embed.norm', 0, stem.norm)]
        for stage, path in cls.merging_paths(backbone).items():
            if stage <= last:
                merging = backbone.get_submodule(path)
                home = int(path.split('.')[1])
                parts += [('merge_norm', f'{path}.norm', home, merging.norm),
                          ('merge_linear', f'{path}.reduction', home,
                           merging.reduction)]
        for stage, path in cls.outputs(backbone).items():
            parts.append(('out_norm', path, stage, getattr(backbone, path)))
        return parts_of(parts)

    @classmethod
    def trunk_block(cls, block: Block) -> TrunkBlock:
        attn = block.module.attn
        return TrunkBlock(
            block.index,
            block.stage,
            block.path,
            embed_dims=cls.embed_dims(block.module),
            num_heads=attn.w_msa.num_heads,
            mlp_dims=cls.modules(block.module)['fc1'].out_features,
            window_size=attn.window_size,
            shift_size=attn.shift_size)

    @classmethod
    def no_trunk(cls, backbone: nn.Module) -> Optional[str]:
        if getattr(backbone, 'out_after_downsample', False):
            return ('out_after_downsample=True takes them behind the patch '
                    'merging; set it to False')
        return None

    @classmethod
    def merging_paths(cls, backbone: nn.Module) -> Dict[int, str]:
        """By stage, the path of the patch merging that leads into it."""
        return {
            i + 1: f'stages.{i}.downsample'
            for i, stage in enumerate(backbone.stages)
            if stage.downsample is not None
        }

    @classmethod
    def mergings(cls, backbone: nn.Module) -> Dict[int, nn.Module]:
        return {
            stage: backbone.get_submodule(path)
            for stage, path in cls.merging_paths(backbone).items()
        }

    @classmethod
    def merge_map(cls, merging: nn.Module, layout: TokenLayout,
                  tokens: Tensor) -> Tensor:
        return merging(tokens, layout.hw_shape)[0]

    @classmethod
    def merge_tokens(cls, merging: nn.Module, tokens: Tensor) -> Tensor:
        # A token takes the place of all neighbours (four); the channels of
        # the stock layer's unfolded map are ordered with these last.
        count = merging.reduction.in_features // tokens.shape[-1]
        tokens = tokens.repeat_interleave(count, dim=-1)
        norm = merging.norm or nn.Identity()
        if getattr(merging, 'use_post_norm', False):
            return norm(merging.reduction(tokens))
        return merging.reduction(norm(tokens))

    @classmethod
    def outputs(cls, backbone: nn.Module) -> Dict[int, str]:
        return {i: f'norm{i}' for i in sorted(backbone.out_indices)}

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        # Stages after the last output still run in mmdet and mmseg, but
        # nothing there gets a gradient.
        last = max(backbone.out_indices)
        stages = range(last + 1, len(backbone.stages))
        kept = last
        if getattr(backbone, 'out_after_downsample', False):
            kept += 1
        mergings = cls.merging_paths(backbone)
        return [f'stages.{i}' for i in stages
                ] + [path for stage, path in mergings.items() if stage > kept]

    @classmethod
    def final_norm(cls, backbone: nn.Module) -> str:
        return f'norm{max(backbone.out_indices)}'
