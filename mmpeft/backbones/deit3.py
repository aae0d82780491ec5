"""DeiT III blocks of mmpretrain."""
from typing import Dict, List

import torch.nn as nn

from ..registry import SITE_MAPS
from .vit import ViTForward, ViTSites

__all__ = ['DeiT3Sites']


class DeiT3Forward(ViTForward):
    """The same, as mmpretrain's DeiT III has it: its first norm stands before
    the MLP, too, and its second one is never called."""

    norm2 = property(lambda self: self.ln1)
    second_norm = 'norm1'


@SITE_MAPS.register_module()
class DeiT3Sites(ViTSites):
    """DeiT III: ViT with blocks of its own."""

    block_types = (
        'mmpretrain.models.backbones.deit3.DeiT3TransformerEncoderLayer', )
    backbone_types = ('mmpretrain.models.backbones.deit3.DeiT3', )
    aliases = dict(norm2='norm1')
    mixin = DeiT3Forward

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        modules = super().modules(block)
        del modules['norm2']
        return modules

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        return super().unreached(backbone) + [
            f'layers.{i}.ln2' for i in range(len(backbone.layers))
        ]
