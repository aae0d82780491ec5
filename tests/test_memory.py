"""memory='fast' and 'lean' compute what 'stock' does, and keep less."""
import copy
import gc
import weakref

import pytest
import torch
import torch.nn as nn
from conftest import METHODS, build_pair, perturb
from kinds import KINDS
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS

import mmpeft
from mmpeft import recipes as recipes_module
from mmpeft.engine.measure import kept_by_forward
from mmpeft.errors import PEFTError
from mmpeft.methods.base import PEFTModule
from mmpeft.recipes import Recipes, current
from mmpeft.recompute import MEMORY

TRAINED = [m for m in METHODS if m not in ('Full', 'Frozen')]
# All methods where most is rearranged, and all kinds with those whose modules
# stand at all sorts of sites.
FEW = ('Mona', 'LoRA', 'SSF', 'Adapter', 'VPTDeep', 'LNTune', 'IA3')
PAIRS = [(k, m) for k in KINDS for m in TRAINED
         if k in ('mmdet', 'vit') or m in FEW]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def build(kind, method, memory):
    """In training mode; the same weights and draws whatever the setting."""
    _, peft = build_pair(kind, METHODS.get(method, method), memory=memory)
    return perturb(peft).train()


def step(backbone, image, seed=3):
    """Outputs and gradients."""
    torch.manual_seed(seed)
    outputs = backbone(image)
    backbone.zero_grad()
    sum((o.float()**2).mean() for o in outputs).backward()
    return [o.detach() for o in outputs], {
        n: p.grad
        for n, p in backbone.named_parameters() if p.grad is not None
    }


def assert_same(found, expected, tolerance):
    for a, b in zip(found[0], expected[0]):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert found[1].keys() == expected[1].keys()
    whole = max(float(g.abs().max()) for g in expected[1].values())
    for name, grad in expected[1].items():
        gap = (found[1][name] - grad).abs().max()
        # A gradient that is rounding only, as of the bias of keys, has
        # nothing to be relative to.
        assert gap <= tolerance * max(float(grad.abs().max()), .01 * whole), (
            name, gap)


@pytest.mark.parametrize('kind, name', PAIRS, indirect=['kind'])
def test_same_as_stock(name, kind, image):
    """In double precision, so that nothing hides in the rounding."""
    image = image.double()
    expected = step(build(kind, name, 'stock').double(), image)
    for memory in ('fast', 'lean'):
        found = step(build(kind, name, memory).double(), image)
        assert_same(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize('name', ['Mona', 'LoRA', 'SSF', 'Adapter', 'LNTune'])
@pytest.mark.parametrize('memory', ['fast', 'lean'])
def test_single_precision_and_autocast(name, memory):
    pytest.importorskip('mmdet')
    image = torch.randn(2, 3, 50, 41)
    stock, ours = build('mmdet', name, 'stock'), build('mmdet', name, memory)
    assert_same(
        step(ours, image), step(stock, image), TOLERANCE[torch.float32])
    with torch.autocast('cpu', torch.bfloat16):
        expected, found = step(stock, image), step(ours, image)
    assert_same(found, expected, .1)
    assert {g.dtype for g in found[1].values()} == {torch.float32}


@pytest.mark.parametrize('name', ['Mona', 'LoRA', 'LNTune', 'BitFit'])
def test_keeps_less(name):
    pytest.importorskip('mmdet')
    image = torch.randn(2, 3, 64, 64)
    kept = {}
    for memory in ('stock', 'fast', 'lean'):
        model = build('mmdet', name, memory)
        model(image)
        kept[memory] = kept_by_forward(model, image).saved
    assert kept['lean'] < .8 * kept['fast'] < .8 * kept['stock']
    # It is the default, and what checkpointing keeps is not ours to change.
    model = build_pair('mmdet', METHODS[name])[1].train()
    assert model.peft.memory == 'fast'


def test_what_an_activation_made_is_made_again(monkeypatch):
    """The map in front of fc2, which IA3 scales, in each block."""
    pytest.importorskip('mmdet')
    # Maps of 15 x 11 and of 8 x 6 in two stages of two blocks.
    hidden = 2 * 4 * 4 * (165 * 16 + 48 * 32)
    found = []
    for follow in (lambda block: None, None):
        with monkeypatch.context() as patch:
            if follow is not None:
                patch.setattr('mmpeft.backbones.base.follow_activations',
                              follow)
            backbone = build('mmdet', 'IA3', 'fast')
        image = torch.randn(1, 3, 60, 44)
        backbone(image)
        found.append(kept_by_forward(backbone, image).saved)
    assert found[0] - found[1] == hidden


def test_checkpointed_blocks_keep_as_little():
    pytest.importorskip('mmdet')
    image = torch.randn(2, 3, 64, 64)
    kept = {}
    for memory in ('stock', 'lean'):
        model = build('mmdet', 'Mona', memory)
        for stage in model.stages:
            for block in stage.blocks:
                block.with_cp = True
        model(image)
        kept[memory] = kept_by_forward(model, image).saved
    assert kept['lean'] <= kept['stock']


def test_nothing_is_left_behind(monkeypatch):
    """Neither outputs nor recipes, which hold what others are made of; and
    without the garbage collector, so that there is no cycle."""
    pytest.importorskip('mmdet')
    written = []

    class Seen(recipes_module.Recipe):

        def __init__(self, *args):
            super().__init__(*args)
            written.append(weakref.ref(self))

    monkeypatch.setattr(recipes_module, 'Recipe', Seen)
    model = build('mmdet', 'Mona', 'lean')
    gc.disable()
    try:
        outputs = model(torch.randn(1, 3, 32, 32))
        seen = [weakref.ref(o) for o in outputs]
        assert any(r() is not None for r in written)
        sum(o.sum() for o in outputs).backward()
        del outputs
        assert all(r() is None for r in seen)
        assert all(r() is None for r in written)
    finally:
        gc.enable()
    assert current() is None


def test_backward_twice_and_two_forwards():
    pytest.importorskip('mmdet')
    stock, ours = (build('mmdet', 'Mona', m) for m in ('stock', 'lean'))
    images = torch.randn(2, 1, 3, 45, 33)
    grads = []
    for model in (stock, ours, copy.deepcopy(ours)):
        model.zero_grad()
        torch.manual_seed(0)
        losses = [sum((o**2).mean() for o in model(i)) for i in images]
        losses[0].backward(retain_graph=True)
        losses[0].backward()
        losses[1].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b, c in zip(*grads):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        assert torch.equal(b, c)


def test_an_activation_in_place():
    """What is changed after its recipe was written is kept as it is."""
    pytest.importorskip('mmdet')
    cfg = copy.deepcopy(KINDS['mmdet'].cfg)
    cfg['act_cfg'] = dict(type='ReLU', inplace=True)
    results = []
    for memory in ('stock', 'lean'):
        torch.manual_seed(0)
        model = MODELS.build(
            dict(
                cfg,
                type='mmpeft.PEFTBackbone',
                stock='mmdet.SwinTransformer',
                method='LoRA:rank=4,targets=[q,fc2]',
                memory=memory,
                allow_random_base=True))
        results.append(
            step(
                perturb(model, only='').double().train(),
                torch.ones(1, 3, 40, 40).double().requires_grad_()))
    assert_same(results[1], results[0], 1e-12)


def test_other_hooks_see_everything():
    """Of a user who moves what is kept to the CPU, or counts it."""
    model = build('mmdet', 'LNTune', 'lean')
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append(t) or t, lambda t: t):
        model(torch.randn(1, 3, 32, 32))
    widths = {t.shape[-1] for t in seen if t.ndim == 3}
    # Among them what the activations get, which lean does not keep.
    assert {64, 128} <= widths


