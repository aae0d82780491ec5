"""Vision Transformer blocks of mmpretrain: ViT, DeiT, MAE, DINOv2, CLIP."""
import types
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from ..errors import PEFTError
from ..registry import SITE_MAPS
from ..stream import Stream
from .base import Block, Part, SiteMap, TrunkBlock, class_path
from .grid import layout_of, watch_stem
from .places import parts_of
from .prenorm import PreNormForward
from .sequence import JoinedSequence

__all__ = ['ViTForward', 'ViTSites']


class ViTForward(PreNormForward):
    """The stock forward; the shape of the map comes from the stem."""

    # Stock blocks do not checkpoint; set it on one to have it do so.
    with_cp = False
    norm1 = property(lambda self: self.ln1)
    norm2 = property(lambda self: self.ln2)
    joined_attention = property(lambda self: self.attn)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), N = extra tokens + H * W"""
        layout = layout_of(self.peft, x)
        return self.peft.call(self._forward, x, layout, self.with_cp)

    def run_attention(self, normed: Tensor) -> Tensor:
        return self.attn(normed)

    def run_mlp(self, normed: Tensor) -> Tensor:
        return self.ffn(normed)


class JoinedMultiheadAttention(JoinedSequence):
    """The stock attention, with extra tokens before the others."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        dropout = self.attn_drop if self.training else 0.
        return self.attend(
            x, partial(self.scaled_dot_product_attention, dropout_p=dropout))

    def finish(self, out: Tensor) -> Tensor:
        return self.out_drop(self.gamma1(super().finish(out)))


def format_output(self: nn.Module, x: Tensor, hw: tuple) -> Any:
    """The stock ``_format_output`` of the backbone, with side networks joined.

    Only the last output has a norm, and is joined before it; the others are
    the stream itself, which must go on unchanged.
    """
    stream = self.peft.stream
    if not stream.joined:
        x = stream.output(x, 0)
    return type(self)._format_output(self, x, hw)


