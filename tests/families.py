"""What the tests of single families of blocks check alike.

A test file of a family has variants of its backbone by name, and ``cfg_of``,
which makes a new config of one; :func:`builders` does the rest.
"""
import copy

import pytest
import torch
import torch.nn as nn
from conftest import perturb
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmpeft.backbones import find_family
from mmpeft.config import add_method, find_backbones
from mmpeft.injection import eject, inject
from mmpeft.merging import merged_state_dict
from mmpeft.methods.side import SideNetwork

#: Methods at all kinds of sites, which can be on one backbone together.
TOGETHER = [
    'LoRA:rank=2,targets=[q,k,v,proj,fc1,fc2]', 'VPTShallow:num_tokens=2',
    'PrefixTuning:num_tokens=2', 'AdaptFormer:dim=4', 'Adapter:dim=4',
    'SNF:num_flows=2', 'Mona:dim=4', 'Convpass:dim=4', 'IA3'
]
#: Stock backbones that take a mask, which may be None.
MASKED = ('MAEViT', 'MaskFeatViT', 'BEiTPretrainViT', 'CAEPretrainViT')


# ------------------------------------------------------------------- fixtures
def scope_of(library):
    """Fixture: stock parts are built in the scope of a run, which other tests
    leave behind."""
    return pytest.fixture(autouse=True)(lambda: init_default_scope(library))


def image_of(height, width):
    """Fixture: a batch of two images."""

    @pytest.fixture
    def image():
        torch.manual_seed(2)
        return torch.randn(2, 3, height, width)

    return image


# ------------------------------------------------------------------- backbones
def builders(cfg_of, frozen=False):
    """``stock_of(variant, **kwargs)``, in training mode, and
    ``peft_of(variant, method, **kwargs)``, such a backbone and one with the
    same weights and a method.

    Args:
        cfg_of (Callable): Makes a new config, of a variant and of arguments
            that are added.
        frozen (bool): Whether the stock one of two is frozen, too: torch
            computes products with a frozen weight in another way, with other
            bits.
    """

    def stock_of(variant, **kwargs):
        torch.manual_seed(0)
        return perturb(MODELS.build(cfg_of(variant, **kwargs)), only='')

    def peft_of(variant, method, **kwargs):
        stock = stock_of(variant, **kwargs)
        peft = inject(copy.deepcopy(stock), method, allow_random_base=True)
        if frozen:
            stock.requires_grad_(False)
        return stock, peft

    return stock_of, peft_of


def classifier(backbone):
    """A model of mmpretrain, for a backbone of 16 channels."""
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone=backbone,
        head=dict(
            type='mmpretrain.VisionTransformerClsHead',
            num_classes=3,
            in_channels=16))


def blocks_of(backbone):
    """Its blocks in order, as their family describes them."""
    return [b for _, b in find_family(backbone)]


def run(backbone, image, seed=3):
    """All its outputs in one list, of one draw of what is random."""
    torch.manual_seed(seed)
    masked = type(backbone).__name__ in MASKED
    return flat(backbone(image, None) if masked else backbone(image))


def flat(outs):
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(outs, torch.Tensor):
        return [outs]
    outs = outs.values() if isinstance(outs, dict) else outs
    return [t for out in outs for t in flat(out)]


def stream_of(stock, image):
    """What enters its first block, and what leaves each."""
    seen, layers = [], [b.module for b in blocks_of(stock)]
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda m, args: seen.append(args[0]))
    ]
    hooks += [
        layer.register_forward_hook(lambda m, args, y: seen.append(y))
        for layer in layers
    ]
    run(stock, image)
    for hook in hooks:
        hook.remove()
    return seen


def loss_of(backbone, image):
    """A loss that all outputs are part of."""
    return sum((o**2).mean() for o in run(backbone, image))


