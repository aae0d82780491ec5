"""Tiny stock backbones and every method, for the tests of all pairs."""
import copy
import importlib
import os

import pytest
import torch
from kinds import KINDS, LIBRARIES
from mmengine.registry import MODELS

import mmpeft
from mmpeft.backbones import find_family
from mmpeft.engine.listing import refusal
from mmpeft.registry import METHODS as METHOD_CLASSES

# Two processes share the tests, and threads that wait for each other's cores
# make both several times slower. For what the tests start, too.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'

# Its checks say what differs, as those of a test file do.
pytest.register_assert_rewrite('families')

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
    'Rein': 'Rein:num_tokens=5,rank=2',
    'E3VA': 'E3VA:rank=2',
    'LST': 'LST:reduction=4',
    'LAST': 'LAST:rank=4',
    'DTL': 'DTL',
    'DTLPlus': 'DTLPlus:kernel_size=3',
    'HST': 'HST:dims=[4,6,8],num_heads=[1,2,2]',
    'ViTAdapter': 'ViTAdapter:inplanes=4,num_heads=2',
    'SCT': 'SCT:num_channels=4',
    'SCT, MLP': 'SCT:num_channels=4,target=mlp',
    'GPS': 'GPS:num_inputs=2',
    'NOAH': 'NOAH:num_tokens=3,rank=4,dim=4',
}


def method_of(name):
    """The class that an entry of METHODS is about."""
    return METHOD_CLASSES.get(name.split(',')[0])


METHOD_CLASSES.import_from_location()


def stock_cfg(kind, **kwargs):
    """Config of one of KINDS."""
    return dict(copy.deepcopy(KINDS[kind].cfg), **kwargs)


def peft_cfg(kind, method, **kwargs):
    """The same with a method."""
    return with_method(stock_cfg(kind), method, **kwargs)


def with_method(cfg, method, **kwargs):
    """The config of a stock backbone with a method."""
    return dict(
        cfg,
        type='mmpeft.PEFTBackbone',
        stock=cfg['type'],
        method=method,
        **kwargs)


def build_pair(kind, method, **kwargs):
    """A stock backbone, and a PEFT one that loaded its weights.

    What is frozen in one is frozen in the other: torch computes products with
    a frozen weight in another way, with other bits.
    """
    importlib.import_module(KINDS[kind].library)
    torch.manual_seed(0)
    stock = MODELS.build(stock_cfg(kind))
    perturb(stock, only='')
    peft = MODELS.build(peft_cfg(kind, method, **kwargs))
    peft.load_state_dict(stock.state_dict(), strict=False)
    calibrate(peft, (2, 3, *KINDS[kind].sizes[0]))
    for name, parameter in stock.named_parameters():
        parameter.requires_grad = peft.get_parameter(name).requires_grad
    return stock, peft


def calibrate(backbone, shape):
    """Let methods that need it look at images before they train."""
    dtype = next(backbone.parameters()).dtype
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(shape, generator=generator).to(dtype)

    def loss(model, batch):
        # Not the square, whose mean is 1 behind a norm.
        return sum((o.float()**3).mean() for o in model(batch))

    return mmpeft.calibrate(backbone, [image], loss)


def family_of(kind):
    """The site map of a kind of backbone."""
    importlib.import_module(KINDS[kind].library)
    return find_family(MODELS.build(stock_cfg(kind)))[0][1].family


def perturb(module, only='.peft.'):
    """Random values everywhere, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    module.state_dict()  # what waits for its base would start again later
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


@pytest.fixture(scope='module', params=KINDS)
def kind(request):
    """Each kind of backbone, where its library is installed.

    Of the scope of a module, so that tests of one kind run one after another.
    """
    facts = KINDS[request.param]
    for package in (facts.library, *facts.packages):
        pytest.importorskip(package)
    return request.param


@pytest.fixture
def image():
    """A batch whose size neither window nor patch divides."""
    torch.manual_seed(2)
    return torch.randn(2, 3, 60, 44)


def pytest_collection_modifyitems(config, items):
    """Leave out pairs that a family refuses; test_matrix lists them, and
    tests that each says so."""
    left_out, families = [], {}
    for item in items:
        params = getattr(getattr(item, 'callspec', None), 'params', {})
        name, kind = params.get('name'), params.get('kind')
        if name in METHODS and kind in KINDS:
            if kind not in families:
                families[kind] = family_of(kind)
            if refusal(method_of(name), families[kind]):
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
