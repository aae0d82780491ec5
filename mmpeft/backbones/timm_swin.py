"""Swin Transformer blocks of timm."""
from typing import Dict, List, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from ..errors import SiteError
from ..registry import SITE_MAPS
from ..sites import Site, TokenLayout
from ..stream import Stream
from .base import Block, Part, TrunkBlock
from .places import parts_of
from .swin import JoinedWindowMSA
from .timm_models import NETS, TimmForward, TimmSites, is_a
from .timm_stages import JoinedStages, join_norm

__all__ = ['TimmSwinSites']


class TimmSwinForward(TimmForward):
    """The stock forward, whose stream is a map with channels last."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)"""
        hw_shape = (int(x.shape[1]), int(x.shape[2]))
        y = self.peft.call(self._forward, x.flatten(1, 2),
                           TokenLayout(hw_shape), self.with_cp, hw_shape)
        return y.unflatten(1, hw_shape)

    def run_attention(self, normed: Tensor, hw_shape: tuple) -> Tensor:
        return self._attn(normed.unflatten(1, hw_shape)).flatten(1, 2)

    def run_mlp(self, normed: Tensor) -> Tensor:
        return self.mlp(normed)


class JoinedTimmWindows(JoinedWindowMSA):
    """The same, where keys may be narrower than tokens (``head_dim``)."""

    def take(self) -> Tuple:
        joined, extra = super().take()
        if extra is not None and not extra[0].shape[1]:
            extra = (extra[0].new_zeros(1, 0, self.proj.in_features), ) * 2
        return joined, extra


