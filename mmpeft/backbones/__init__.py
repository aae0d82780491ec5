"""Where methods can be attached: one file per family of blocks."""
from .base import Block, SiteMap, class_path, find_family
from .deit3 import DeiT3Sites
from .swin import SwinSites
from .vit import ViTSites
from .vit_sam import ViTSAMSites

__all__ = [
    'Block', 'DeiT3Sites', 'SiteMap', 'SwinSites', 'ViTSAMSites',
    'ViTSites', 'class_path', 'find_family'
]