@SITE_MAPS.register_module()
class ViTSites(SiteMap):
    """ViT: one stage, all tokens in one attention, class token before the
    grid.

    ``patch_norm`` is the norm of the stem or, as in CLIP, before the first
    block; ``out_norm`` the one behind the last block and, for averaged
    features, that of the average. With SwiGLU ``fc1`` is the fused layer of
    gate and value (2 x hidden rows), and ``fc2`` the one back.
    """

    block_types = ('mmpretrain.models.backbones.vision_transformer.'
                   'TransformerEncoderLayer', )
    backbone_types = (
        'mmpretrain.models.backbones.vision_transformer.VisionTransformer', )
    block_pattern = r'(?:(?P<host>.+?)\.)?(?P<stage_path>layers)\.\d+'
    # Decoders of MAE and others, MobileViT and Conformer have such blocks.
    roams = True
    mixin = ViTForward
    attention_mixin = JoinedMultiheadAttention

    @classmethod
    def hosts(cls, module: nn.Module) -> bool:
        paths = {class_path(c) for c in type(module).__mro__}
        return not paths.isdisjoint(cls.backbone_types)

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        ffn = block.ffn
        fc1, fc2 = (ffn.w12,
                    ffn.w3) if hasattr(ffn, 'w12') else (ffn.layers[0][0],
                                                         ffn.layers[-2])
        return dict(
            norm1=block.ln1,
            norm2=block.ln2,
            qkv=block.attn.qkv,
            proj=block.attn.proj,
            fc1=fc1,
            fc2=fc2)

    @classmethod
    def stream(cls, block: nn.Module) -> None:
        # Drop-path has no parameters, so moving it changes no key.
        block.attn_drop_path = block.attn.out_drop
        block.ffn_drop_path = block.ffn.dropout_layer
        block.attn.out_drop = nn.Identity()
        block.ffn.dropout_layer = nn.Identity()
        block.ffn.add_identity = False

    @classmethod
    def unstream(cls, block: nn.Module) -> None:
        block.attn.out_drop = block.attn_drop_path
        block.ffn.dropout_layer = block.ffn_drop_path
        block.ffn.add_identity = True
        del block.attn_drop_path, block.ffn_drop_path

    @classmethod
    def attention(cls, block: nn.Module) -> nn.Module:
        return block.attn

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.embed_dims

    @classmethod
    def drop_path(cls, block: nn.Module) -> float:
        # The MLP of DINOv2's giant has none; the attention always has one.
        layer = getattr(block, 'attn_drop_path', block.attn.out_drop)
        return float(getattr(layer, 'drop_prob', 0.))

    @classmethod
    def stem(cls, backbone: nn.Module) -> Tuple[int, int]:
        projection = backbone.patch_embed.projection
        return projection.out_channels, projection.kernel_size[0]

    @classmethod
    def parts(cls, backbone: nn.Module) -> List[Part]:
        stem = backbone.patch_embed
        parts = [('patch_embed', 'patch_embed.projection', 0, stem.projection),
                 ('patch_norm', 'patch_embed.norm', 0, stem.norm),
                 ('patch_norm', 'pre_norm', 0,
                  getattr(backbone, 'pre_norm', None))]
        parts += [('out_norm', path, 0, getattr(backbone, path))
                  for path in cls.out_norms(backbone)]
        return parts_of(parts)

    @classmethod
    def last(cls, backbone: nn.Module) -> int:
        """Number of the last block that is an output."""
        count = len(backbone.layers)
        return max((i for i in backbone.out_indices if i < count),
                   default=count - 1)

    @classmethod
    def out_norms(cls, backbone: nn.Module) -> List[str]:
        """Paths of the norms of the last output, in order."""
        final = cls.last(backbone) == len(backbone.layers) - 1
        norms = ['ln1'] if backbone.final_norm and final else []
        # Only where the output is an average.
        return norms + ['ln2'] * hasattr(backbone, 'ln2')

    @classmethod
    def trunk_block(cls, block: Block) -> TrunkBlock:
        return TrunkBlock(
            block.index,
            block.stage,
            block.path,
            embed_dims=cls.embed_dims(block.module),
            num_heads=block.module.attn.num_heads,
            mlp_dims=cls.modules(block.module)['fc2'].in_features)

    @classmethod
    def outputs(cls, backbone: nn.Module) -> Dict[int, Optional[str]]:
        return {0: 'ln1' if 'ln1' in cls.out_norms(backbone) else None}

    @classmethod
    def join_outputs(cls, backbone: nn.Module, stream: Stream,
                     stages: Sequence[int]) -> list:
        backbone._format_output = types.MethodType(format_output, backbone)
        return super().join_outputs(backbone, stream, stages)

    @classmethod
    def watch(cls, backbone: nn.Module, blocks: Sequence[Block]) -> list:
        return watch_stem(backbone.patch_embed, backbone.num_extra_tokens,
                          [b.module for b in blocks])

    @classmethod
    def release(cls, backbone: nn.Module) -> None:
        backbone.__dict__.pop('_format_output', None)

    @classmethod
    def grid_ends(cls, block: Block) -> bool:
        return (block.backbone.out_type == 'cls_token'
                and block.index == cls.last(block.backbone))

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        # Blocks after the last output still run, but get no gradient.
        last, count = cls.last(backbone), len(backbone.layers)
        norm = ['ln1'] if backbone.final_norm and last < count - 1 else []
        return [f'layers.{i}' for i in range(last + 1, count)] + norm

    @classmethod
    def final_norm(cls, backbone: nn.Module) -> str:
        norms = cls.out_norms(backbone)
        if not norms:
            raise PEFTError(
                f'This {type(backbone).__name__} has no norm behind its last '
                'output, block '
                f'{cls.last(backbone)}; leave final_norm=True out.')
        return norms[-1]
