"""Models of timm: bare, as feature extractors, and in ``TIMMBackbone``."""
import re
from typing import List, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from .base import SiteMap, class_path
from .grid import Grid
from .prenorm import PreNormForward

__all__ = ['StemGrid', 'TimmForward', 'TimmSites', 'is_a']

#: What mmpretrain and mmseg put around a timm model, as ``timm_model``.
WRAPPERS = ('mmpretrain.models.backbones.timm_backbone.TIMMBackbone',
            'mmseg.models.backbones.timm_backbone.TIMMBackbone')
#: What timm itself makes of one with ``features_only=True``: a net that asks
#: its ``model``, or that consists of its parts.
GETTERS = ('timm.models._features.FeatureGetterNet', )
NETS = ('timm.models._features.FeatureListNet',
        'timm.models._features.FeatureDictNet',
        'timm.models._features.FeatureHookNet')


def is_a(module: object, paths: Sequence[str]) -> bool:
    """Whether the class of a module, or one it comes from, is among these.

    timm itself is never imported here.
    """
    return not {class_path(c) for c in type(module).__mro__}.isdisjoint(paths)


class TimmForward(PreNormForward):
    """What both forwards call alike."""

    # Stock blocks do not checkpoint; set it on one to have it do so.
    with_cp = False
    attn_drop_path = property(lambda self: self.drop_path1)
    ffn_drop_path = property(lambda self: self.drop_path2)
    joined_attention = property(lambda self: self.attn)


class StemGrid(Grid):
    """The grid of a stem that returns tokens alone, or a map (B, H, W, C)."""

    def note(self, stem: nn.Module, args: tuple, output: Tensor) -> None:
        shape = output.shape[1:3]
        if output.ndim == 3:
            shape = stem.dynamic_feat_size(args[0].shape[-2:])
        self.hw_shape = (int(shape[0]), int(shape[1]))


class TimmSites(SiteMap):
    """What the families of timm have in common: where the model is."""

    backbone_types = WRAPPERS
    # Other models of timm are made of the same blocks.
    roams = True
    #: Full paths of the stock models.
    model_types: Tuple[str, ...] = ()
    #: Modules of ``timm.models`` whose entry points make such models.
    modules_with: Tuple[str, ...] = ()

    @classmethod
    def recognises(cls, backbone: type, cfg: dict) -> bool:
        if class_path(backbone) not in cls.backbone_types:
            return False
        try:
            from timm.models import is_model_in_modules, model_entrypoint
        except ImportError:
            return False
        name = str(cfg.get('model_name'))
        if not is_model_in_modules(name, cls.modules_with):
            return False
        # An architecture of other blocks says so in its entry point.
        constants = model_entrypoint(name).__code__.co_consts
        other = any(
            isinstance(c, tuple) and 'block_fn' in c for c in constants)
        return not other and 'block_fn' not in cfg

    @classmethod
    def hosts(cls, module: nn.Module) -> bool:
        return is_a(module, WRAPPERS + GETTERS + NETS + cls.model_types)

    @classmethod
    def locate(cls, root: nn.Module,
               path: str) -> Optional[Tuple[str, str, int]]:
        names = path.split('.')
        paths = ['.'.join(names[:i]) for i in range(len(names))]
        # The outermost: a wrapper, and not the model inside.
        host = next((p for p in paths if cls.hosts(root.get_submodule(p))),
                    None)
        if host is None:
            return None
        inner = path[len(host) + 1:] if host else path
        match = re.fullmatch(cls.block_pattern, inner)
        model = cls.model(root.get_submodule(host))[1]
        if match is None or not is_a(model, NETS + cls.model_types):
            return None
        stage = int(match.groupdict().get('stage') or 0)
        return host, match['stage_path'], stage

    @classmethod
    def getter(cls, backbone: nn.Module) -> Optional[nn.Module]:
        """The net that asks a model for its features; None if none does."""
        net = backbone.timm_model if is_a(backbone, WRAPPERS) else backbone
        return net if is_a(net, GETTERS) else None

    @classmethod
    def model(cls, backbone: nn.Module) -> Tuple[str, nn.Module]:
        """The model itself, and its path with a dot behind."""
        prefix = ''
        if is_a(backbone, WRAPPERS):
            prefix, backbone = 'timm_model.', backbone.timm_model
        if is_a(backbone, GETTERS):
            prefix, backbone = f'{prefix}model.', backbone.model
        return prefix, backbone

    @classmethod
    def taken(cls, getter: nn.Module, count: int) -> List[int]:
        """Numbers of the blocks or stages that a getter takes."""
        wanted = getter.out_indices
        if isinstance(wanted, int):
            return list(range(count - wanted, count))
        return sorted(i % count for i in wanted)

    @classmethod
    def attention(cls, block: nn.Module) -> nn.Module:
        return block.attn

    @classmethod
    def drop_path(cls, block: nn.Module) -> float:
        return float(getattr(block.drop_path1, 'drop_prob', 0.))

    @classmethod
    def left_alone(cls, backbone: nn.Module) -> List[str]:
        # The head of a bare model is no part of the backbone.
        return ['head', 'head_dist'] if is_a(backbone, cls.model_types) else []
