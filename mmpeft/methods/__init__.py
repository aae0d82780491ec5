"""What is attached: one file per method."""
from .adapter import Adapter
from .adaptformer import AdaptFormer
from .base import PEFTModule, Selector
from .bitfit import BitFit
from .full import Frozen, Full
from .ln_tune import LNTune
from .lora import LoRA
from .mona import Mona
from .partial import Partial
from .side import SideNetwork

__all__ = [
    'PEFTModule', 'Selector', 'SideNetwork', 'Full', 'Frozen', 'Partial', 'BitFit', 'LNTune',
    'Adapter', 'AdaptFormer', 'LoRA', 'Mona'
]
