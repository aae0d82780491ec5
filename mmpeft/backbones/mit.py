"""Blocks of mmseg's Mix Vision Transformer, the backbone of SegFormer."""
from typing import Dict, List, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from ..registry import SITE_MAPS
from ..sites import TokenLayout
from ..stream import Stream
from .base import Block, Part, TrunkBlock
from .packed import NO_IDENTITY, PackedAttention, PackedForward, PackedSites
from .places import parts_of

__all__ = ['MiTSites']


class MiTForward(PackedForward):
    """The stock forward, which is told the shape of the map.

    The MLP has a convolution over the map. A token that joins has no place
    there, and is a map of its own.
    """

    def forward(self, x: Tensor, hw_shape: tuple) -> Tensor:
        """(B, H*W, C) -> (B, H*W, C)"""
        layout = TokenLayout((int(hw_shape[0]), int(hw_shape[1])))
        return self.peft.call(self._forward, x, layout, self.with_cp, hw_shape)

    def run_mlp(self, normed: Tensor) -> Tensor:
        alone = normed.flatten(0, 1).unsqueeze(1)
        branch = self.ffn(alone, (1, 1), identity=NO_IDENTITY)
        return branch.view_as(normed)

    def run_map_mlp(self, normed: Tensor, layout: TokenLayout) -> Tensor:
        return self.ffn(normed, layout.hw_shape, identity=NO_IDENTITY)


class EfficientAttention(PackedAttention):
    """The attention behind the spatial reduction of the keys."""

    parts = (1, 2)


