"""Where methods can be attached: one file per family of blocks."""
from .base import Block, SiteMap, class_path, find_family
from .swin import SwinSites

__all__ = ['Block', 'SiteMap', 'SwinSites', 'class_path', 'find_family']
