"""Where methods can be attached: one file per family of blocks."""
from .base import Block, SiteMap, class_path, find_family
from .beit import BEiTSites, MMSegBEiTSites
from .deit3 import DeiT3Sites
from .eva02 import EVA02Sites
from .mit import MiTSites
from .swin import SwinSites
from .swin_v2 import SwinV2Sites
from .timm_swin import TimmSwinSites
from .timm_vit import TimmViTSites
from .vit import ViTSites
from .vit_mmseg import MMSegViTSites
from .vit_sam import ViTSAMSites

__all__ = [
    'BEiTSites', 'Block', 'DeiT3Sites', 'EVA02Sites', 'MMSegBEiTSites',
    'MMSegViTSites', 'MiTSites', 'SiteMap', 'SwinSites', 'SwinV2Sites',
    'TimmSwinSites', 'TimmViTSites', 'ViTSAMSites', 'ViTSites', 'class_path',
    'find_family'
]
