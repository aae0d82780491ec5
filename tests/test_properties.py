"""Drawn models: build, step, save, load, put on stock and merge agree.

By default the same draws each time; ``MMPEFT_DRAWS=1000 pytest -m slow`` on
this file draws that many new ones. A failure is shrunk and printed.
"""
import copy
import importlib
import os

import pytest
import torch
from conftest import METHODS, build_pair, calibrate, perturb, stock_cfg
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from kinds import KINDS
from mmengine.registry import MODELS

import mmpeft
from mmpeft.delta_parts import delta_names
from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.plan import parse_method_string
from mmpeft.state import load_whole

DRAWS = 30
#: Arguments that may be any small number.
SMALL = ('dim', 'rank', 'num_tokens', 'num_flows', 'num_channels',
         'num_inputs')
#: Backbones that take any size of image.
ANY_SIZE = ('mmdet', 'mmseg', 'mmpretrain', 'mit')
#: Why a model of methods that merge may be refused all the same.
NO_BIAS = 'no bias of the keys|no bias in the stock model'
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Case:
    """What was drawn.

    Args:
        kind (str): One of KINDS.
        cfg (dict): Of the stock backbone, with a width of its own.
        methods (list[dict]): One to three.
        dtype (torch.dtype): Of the model.
        image (tuple): Shape.
    """

    def __init__(self, kind, cfg, methods, dtype, image):
        self.kind, self.cfg, self.methods = kind, cfg, methods
        self.dtype, self.image = dtype, image

    def stock(self):
        torch.manual_seed(0)
        stock = MODELS.build(copy.deepcopy(self.cfg))
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.add_(.05 * torch.randn_like(parameter))
        stock.to(self.dtype).eval()
        return stock

    def runs(self):
        """Stock Swin has attention masks in float32, whatever its weights."""
        try:
            outputs(self.stock(), torch.zeros(self.image, dtype=self.dtype))
        except RuntimeError as error:
            if 'dtype' not in str(error):
                raise
            return False
        return True

    def model(self, seed):
        """With methods that start from this seed, on the same base."""
        stock = self.stock()
        torch.manual_seed(seed)
        model = mmpeft.apply(stock, copy.deepcopy(self.methods))
        return calibrate(model, self.image)

    def __repr__(self):
        return f'Case({vars(self)})'


def _installed(kind):
    try:
        for package in (kind.library, *kind.packages):
            importlib.import_module(package)
    except ImportError:
        return False
    return True


def _widened(cfg, factor):
    """Wherever the config says it."""
    widths = ('embed_dims', 'embed_dim', 'feedforward_channels')
    return {
        k:
        _widened(v, factor)
        if isinstance(v, dict) else int(v * factor) if k in widths else v
        for k, v in cfg.items()
    }


@st.composite
def _method(draw, name, number):
    """One of METHODS with numbers, blocks and perhaps a name of its own."""
    method, = parse_method_string(METHODS[name])
    for argument in SMALL:
        if argument in method:
            method[argument] = draw(st.integers(1, 7))
    if 'targets' in method:
        method['targets'] = draw(
            st.lists(
                st.sampled_from(method['targets']), min_size=1, unique=True))
    layers = draw(
        st.sampled_from([None, None, None, 'stage:0', [-1], [0, 2], [1]]))
    if layers is not None:
        method['layers'] = layers
    if draw(st.integers(0, 2)) == 2:
        method['name'] = f'own_{number}'
    return method


