"""Vision Transformer blocks of mmseg."""
from typing import Dict, List, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from ..registry import SITE_MAPS
from ..stream import Stream
from .base import Block, Part
from .grid import layout_of, watch_stem
from .maps import join_maps
from .packed import PackedForward, PackedSites
from .places import parts_of
from .vit import ViTSites

__all__ = ['MMSegViTSites']


class MMSegViTForward(PackedForward):
    """The stock forward; the shape of the map comes from the stem."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), N = extra tokens + H * W"""
        layout = layout_of(self.peft, x)
        return self.peft.call(self._forward, x, layout, self.with_cp)


@SITE_MAPS.register_module()
class MMSegViTSites(PackedSites, ViTSites):
    """ViT of mmseg: ``nn.MultiheadAttention``, whose outputs are maps of
    inner blocks.

    ``patch_norm`` is the norm of the stem or before the first block, and
    ``out_norm`` the one behind the last block, where the config has them. The
    class token, if any, goes beside the map and is never the only output.
    """

    block_types = ('mmseg.models.backbones.vit.TransformerEncoderLayer', )
    backbone_types = ('mmseg.models.backbones.vit.VisionTransformer', )
    mixin = MMSegViTForward

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        layers = block.ffn.layers
        return dict(super().modules(block), fc1=layers[0][0], fc2=layers[-2])

    @classmethod
    def parts(cls, backbone: nn.Module) -> List[Part]:
        parts = super().parts(backbone)
        if backbone.pre_norm:
            path = backbone.pre_ln_name
            parts += parts_of([('patch_norm', path, 0, getattr(backbone,
                                                               path))])
        return parts

    @classmethod
    def out_norms(cls, backbone: nn.Module) -> List[str]:
        final = cls.last(backbone) == len(backbone.layers) - 1
        return [backbone.norm1_name] if backbone.final_norm and final else []

    @classmethod
    def outputs(cls, backbone: nn.Module) -> Dict[int, Optional[str]]:
        norms = cls.out_norms(backbone)
        return {0: norms[0] if norms else None}

    @classmethod
    def join_outputs(cls, backbone: nn.Module, stream: Stream,
                     stages: Sequence[int]) -> list:
        # The last one is joined before its norm; before the first one there
        # may be that of the stem.
        last = len(backbone.layers) - 1 if backbone.final_norm else None
        before = int(backbone.out_origin)
        outs = sorted(backbone.out_indices)
        places = [i + before for i, out in enumerate(outs) if out != last]
        handles = super(ViTSites, cls).join_outputs(backbone, stream, stages)
        return handles + join_maps(backbone, stream, places, before)

    @classmethod
    def watch(cls, backbone: nn.Module, blocks: Sequence[Block]) -> list:
        return watch_stem(backbone.patch_embed, int(backbone.with_cls_token),
                          [b.module for b in blocks])

    @classmethod
    def grid_ends(cls, block: Block) -> bool:
        return False

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        last, count = cls.last(backbone), len(backbone.layers)
        paths = [f'layers.{i}' for i in range(last + 1, count)]
        if backbone.final_norm and last < count - 1:
            paths.append(backbone.norm1_name)
        return paths