def test_recipes_are_followed_once_for_several_places():
    x, made = torch.randn(3, requires_grad=True), []

    def double(t):
        made.append(1)
        return 2 * t

    with Recipes(x, lean=False) as recipes:
        y = double(x)
        recipes.add(y, lambda: double(x))
        z = (y**2).sum() + (y**3).sum() + y.exp().sum()
    del y
    z.backward()
    assert len(made) == 2
    expected = 2 * (2 * (2 * x) + 3 * (2 * x)**2 + (2 * x).exp())
    assert torch.allclose(x.grad, expected)


def test_eject_and_setting():
    pytest.importorskip('mmdet')
    stock, peft = build_pair('mmdet', 'LNTune', memory='lean')
    before = {n: len(m._forward_hooks) for n, m in stock.named_modules()}
    mmpeft.injection.eject(peft)
    assert before == {
        n: len(m._forward_hooks) + len(m._forward_pre_hooks)
        for n, m in peft.named_modules()
    }
    assert [type(m)
            for m in peft.modules()] == [type(m) for m in stock.modules()]
    with pytest.raises(PEFTError, match="memory='less' is not one of 'stock'"):
        build_pair('mmdet', 'LNTune', memory='less')
    assert build_pair('mmdet', 'Full', memory='lean')[1].peft.memory == 'stock'


@pytest.mark.parametrize('name', ['Mona', 'SSF', 'LoRA', 'LNTune'])
def test_hooks_of_parameters_are_called(name):
    """As PEFTReportHook has them, to tell which never get a gradient."""
    pytest.importorskip('mmdet')
    model, seen = build('mmdet', name, 'fast'), set()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for n, p in trained.items():
        p.register_hook(lambda grad, n=n: seen.add(n))
    step(model, torch.randn(2, 3, 40, 40))
    assert seen == set(trained)


class Noisy(PEFTModule):
    """Draws at a place that other recipes lead through."""

    def __init__(self, site, at='norm1', drop_path=False):
        super().__init__(site)
        self.scale = nn.Parameter(torch.ones(site.out_dims))
        self.noise = DropPath(.5) if drop_path else nn.Dropout(.5)

    @classmethod
    def sites_for(cls, at='norm1', drop_path=False):
        return (at, )

    def reset_parameters(self):
        pass

    def forward(self, x, y, layout):
        return self.noise(y) * self.scale


@pytest.mark.parametrize('at', [
    'norm1', 'qkv_input', 'qkv', 'norm2', 'fc1_input', 'fc1', 'fc2_input',
    'ffn_branch', 'ffn_residual'
])
@pytest.mark.parametrize('drop_path', [False, True])
def test_draws_anywhere(at, drop_path):
    """With LoRA, which asks for what was made of them."""
    pytest.importorskip('mmdet')
    method = [
        dict(type=Noisy, at=at, drop_path=drop_path),
        dict(type='LoRA', rank=2, targets=['q', 'fc1'])
    ]
    image = torch.randn(3, 3, 40, 40).double()
    results = []
    for memory in MEMORY:
        _, peft = build_pair('mmdet', method, memory=memory)
        results.append(step(perturb(peft).double().train(), image))
    for found in results[1:]:
        assert_same(found, results[0], TOLERANCE[torch.float64])


def test_dropout_in_the_way():
    """What draws random numbers is not made again."""
    pytest.importorskip('mmdet')
    method = 'LoRA:rank=4,targets=[fc1],drop_rate=.5'
    image = torch.randn(2, 3, 40, 40)
    found, expected = (
        step(build('mmdet', method, m), image) for m in ('lean', 'stock'))
    assert_same(found, expected, 2e-5)
    assert nn.Dropout in {
        type(m)
        for m in build('mmdet', method, 'lean').modules()
    }
