"""Tiny Swin backbones of the three libraries, with and without methods."""
import importlib

import pytest
import torch.nn as nn

from mmpeft.injection import PEFTBackbone
from mmpeft.sites import STREAM_SITES, Site, TokenLayout

MODULES = dict(
    mmdet='mmdet.models.backbones.swin',
    mmseg='mmseg.models.backbones.swin',
    mmpretrain='mmpretrain.models.backbones.swin_transformer')
LIBRARIES = tuple(MODULES)


def swin(library: str,
         method=None,
         embed_dims: int = 16,
         depths=(2, 2),
         num_heads=(2, 4),
         window_size: int = 4,
         drop_path_rate: float = 0.,
         freeze=(),
         **kwargs) -> nn.Module:
    """A Swin whose every stage is an output; stock if ``method`` is None."""
    pytest.importorskip(library)
    stock = importlib.import_module(MODULES[library]).SwinTransformer
    kwargs.update(
        window_size=window_size,
        drop_path_rate=drop_path_rate,
        out_indices=tuple(range(len(depths))))
    if library == 'mmpretrain':
        kwargs.update(
            arch=dict(
                embed_dims=embed_dims,
                depths=list(depths),
                num_heads=list(num_heads)),
            pad_small_map=True)
    else:
        kwargs.update(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            strides=(4, ) + (2, ) * (len(depths) - 1))
    if method is None:
        return stock(**kwargs)
    return PEFTBackbone(
        stock, method, freeze=freeze, allow_random_base=True, **kwargs)


def site(name: str, dims: int) -> Site:
    """A site of a block of width ``dims``."""
    if name in STREAM_SITES or name in ('norm1', 'norm2', 'proj'):
        return Site(name, dims, dims)
    if name == 'qkv':
        rows = {p: (i * dims, i * dims + dims) for i, p in enumerate('qkv')}
        return Site(name, dims, 3 * dims, rows=rows)
    widths = dict(fc1=(dims, 4 * dims), fc2=(4 * dims, dims))[name]
    return Site(name, *widths)


def trained(module: nn.Module) -> dict:
    """The parameters that train, by name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


NO_LAYOUT = TokenLayout()