@SITE_MAPS.register_module()
class TimmSwinSites(TimmSites):
    """Swin of timm: the patch merging stands at the start of a stage.

    Only the last stage of the whole model has a norm; features of stages are
    taken in front of it, as timm does.
    """

    block_types = ('timm.models.swin_transformer.SwinTransformerBlock', )
    model_types = ('timm.models.swin_transformer.SwinTransformer', )
    modules_with = ('swin_transformer', )
    block_pattern = r'(?P<stage_path>(?:timm_model\.)?(?:model\.)?' \
                    r'layers[._](?P<stage>\d+))\.blocks\.\d+'
    mixin = TimmSwinForward
    attention_mixin = JoinedTimmWindows

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        return dict(
            norm1=block.norm1,
            norm2=block.norm2,
            qkv=block.attn.qkv,
            proj=block.attn.proj,
            fc1=block.mlp.fc1,
            fc2=block.mlp.fc2)

    @classmethod
    def site(cls, block: Block, name: str) -> Site:
        attn = block.module.attn
        if name == 'attn_kv' and attn.proj.in_features != attn.dim:
            raise SiteError(
                f'Site {name!r} is not offered by {block.path}: its keys have '
                f'{attn.proj.in_features} channels (head_dim) and its tokens '
                f'{attn.dim}.')
        return super().site(block, name)

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.dim

    @classmethod
    def stem(cls, backbone: nn.Module) -> Tuple[int, int]:
        projection = cls.model(backbone)[1].patch_embed.proj
        return projection.out_channels, projection.kernel_size[0]

    @classmethod
    def stages(cls, backbone: nn.Module) -> Dict[int, Tuple[str, nn.Module]]:
        """By number, the path of a stage and the stage."""
        prefix, model = cls.model(backbone)
        if is_a(model, NETS):
            return {
                int(name.rpartition('_')[2]): (prefix + name, stage)
                for name, stage in model.items() if name.startswith('layers_')
            }
        return {
            i: (f'{prefix}layers.{i}', stage)
            for i, stage in enumerate(model.layers)
        }

    @classmethod
    def parts(cls, backbone: nn.Module) -> List[Part]:
        prefix, model = cls.model(backbone)
        stem, last = model.patch_embed, max(cls.outputs(backbone))
        parts = [('patch_embed', f'{prefix}patch_embed.proj', 0, stem.proj),
                 ('patch_norm', f'{prefix}patch_embed.norm', 0, stem.norm)]
        for stage, merging in cls.mergings(backbone).items():
            if stage <= last:
                path = f'{cls.stages(backbone)[stage][0]}.downsample'
                parts += [('merge_norm', f'{path}.norm', stage, merging.norm),
                          ('merge_linear', f'{path}.reduction', stage,
                           merging.reduction)]
        for stage, path in cls.outputs(backbone).items():
            if path is not None:
                norm = backbone.get_submodule(path)
                parts.append(('out_norm', path, stage, norm))
        return parts_of(parts)

    @classmethod
    def trunk_block(cls, block: Block) -> TrunkBlock:
        module = block.module
        size, shift = module.window_size, module.shift_size
        if size[0] == size[1] and shift[0] == shift[1]:
            size, shift = size[0], shift[0]
        return TrunkBlock(
            block.index,
            block.stage,
            block.path,
            embed_dims=cls.embed_dims(module),
            num_heads=module.attn.num_heads,
            mlp_dims=module.mlp.fc2.in_features,
            window_size=size,
            shift_size=shift)

    @classmethod
    def no_trunk(cls, backbone: nn.Module) -> Optional[str]:
        if is_a(cls.model(backbone)[1], NETS[2:]):
            return ('hooks of timm take them from inside; set feature_cls to '
                    "'list' or 'getter'")
        return None

    @classmethod
    def mergings(cls, backbone: nn.Module) -> Dict[int, nn.Module]:
        return {
            i: stage.downsample
            for i, (_, stage) in cls.stages(backbone).items()
            if not isinstance(stage.downsample, nn.Identity)
        }

    @classmethod
    def merge_map(cls, merging: nn.Module, layout: TokenLayout,
                  tokens: Tensor) -> Tensor:
        return merging(tokens.unflatten(1, layout.hw_shape)).flatten(1, 2)

    @classmethod
    def merge_tokens(cls, merging: nn.Module, tokens: Tensor) -> Tensor:
        # A token takes the place of all four neighbours, whose channels the
        # stock layer puts one after the other.
        return merging.reduction(merging.norm(tokens.repeat(1, 1, 4)))

    @classmethod
    def outputs(cls, backbone: nn.Module) -> Dict[int, Optional[str]]:
        prefix, model = cls.model(backbone)
        getter, stages = cls.getter(backbone), cls.stages(backbone)
        last = max(stages)
        if is_a(model, NETS):
            return dict.fromkeys(sorted(model.feature_info.out_indices))
        if getter is None:
            return {last: f'{prefix}norm'}
        return {
            i: f'{prefix}norm' if getter.norm and i == last else None
            for i in cls.taken(getter, len(stages))
        }

    @classmethod
    def join_outputs(cls, backbone: nn.Module, stream: Stream,
                     stages: Sequence[int]) -> list:
        outputs, handles = cls.outputs(backbone), []
        places = {s: i for i, s in enumerate(outputs) if outputs[s] is None}
        kept = JoinedStages(stream, places)
        for number in stages:
            if number in places:
                module = cls.stages(backbone)[number][1]
                handles.append(module.register_forward_hook(kept.keep))
            else:
                norm = backbone.get_submodule(outputs[number])
                norm._peft_output = (stream, number)
                handles.append(norm.register_forward_pre_hook(join_norm))
        if places:
            net = cls.getter(backbone) or cls.model(backbone)[1]
            handles += [
                net.register_forward_pre_hook(kept.begin),
                net.register_forward_hook(kept.give)
            ]
        return handles

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        prefix, getter = cls.model(backbone)[0], cls.getter(backbone)
        if getter is None:
            return []
        outputs = cls.outputs(backbone)
        paths = [
            path for i, (path, _) in cls.stages(backbone).items()
            if i > max(outputs)
        ]
        norm = f'{prefix}norm'
        return paths + [norm] * (norm not in outputs.values())

    @classmethod
    def final_norm(cls, backbone: nn.Module) -> str:
        outputs = cls.outputs(backbone)
        path = outputs[max(outputs)]
        if path is None:
            raise SiteError('Features of timm\'s Swin have no norm; leave '
                            'final_norm=True out.')
        return path
