"""Where methods can be attached: one file per family of blocks."""
from .base import Block, SiteMap, class_path, find_family
from .deit3 import DeiT3Sites
from .swin import SwinSites
from .vit import ViTSites

__all__ = [
    'Block', 'DeiT3Sites', 'SiteMap', 'SwinSites', 'ViTSites', 'class_path',
    'find_family'
]