def equal(a, b):
    """Whether two lists of tensors are the same, bit by bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def near(a, b):
    """Whether they are the same up to rounding."""
    return len(a) == len(b) and all(
        (x - y).abs().max() < 1e-5 * y.abs().max() for x, y in zip(a, b))


class Sum(SideNetwork):
    """Adds what left the blocks of a stage, and the same of earlier ones
    through the patch merging between."""

    def __init__(self, trunk):
        super().__init__(trunk)
        self.weight = nn.Parameter(torch.ones(()))

    def reset_parameters(self):
        pass

    def start(self, x, layout):
        return torch.zeros_like(x)

    def step(self, u, block, x, y, taps, layout):
        return u + y

    def next_stage(self, u, stage, downsample, layout):
        return downsample(u)

    def output(self, u, x, stage, layout):
        return x + self.weight * u


# ---------------------------------------------------------------------- checks
def check_as_stock(backbone, stock, image):
    """That nothing is left in a backbone after ``eject``."""
    assert list(backbone.state_dict()) == list(stock.state_dict())
    assert [type(m)
            for m in backbone.modules()] == [type(m) for m in stock.modules()]
    assert not any('_peft' in key or '_stock' in key
                   for m in backbone.modules() for key in vars(m))
    assert equal(run(backbone, image), run(stock, image))


def check_bare(stock, image):
    """Blocks of ours with nothing attached are the stock ones, bit by bit:
    frozen and in training, outputs and gradients.

    Returns:
        nn.Module: A copy that had such blocks, and is a stock one again.
    """
    bare = copy.deepcopy(stock)
    for block in blocks_of(bare):
        block.family.swap(block.module)
    assert list(bare.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        assert equal(run(stock, image), run(bare, image))
    grads = []
    assert equal(run(stock, image), run(bare, image))
    for backbone in (stock, bare):
        loss_of(backbone, image).backward()
        grads.append([p.grad for p in backbone.parameters()])
    for a, b in zip(*grads):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    eject(bare)
    check_as_stock(bare, stock, image)
    return bare


def check_looked_at(stock, peft, image):
    """Bit-equal, too, when something at the sites changes nothing."""
    for training in (True, False):
        stock.train(training), peft.train(training)
        for one in (image, image[:1]):
            assert equal(run(stock, one), run(peft, one))


def check_gradients(peft, image):
    """Gradients of all that is trained, and none of it of zeros."""
    loss_of(peft, image).backward()
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name


def check_methods(stock, peft, image, first=0):
    """Gradients of what is declared, copies, taking off; what is attached
    changes all outputs from the ``first`` on."""
    expected = run(peft, image)
    assert not any(
        torch.equal(a, b) for a, b in zip(expected[first:],
                                          run(stock, image)[first:]))
    twin = copy.deepcopy(peft)
    assert equal(run(twin, image), expected)
    check_gradients(perturb(peft).eval(), image)
    assert equal(run(twin, image), expected)
    peft.train()
    eject(peft)
    check_as_stock(peft, stock, image)


def check_merged(stock, peft, image):
    """That stock weights give the same once what is attached is merged."""
    perturb(peft).eval(), stock.eval()
    stock.load_state_dict(merged_state_dict(peft), strict=True)
    assert near(run(peft, image), run(stock, image))


def check_joined(stock, peft, image, expected):
    """That a :class:`Sum` joins each output once, as composed by hand of what
    stock parts give, in copies as well; the stream itself goes on
    unchanged."""
    assert equal(run(peft, image), expected)
    twin = copy.deepcopy(peft)
    twin.peft.sum.weight.data.zero_()
    assert equal(run(peft, image), expected)
    assert equal(run(twin, image), run(stock, image))
    eject(peft)
    check_as_stock(peft, stock, image)


def check_skipped(peft, image, skipped, idle):
    """That nothing is trained behind the last output: not in the blocks
    ``skipped``, and nothing whose name begins with one of ``idle``."""
    assert peft.peft.skipped == skipped
    loss_of(peft, image).backward()
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not name.startswith(idle), name


def check_recognised(model, method='LoRA:rank=2'):
    """That the backbone of a model's config is found by its type; builds it
    with a method."""
    cfg = Config(dict(model=model))
    assert list(find_backbones(cfg)) == ['model.backbone']
    changed, at = add_method(cfg, method)
    assert at == 'model.backbone'
    backbone = MODELS.build(changed.model).backbone
    assert type(backbone).__name__ == model['backbone']['type'].split('.')[-1]
    return backbone


def rates_of(model, **cfg):
    """Learning rates by parameter (its ``id``), of 1 before all factors."""
    adam = dict(type='AdamW', lr=1., weight_decay=.05)
    wrapper = build_optim_wrapper(model, dict(optimizer=adam, **cfg))
    return {
        id(p): group['lr']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }


def check_layer_decay(model, **cfg):
    """That added parameters get the depth of their block, out of three."""
    rates = rates_of(model, **cfg)
    for i, layer in enumerate(model.backbone.layers):
        for parameter in layer.peft.parameters():
            assert rates[id(parameter)] == .5**(4 - i - 1)
    return rates
