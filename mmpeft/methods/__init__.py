"""What is attached: one file per method."""
from .ada_lora import AdaLoRA
from .adapter import Adapter
from .adapter_plus import AdapterPlus
from .adaptformer import AdaptFormer
from .bapat import BAPAT
from .base import PEFTModule, Selector
from .bitfit import BitFit
from .convpass import Convpass
from .dora import DoRA
from .dtl import DTL, DTLPlus
from .e3va import E3VA
from .fact import FacTTK, FacTTT
from .full import Frozen, Full
from .gps import GPS
from .hst import HST
from .hydra import Hydra
from .ia3 import IA3
from .last import LAST
from .ln_tune import LNTune
from .lora import LoRA
from .lorand import LoRand
from .lst import LST
from .mona import Mona
from .noah import NOAH
from .partial import Partial
from .prefix_tuning import PrefixTuning
from .rein import Rein
from .rep_adapter import RepAdapter
from .sct import SCT
from .side import SideNetwork
from .snf import SNF
from .ssf import SSF
from .vera import VeRA
from .vit_adapter import ViTAdapter
from .vpt import VPTDeep, VPTShallow

__all__ = [
    'PEFTModule', 'Selector', 'SideNetwork', 'Full', 'Frozen', 'Partial',
    'BitFit', 'LNTune', 'Adapter', 'AdaptFormer', 'LoRA', 'Mona', 'VPTDeep',
    'VPTShallow', 'PrefixTuning', 'BAPAT', 'LoRand', 'AdapterPlus', 'FacTTK',
    'FacTTT', 'Hydra', 'RepAdapter', 'SSF', 'SNF', 'Convpass', 'DoRA', 'VeRA',
    'IA3', 'AdaLoRA', 'E3VA', 'LST', 'LAST', 'DTL', 'DTLPlus', 'NOAH', 'SCT',
    'GPS', 'HST', 'Rein', 'ViTAdapter'
]