class JoinedNorms:
    """Outputs with side networks joined.

    The norm of an output stands in the stream, which must go on without what
    was joined. So it runs once more, on the joined stream, when the forward
    is done.

    Args:
        stream (Stream): What travels beside the tokens.
        norms (dict[int, str]): By stage, the path of the norm.
        stages (Sequence[int]): Those that are joined.
    """

    def __init__(self, stream: Stream, norms: Dict[int, str],
                 stages: Sequence[int]) -> None:
        self.stream = stream
        self.norms = norms
        self.stages = stages
        self.kept: Dict[int, Tensor] = {}

    def begin(self, backbone: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the backbone: forget what an error left."""
        self.kept = {}

    def keep(self, norm: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a norm; a side network that asks for the way
        into the next stage calls it, too."""
        stage = self.stream.stage
        if stage in self.stages and stage not in self.kept:
            self.kept[stage] = self.stream.output(args[0], stage)

    def replace(self, backbone: nn.Module, args: tuple, outs: list) -> list:
        """Forward hook of the backbone."""
        kept, outs = dict(self.kept), list(outs)
        for place, (stage, path) in enumerate(self.norms.items()):
            if stage in kept:
                normed = backbone.get_submodule(path)(kept[stage])
                shape = outs[place].shape
                outs[place] = normed.transpose(1, 2).reshape(shape)
        self.kept = {}
        return outs


@SITE_MAPS.register_module()
class MiTSites(PackedSites):
    """MiT: a pyramid whose attention sees keys of a reduced map, with a
    convolution over the map in the MLP.

    ``qkv`` sees the tokens of the map and behind them, where it reduces,
    those of the reduced map: of the first only the queries go on, of the
    others only the keys and values. Tokens that join come behind the
    reduction. ``fc1`` and ``fc2`` are the 1 x 1 convolutions. The reducing
    convolution, its norm, and that of the MLP are no sites. ``patch_embed``
    is the overlapping projection of every stage, ``merge_norm`` the norm of
    those after the first. The norm of an output stands in the stream, too.
    """

    block_types = ('mmseg.models.backbones.mit.TransformerEncoderLayer', )
    backbone_types = ('mmseg.models.backbones.mit.MixVisionTransformer', )
    block_pattern = r'(?:(?P<host>.+?)\.)?(?P<stage_path>layers\.' \
                    r'(?P<stage>\d+))\.1\.\d+'
    mixin = MiTForward
    attention_mixin = EfficientAttention

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        layers = block.ffn.layers
        return dict(super().modules(block), fc1=layers[0], fc2=layers[4])

    @classmethod
    def stem(cls, backbone: nn.Module) -> Tuple[int, int]:
        projection = backbone.layers[0][0].projection
        return projection.out_channels, projection.kernel_size[0]

    @classmethod
    def parts(cls, backbone: nn.Module) -> List[Part]:
        outs, found = cls.outputs(backbone), []
        for i in range(max(outs) + 1):
            stem, _, norm = backbone.layers[i]
            found += [('patch_embed', f'layers.{i}.0.projection', i,
                       stem.projection),
                      ('merge_norm' if i else 'patch_norm',
                       f'layers.{i}.0.norm', i, stem.norm)]
            if i in outs:
                found.append(('out_norm', outs[i], i, norm))
        return parts_of(found)

    @classmethod
    def trunk_block(cls, block: Block) -> TrunkBlock:
        attn = block.module.attn
        return TrunkBlock(
            block.index,
            block.stage,
            block.path,
            embed_dims=attn.embed_dims,
            num_heads=attn.num_heads,
            mlp_dims=block.module.ffn.feedforward_channels,
            key_stride=attn.sr_ratio)

    @classmethod
    def no_trunk(cls, backbone: nn.Module) -> Optional[str]:
        for stage in range(1, backbone.num_stages):
            conv = backbone.layers[stage][0].projection
            if conv.stride != (2, 2) or conv.kernel_size[0] % 2 == 0:
                return (f'stage {stage} does not halve the map: its patches '
                        f'of {conv.kernel_size[0]} have a stride of '
                        f'{conv.stride[0]}; use odd patches and a stride of 2')
        return None

    @classmethod
    def mergings(cls, backbone: nn.Module) -> Dict[int, nn.Module]:
        # The norm of a stage, and the patches of the next one.
        return {
            i: (backbone.layers[i - 1][2], backbone.layers[i][0])
            for i in range(1, backbone.num_stages)
        }

    @classmethod
    def merge_map(cls, merging: tuple, layout: TokenLayout,
                  tokens: Tensor) -> Tensor:
        norm, patches = merging
        return patches(layout.to_grid(norm(tokens)))[0]

    @classmethod
    def merge_tokens(cls, merging: tuple, tokens: Tensor) -> Tensor:
        # A token takes the place of all its neighbours: what is inside a map
        # of its copies, away from the margin of zeros.
        norm, patches = merging
        conv = patches.projection
        inside = -(-conv.padding[0] // conv.stride[0])
        side = (1 + inside) * conv.stride[0] + conv.kernel_size[0]
        copies = norm(tokens).flatten(0, 1)[:, :, None, None]
        merged = conv(copies.expand(-1, -1, side, side))[:, :, inside, inside]
        return patches.norm(merged.view(*tokens.shape[:2], -1))

    @classmethod
    def outputs(cls, backbone: nn.Module) -> Dict[int, str]:
        return {i: f'layers.{i}.2' for i in sorted(set(backbone.out_indices))}

    @classmethod
    def join_outputs(cls, backbone: nn.Module, stream: Stream,
                     stages: Sequence[int]) -> list:
        outs = cls.outputs(backbone)
        joined = JoinedNorms(stream, outs, stages)
        return [
            backbone.register_forward_pre_hook(joined.begin),
            *[
                backbone.get_submodule(outs[i]).register_forward_pre_hook(
                    joined.keep) for i in stages
            ],
            backbone.register_forward_hook(joined.replace),
        ]

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        # Stages after the last output still run.
        last = max(backbone.out_indices)
        return [f'layers.{i}' for i in range(last + 1, backbone.num_stages)]

    @classmethod
    def final_norm(cls, backbone: nn.Module) -> str:
        return f'layers.{max(backbone.out_indices)}.2'