@st.composite
def cases(draw):
    """Of any kind that is installed; some of them cannot be built."""
    kind = draw(st.sampled_from([k for k in KINDS if _installed(KINDS[k])]))
    cfg = _widened(stock_cfg(kind), draw(st.sampled_from([16, 24, 32])) / 16)
    cfg['drop_path_rate'] = draw(st.sampled_from([0., .2]))
    names = draw(
        st.lists(
            st.sampled_from(sorted(METHODS)),
            min_size=1,
            max_size=3,
            unique=True))
    methods = [draw(_method(name, i)) for i, name in enumerate(names)]
    dtype = draw(
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    size = draw(st.sampled_from(KINDS[kind].sizes))
    if kind in ANY_SIZE:
        size = draw(st.tuples(*2 * [st.integers(24, 70)]))
    image = (draw(st.integers(1, 2)), 3, *size)
    return Case(kind, cfg, methods, dtype, image)


def _built(case):
    """Its model; what cannot be built says so in a PEFTError, and is not
    what these tests are about."""
    if not case.runs():
        case.dtype = torch.float32
    try:
        return case.model(1)
    except PEFTError as error:
        note(f'refused: {error}')
        reject()


@torch.no_grad()
def outputs(model, image):
    return [o.double() for o in model(image)]


def equal(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(found, expected))


def step(model, image):
    """One of AdamW, in training mode."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    loss = sum((o.float()**2).mean() for o in model(image))
    assert torch.isfinite(loss)
    if trained:
        loss.backward()
        torch.optim.AdamW(trained, lr=1e-2).step()
    model.eval()


def check(case, folder):
    model = _built(case)
    torch.manual_seed(2)
    image = torch.randn(case.image).to(case.dtype)
    base = {
        n: p.detach().clone()
        for n, p in model.named_parameters() if not p.requires_grad
    }
    step(model, image)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.items())
    expected = outputs(model, image)

    file = str(folder / 'drawn_delta.safetensors')
    header = mmpeft.save_delta(model, file)
    assert set(header.tensors) == delta_names(model)
    fresh = case.model(5)
    fresh.eval()
    mmpeft.load_delta(fresh, file)
    assert equal(outputs(fresh, image), expected)

    stock = case.stock()
    for name, parameter in stock.named_parameters():
        # torch multiplies with a frozen weight in another way.
        parameter.requires_grad = model.get_parameter(name).requires_grad
    first = outputs(stock, image)
    mmpeft.attach(stock, file, 'task')
    assert equal(outputs(stock, image), expected)
    mmpeft.detach(stock, 'task')
    assert equal(outputs(stock, image), first)
    check_merge(case, model, stock, image, expected)


def check_merge(case, model, stock, image, expected):
    """Exact, or refused where it must be."""
    reasons = {getattr(m, 'no_merge', None) for m in model.modules()} - {None}
    merges = not reasons and not model.peft._modules
    try:
        merged = merged_state_dict(model)
    except MergeError as error:
        note(f'refused: {error}')
        assert not merges or any(t in str(error) for t in NO_BIAS.split('|'))
        return
    assert not reasons
    load_whole(stock, merged)
    for a, b in zip(outputs(stock, image), expected):
        if case.dtype in TOLERANCE:
            gap = float((a - b).abs().max() / b.abs().max())
            assert gap < TOLERANCE[case.dtype]


# A third of what is drawn cannot be built, and a model takes its time.
SETTINGS = dict(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@given(cases())
@settings(max_examples=DRAWS, derandomize=True, **SETTINGS)
def test_drawn_models(tmp_path_factory, case):
    check(case, tmp_path_factory.mktemp('drawn'))


def test_networks_with_blocks_of_their_own():
    """Two beside different blocks add what each adds alone; a seed found
    that one ran beside the blocks of the other."""
    pytest.importorskip('mmpretrain')
    pytest.importorskip('timm')
    first = parse_method_string('E3VA:rank=1,layers=[1]')
    second = parse_method_string(METHODS['LAST'])
    image = torch.randn(1, 3, *KINDS['timm_vit'].sizes[0])
    found, state = [], {}
    for methods in (['Frozen'], first, second, first + second):
        _, model = build_pair('timm_vit', methods)
        if len(methods) == 2:
            load_whole(model, state)
        else:
            state.update(perturb(model).state_dict())
        found.append(outputs(model.eval(), image))
    for stock, a, b, both in zip(*found):
        assert not torch.equal(a, stock) and not torch.equal(b, stock)
        assert torch.allclose(both - stock, a + b - 2 * stock, atol=1e-5)


@pytest.mark.slow
@given(cases())
@settings(max_examples=int(os.environ.get('MMPEFT_DRAWS', 200)), **SETTINGS)
def test_many_drawn_models(tmp_path_factory, case):
    check(case, tmp_path_factory.mktemp('drawn'))
