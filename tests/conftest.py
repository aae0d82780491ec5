"""Tiny stock backbones: the Swin of the three libraries, and ViT."""
import importlib

import pytest
import torch
from mmengine.registry import MODELS

from mmpeft.registry import METHODS as METHOD_CLASSES

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
#: What tests of all families run on: the Swin of each library, and a ViT with
#: a class token and two outputs.
KINDS = LIBRARIES + ('vit', )
#: Every method with widths that fit a backbone of 16 and 32 channels.
METHODS = {
    'Full': 'Full',
    'Frozen': 'Frozen',
    'Partial': 'Partial',
    'BitFit': 'BitFit',
    'LNTune': 'LNTune',
    'Adapter': 'Adapter:dim=4',
    'AdaptFormer': 'AdaptFormer:dim=4',
    'LoRA': 'LoRA:rank=4,targets=[q,k,v,proj,fc1,fc2]',
    'Mona': 'Mona:dim=4',
    'VPTShallow': 'VPTShallow:num_tokens=3',
    'VPTDeep': 'VPTDeep:num_tokens=3',
    'VPTDeep, raw': 'VPTDeep:num_tokens=3,norm=False',
    'PrefixTuning': 'PrefixTuning:num_tokens=3',
    'PrefixTuning, reparam': 'PrefixTuning:num_tokens=3,reparam=True',
    'LoRA, PiSSA': 'LoRA:rank=4,init=pissa',
    'DoRA': 'DoRA:rank=4,targets=[q,k,v,proj,fc1,fc2]',
    'VeRA': 'VeRA:rank=4,targets=[q,k,v,proj,fc1,fc2]',
    'IA3': 'IA3',
    'AdaLoRA': 'AdaLoRA:rank=4',
    'FacTTT': 'FacTTT:rank=4',
    'FacTTK': 'FacTTK:rank=4',
    'Hydra': 'Hydra:rank=2',
    'RepAdapter': 'RepAdapter:dim=4',
    'SSF': 'SSF',
    'SNF': 'SNF:num_flows=2',
    'BAPAT': 'BAPAT:dim=4,adaptformer_dim=4',
    'LoRand': 'LoRand:rank=2',
    'Convpass': 'Convpass:dim=4',
    'AdapterPlus': 'AdapterPlus:dim=4',
    'E3VA': 'E3VA:rank=2',
    'LST': 'LST:reduction=4',
    'LAST': 'LAST:rank=4',
}


def method_of(name):
    """The class that an entry of METHODS is about."""
    return METHOD_CLASSES.get(name.split(',')[0])


METHOD_CLASSES.import_from_location()


def stock_cfg(library, **kwargs):
    """Config of a two-stage Swin; drop-path on, window 7. Or of a ViT."""
    if library == 'vit':
        cfg = dict(
            type='mmpretrain.VisionTransformer',
            arch=dict(
                embed_dims=16,
                num_layers=4,
                num_heads=2,
                feedforward_channels=64),
            img_size=48,
            patch_size=8,
            out_type='featmap',
            out_indices=(1, 3),
            layer_scale_init_value=.5,
            drop_path_rate=.2)
    elif library == 'mmpretrain':
        cfg = dict(
            type='mmpretrain.SwinTransformer',
            arch=dict(embed_dims=16, depths=[2, 2], num_heads=[2, 4]),
            pad_small_map=True,
            out_indices=(0, 1),
            drop_path_rate=.2)
    else:
        cfg = dict(
            type=f'{library}.SwinTransformer',
            embed_dims=16,
            depths=(2, 2),
            num_heads=(2, 4),
            strides=(4, 2),
            out_indices=(0, 1),
            drop_path_rate=.2)
    cfg.update(kwargs)
    return cfg


def peft_cfg(library, method, **kwargs):
    """The same with a method."""
    cfg = stock_cfg(library)
    return dict(
        cfg,
        type='mmpeft.PEFTBackbone',
        stock=cfg['type'],
        method=method,
        **kwargs)


def library_of(kind):
    """The library that a kind of backbone is from."""
    return kind if kind in LIBRARIES else 'mmpretrain'


def build_pair(library, method, **kwargs):
    """A stock backbone, and a PEFT one that loaded its weights."""
    importlib.import_module(library_of(library))
    torch.manual_seed(0)
    stock = MODELS.build(stock_cfg(library))
    perturb(stock, only='')
    peft = MODELS.build(peft_cfg(library, method, **kwargs))
    peft.load_state_dict(stock.state_dict(), strict=False)
    return stock, peft


def perturb(module, only='.peft.'):
    """Random values everywhere, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if only in f'.{name}':
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise.to(parameter), alpha=.05)
    return module


@pytest.fixture(params=LIBRARIES)
def library(request):
    """Each of the three libraries, where it is installed."""
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    """Each kind of backbone, where its library is installed."""
    pytest.importorskip(library_of(request.param))
    return request.param


@pytest.fixture
def image():
    """A batch whose size neither window nor patch divides."""
    torch.manual_seed(2)
    return torch.randn(2, 3, 60, 44)
