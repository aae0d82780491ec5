"""Blocks of mmpretrain's ViTSAM, the image encoder of Segment Anything."""
import types
from typing import Dict, List, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from ..errors import PEFTError
from ..registry import SITE_MAPS
from ..sites import TokenLayout
from ..stream import Stream
from .base import Block, Part, SiteMap, TrunkBlock
from .places import parts_of
from .prenorm import PreNormForward
from .windowed import JoinedWindows

__all__ = ['ViTSAMSites']


class ViTSAMForward(PreNormForward):
    """The stock forward on tokens (B, H * W, C); the stream of the backbone
    is (B, H, W, C)."""

    # Stock blocks do not checkpoint; set it on one to have it do so.
    with_cp = False
    # Stock drops paths of the MLP alone.
    attn_drop_path = nn.Identity()
    ffn_drop_path = property(lambda self: self.ffn.dropout_layer)
    joined_attention = property(lambda self: self.attn)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)"""
        hw_shape = (x.shape[1], x.shape[2])
        y = self.peft.call(self._forward, x.flatten(1, 2),
                           TokenLayout(hw_shape), self.with_cp, hw_shape)
        return y.unflatten(1, hw_shape)

    def run_attention(self, normed: Tensor, hw_shape: tuple) -> Tensor:
        from mmpretrain.models.backbones import vit_sam as stock
        grid = normed.unflatten(1, hw_shape)
        if self.window_size == 0:
            return self.attn(grid).flatten(1, 2)
        windows, padded = stock.window_partition(grid, self.window_size)
        grid = stock.window_unpartition(
            self.attn(windows), self.window_size, padded, hw_shape)
        return grid.flatten(1, 2)

    def run_mlp(self, normed: Tensor) -> Tensor:
        return self.ffn.gamma2(self.ffn.layers(normed))


class JoinedSAMAttention(JoinedWindows):
    """The stock attention, of windows or of the whole map as one window."""

    attn_drop = proj_drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B * windows, H, W, C) -> (B * windows, H, W, C)"""
        hw_shape = (x.shape[1], x.shape[2])
        out = self.attend(
            x.flatten(1, 2), lambda scores, q: self.place(scores, q, hw_shape))
        return out.unflatten(1, hw_shape)

    def place(self, scores: Tensor, q: Tensor, hw_shape: tuple) -> Tensor:
        """Add the positions relative to the queries, by row and column."""
        if not self.use_rel_pos:
            return scores
        from mmpretrain.models.backbones import vit_sam as stock
        placed = stock.add_decomposed_rel_pos(
            scores.flatten(0, 1), q.flatten(0, 1), self.rel_pos_h,
            self.rel_pos_w, hw_shape, hw_shape)
        return placed.view_as(scores)


def join_map(neck: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of the neck; an output is a map (B, C, H, W) there."""
    stream, stage = neck._peft_output
    return (joined(stream, args[0], stage), )


def format_output(self: nn.Module, x: Tensor) -> Tensor:
    """The stock ``_format_output`` of a backbone without neck, with side
    networks joined; the stream itself goes on unchanged."""
    return type(self)._format_output(self, joined(self.peft.stream, x, 0))


def joined(stream: Stream, grid: Tensor, stage: int) -> Tensor:
    """A map (B, C, H, W) with the side networks joined."""
    tokens = stream.output(TokenLayout.to_tokens(grid), stage)
    return TokenLayout(grid.shape[2:]).to_grid(tokens)


@SITE_MAPS.register_module()
class ViTSAMSites(SiteMap):
    """ViTSAM: one stage, no class token, windows in most blocks.

    Stream sites see the whole map, ``qkv`` and ``proj`` see (B * windows,
    size, size, C) with the pad tokens, and in a global block (B, H, W, C).
    ``out_norm`` is the last norm of the neck (``channel_reduction``), which
    all outputs pass; side networks join before the neck. The rest of it has
    no sites. There is no ``merge_norm``, and no ``patch_norm`` unless
    ``patch_cfg`` makes one.
    """

    block_types = (
        'mmpretrain.models.backbones.vit_sam.TransformerEncoderLayer', )
    backbone_types = ('mmpretrain.models.backbones.vit_sam.ViTSAM', )
    block_pattern = r'(?:(?P<host>.+?)\.)?(?P<stage_path>layers)\.\d+'
    mixin = ViTSAMForward
    attention_mixin = JoinedSAMAttention

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        return dict(
            norm1=block.ln1,
            norm2=block.ln2,
            qkv=block.attn.qkv,
            proj=block.attn.proj,
            fc1=block.ffn.layers[0][0],
            fc2=block.ffn.layers[-2])

    @classmethod
    def attention(cls, block: nn.Module) -> nn.Module:
        return block.attn

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.embed_dims

    @classmethod
    def drop_path(cls, block: nn.Module) -> float:
        return float(getattr(block.ffn.dropout_layer, 'drop_prob', 0.))

    @classmethod
    def stem(cls, backbone: nn.Module) -> Tuple[int, int]:
        projection = backbone.patch_embed.projection
        return projection.out_channels, projection.kernel_size[0]

    @classmethod
    def parts(cls, backbone: nn.Module) -> List[Part]:
        stem, path = backbone.patch_embed, cls.out_norm(backbone)
        parts = parts_of([('patch_embed', 'patch_embed.projection', 0,
                           stem.projection),
                          ('patch_norm', 'patch_embed.norm', 0, stem.norm)])
        if path is None:
            return parts
        norm = backbone.get_submodule(path)
        return parts + parts_of([('out_norm', path, 0, norm)],
                                channels_first=True)

    @classmethod
    def out_norm(cls, backbone: nn.Module) -> Optional[str]:
        """Path of the norm that all outputs pass; None without neck."""
        return 'channel_reduction.3' if backbone.out_channels > 0 else None

    @classmethod
    def trunk_block(cls, block: Block) -> TrunkBlock:
        return TrunkBlock(
            block.index,
            block.stage,
            block.path,
            embed_dims=cls.embed_dims(block.module),
            num_heads=block.module.attn.num_heads,
            mlp_dims=cls.modules(block.module)['fc2'].in_features,
            window_size=block.module.window_size or None)

    @classmethod
    def outputs(cls, backbone: nn.Module) -> Dict[int, Optional[str]]:
        return {0: cls.out_norm(backbone)}

    @classmethod
    def out_paths(cls, backbone: nn.Module) -> List[str]:
        return ['channel_reduction'] * (backbone.out_channels > 0)

    @classmethod
    def join_outputs(cls, backbone: nn.Module, stream: Stream,
                     stages: Sequence[int]) -> list:
        if backbone.out_channels > 0:
            neck = backbone.channel_reduction
            neck._peft_output = (stream, 0)
            return [neck.register_forward_pre_hook(join_map)]
        backbone._format_output = types.MethodType(format_output, backbone)
        return []

    @classmethod
    def release(cls, backbone: nn.Module) -> None:
        backbone.__dict__.pop('_format_output', None)

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        # Blocks after the last output still run, but get no gradient.
        count = len(backbone.layers)
        last = max(i for i in backbone.out_indices if i < count)
        return [f'layers.{i}' for i in range(last + 1, count)]

    @classmethod
    def final_norm(cls, backbone: nn.Module) -> str:
        path = cls.out_norm(backbone)
        if path is None:
            raise PEFTError(
                f'This {type(backbone).__name__} has no norm behind its last '
                'output, as out_channels=0 leaves out its neck; leave '
                'final_norm=True out.')
        return path
