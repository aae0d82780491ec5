import copy
import weakref

import pytest
import torch
import torch.nn.functional as F

from mmpeft.errors import MergeError, PEFTError, SiteError
from mmpeft.injection import PEFTBackbone
from mmpeft.merging import merged_state_dict
from mmpeft.methods import DTL, DTLPlus
from . import reference as ref
from . import side_checks as checks
from .checks import TOLERANCE, _check_digests, check_close, check_gradients
from .recorded import digest, fill, load, tensor
from .swins import LIBRARIES, swin, trained

# Steep enough to bend, and not a step.
SMALL = dict(type='DTL', rank=3, beta=2.)
PLUS = dict(SMALL, type='DTLPlus', kernel_size=3)
BOTH = pytest.mark.parametrize('method', [SMALL, PLUS])
DTYPES = (torch.float32, torch.float64)


def network_of(backbone):
    network, = backbone.peft.children()
    return network


def depthwise(x, kernel):
    """(B, C, H, W), one kernel for each channel, zeros outside."""
    side = kernel.shape[-1]
    before = (side - 1) // 2
    after = side - 1 - before
    padded = F.pad(x, (before, after, before, after))
    height, width = x.shape[2:]
    return sum(padded[:, :, i:i + height, j:j + width] *
               kernel[:, 0, i, j, None, None] for i in range(side)
               for j in range(side))


def compose(stock, image, p, start, beta=2.):
    """What goes into each output norm, of the blocks of a stock Swin."""
    x, hw = stock.patch_embed(image)
    outs, number = [], 0
    for i, stage in enumerate(stock.stages):
        u = 0.
        for block in stage.blocks:
            at = f'blocks.{number}.'
            if at + 'up' in p:
                u = u + (x @ p[at + 'down'].T) @ p[at + 'up'].T
            x = block(x, hw)
            if number >= start:
                t = u / (1 + torch.exp(-beta * u))
                if f'convs.{i}' in p:
                    grid = t.transpose(1, 2).unflatten(2, hw)
                    grid = depthwise(grid, p[f'convs.{i}'])
                    t = grid.flatten(2).transpose(1, 2)
                x = x + t
            number += 1
        outs.append(x)
        if stage.downsample is not None:
            x, hw = stage.downsample(x, hw)
    return outs


@pytest.mark.parametrize('library,method,dtype', [
    ('mmdet', dict(SMALL, start=0), torch.float32),
    ('mmdet', dict(SMALL, start=1), torch.float64),
    ('mmdet', dict(SMALL, with_cp=False), torch.float64),
    ('mmdet', dict(PLUS, start=1), torch.float32),
    ('mmdet', dict(PLUS, start=0, kernel_size=5), torch.float64),
    ('mmdet', dict(PLUS, start=3, kernel_size=4), torch.float64),
    ('mmseg', PLUS, torch.float64),
    ('mmpretrain', dict(PLUS, start=1), torch.float64),
])
def test_formula(library, method, dtype):
    """Outputs and gradients, on maps that the window does not divide."""
    backbone, stock = swin(library, method), swin(library)
    for model in (backbone, stock):
        fill(model)
        model.to(dtype).train()
    image = tensor('image', *checks.IMAGE, dtype=dtype)
    network = network_of(backbone)
    leaves = ref.parameters(network)
    found = backbone(image)
    stock.double()
    expected = compose(stock, image.double(), leaves, method.get('start', 3))
    total = expected_total = 0.
    for i, (mine, tokens) in enumerate(zip(found, expected)):
        theirs = getattr(stock, f'norm{i}')(tokens)
        theirs = theirs.transpose(1, 2).reshape(mine.shape)
        check_close(mine, theirs, TOLERANCE[dtype], f'output {i}')
        weight = tensor(f'weight {i}', *mine.shape, dtype=dtype)
        total = total + (mine * weight).sum()
        expected_total = expected_total + (theirs * weight.double()).sum()
    total.backward()
    expected_total.backward()
    check_gradients(network, leaves, dtype, method['type'])


def check_released(case, backbone, image, dtype, seen):
    """Against numbers of the released code; ``seen`` compares the output."""
    recorded = load(case)
    outs, grads = (1e-5, 1e-4) if dtype is torch.float32 else (2e-7, 2e-7)
    fill(backbone.to(dtype))
    backbone.train()
    seen(backbone(image.to(dtype)), recorded, outs).backward()
    found = {
        n: p.grad
        for n, p in trained(backbone).items() if p.grad is not None
    }
    assert set(found) == set(trained(backbone))
    _check_digests(recorded, found, grads)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('method', [
    dict(type='DTL', rank=3, start=1, beta=2.),
    dict(type='DTLPlus', rank=3, start=1, beta=2., kernel_size=5),
])
@pytest.mark.parametrize('dtype', DTYPES)
def test_released_swin(library, method, dtype):
    """It writes in two stages; the released one norms the last output."""

    def seen(found, recorded, tolerance):
        out = found[1]
        mine = digest('out1', out.detach().numpy())
        check_close(mine, recorded['out1_digest'], tolerance, 'output')
        check_close(out[0], recorded['out1'], tolerance, 'output')
        return (out * tensor('weight 1', *out.shape, dtype=dtype)).sum()

    backbone = swin(library, method, embed_dims=8, depths=(2, 3))
    name = network_of(backbone).key
    check_released(f'released_{name}_swin', backbone,
                   tensor('image', 2, 3, 64, 64), dtype, seen)


@pytest.mark.parametrize('method', [
    dict(type='DTL', rank=3, beta=2.),
    dict(type='DTLPlus', rank=3, beta=2., kernel_size=3),
])
@pytest.mark.parametrize('dtype', DTYPES)
def test_released_vit(method, dtype):
    """The released one returns the mean over the patches."""
    pytest.importorskip('mmpretrain')
    from mmpretrain.models.backbones import VisionTransformer

    def seen(found, recorded, tolerance):
        out = found[0].mean((2, 3))
        check_close(out, recorded['out'], tolerance, 'output')
        return (out * tensor('weight', *out.shape, dtype=dtype)).sum()

    backbone = PEFTBackbone(
        VisionTransformer,
        method,
        allow_random_base=True,
        arch=dict(
            embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=64),
        img_size=28,
        patch_size=2,
        out_type='featmap',
        final_norm=False)
    name = network_of(backbone).key
    check_released(f'released_{name}_vit', backbone,
                   tensor('image', 2, 3, 28, 28), dtype, seen)


@BOTH
@pytest.mark.parametrize('library', LIBRARIES)
def test_starts_at_the_frozen_model(library, method):
    checks.check_starts_frozen(library, dict(method, start=0, beta=100.))


@BOTH
@pytest.mark.parametrize('with_cp', [False, True])
def test_blocks_before_the_first_write_keep_nothing(method, with_cp):
    """No graph comes out of them, no layer in them saves a tensor, and what
    is saved there is one tensor for each matrix; gradients do cross the later
    ones."""
    backbone = swin(
        'mmdet',
        dict(method, start=3),
        depths=(2, 4),
        with_cp=with_cp,
        drop_path_rate=.2).train()
    fill(backbone)
    blocks = [b for s in backbone.stages for b in s.blocks]
    graphs, saved, inside = [], [], []
    for number, block in enumerate(blocks):

        def leave(module, args, y):
            graphs.append((args[0].requires_grad, y.requires_grad))
            inside.pop()

        block.register_forward_pre_hook(
            lambda module, args, number=number: inside.append(number))
        block.register_forward_hook(leave)

    class Kept(list):
        """A tensor, for as long as backward could ask for it."""

    def keep(t):
        kept = Kept([t])
        saved.append((inside[-1] if inside else None, weakref.ref(kept)))
        return kept

    image = tensor('image', *checks.IMAGE, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept[0]):
        outs = backbone(image)
    saved = [(at, ref()[0].shape[-1]) for at, ref in saved if ref()]
    assert graphs == [(False, False)] * 3 + [(False, True)
                                             ] + [(True, True)] * 2
    # Of stage 0 nothing at all, of block 2 the tokens that its A reads.
    assert [width for at, width in saved if at in (0, 1)] == []
    assert [width for at, width in saved if at == 2] == [32]
    # The later ones do, unless they are checkpointed.
    assert len([at for at, _ in saved if at == 4]) > (2 if with_cp else 8)
    assert not outs[0].requires_grad and outs[1].requires_grad
    grads = []
    blocks[4].register_full_backward_hook(
        lambda m, grad_in, grad_out: grads.append(grad_in[0]))
    backbone(image)[1].square().sum().backward()
    assert grads[0].abs().sum() > 0
    # And they matter: the matrices of block 2 act through blocks 4 and 5.
    assert network_of(backbone).blocks['2'].down.grad.abs().sum() > 0


def test_keeps_less_than_all_blocks_would():
    """Swin with stages of 2, 2, 6, 2 blocks, as share of full fine-tuning."""
    shares = [
        checks.share_of_full(dict(type=name, rank=4, start=start), 'stock')
        for name in ('DTL', 'DTLPlus') for start in (0, 7)
    ]
    assert shares[1] < .2 and .4 < shares[0] < .6, shares
    # The convolution is computed again.
    assert shares[2] == pytest.approx(shares[0], rel=1e-3)
    assert shares[3] == pytest.approx(shares[1], rel=1e-3)


@BOTH
def test_recomputing(method):
    checks.check_recomputing(dict(method, start=1))


@BOTH
@pytest.mark.parametrize('start', [0, 1, 3])
def test_all_tensors_move(method, start):
    """Whatever block it writes behind first."""
    checks.check_all_tensors_move(dict(method, start=start))


@BOTH
def test_deepcopy(method):
    checks.check_deepcopy(dict(method, start=0))


@BOTH
def test_stages_that_end_before_it_writes_have_nothing(method):
    backbone, stock = swin('mmdet', method).eval(), swin('mmdet')
    stock.eval()
    expected = 2 * 2 * 3 * 32 + (9 * 32 if method is PLUS else 0)
    assert sum(p.numel() for p in trained(backbone).values()) == expected
    assert set(network_of(backbone).blocks) == {'2', '3'}
    fill(backbone), fill(stock)
    image = tensor('image', *checks.IMAGE, dtype=torch.float32)
    found, plain = backbone(image), stock(image)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])


@pytest.mark.parametrize('layers,taps,first', [
    ([1, 2, 3], ['2', '3'], 3),
    ([0, 1], ['0', '1'], 1),
    ('stage:0', ['0', '1'], 1),
    (-1, ['3'], 3),
])
def test_layers(layers, taps, first):
    backbone = swin('mmdet', dict(SMALL, layers=layers))
    network = network_of(backbone)
    assert (list(network.blocks), network.first) == (taps, first)
    grads = checks.gradients(backbone)
    assert all(g is not None for g in grads.values())


def test_stages_that_are_no_output():
    """What it writes reaches later outputs."""
    backbone = swin('mmdet', dict(SMALL, layers='stage:0'))
    backbone.out_indices = (1, )
    for loss in (o.sum() for o in backbone(torch.randn(1, 3, 28, 20))):
        loss.backward()
    assert all(p.grad is not None for p in trained(backbone).values())


def test_beside_other_networks():
    """They see what goes on, in whatever order they are listed."""
    other = dict(type='LAST', rank=4)
    image = tensor('image', *checks.IMAGE, dtype=torch.float32)
    found = []
    for methods in ([SMALL, other], [other, SMALL], [other], [SMALL]):
        backbone = swin('mmdet', copy.deepcopy(methods)).eval()
        fill(backbone)
        found.append(backbone(image)[1])
    assert torch.equal(found[0], found[1])
    for alone in found[2:]:
        assert not torch.allclose(found[0], alone, rtol=1e-3)
    # Where nothing is written the other is what it is alone, bit for bit.
    backbone = swin('mmdet', [SMALL, other]).eval()
    fill(backbone)
    for block in backbone.peft.dtl.blocks.values():
        torch.nn.init.zeros_(block.up)
    assert torch.equal(backbone(image)[1], found[2])


def test_with_modules_and_tokens():
    """What they change is what it reads; gradients reach them through it."""
    methods = ['LoRA:rank=2', 'VPTDeep:num_tokens=2', dict(SMALL, start=1)]
    checks.gradients(swin('mmdet', methods))


def test_timm_checkpoints_around_a_block():
    pytest.importorskip('timm')
    import timm
    model = timm.create_model(
        'vit_tiny_patch16_224', embed_dim=16, depth=4, num_heads=2)
    model = PEFTBackbone(lambda: model, SMALL, allow_random_base=True)
    model.set_grad_checkpointing()
    out = model.train()(torch.randn(1, 3, 224, 224))
    with pytest.raises(PEFTError, match="state of 'dtl' .* blocks.3"):
        out.sum().backward()


def test_needs_the_grid():
    pytest.importorskip('timm')
    import timm
    images = torch.randn(1, 3, 32, 32)
    for method, fails in ((SMALL, False), (PLUS, True)):
        model = timm.create_model(
            'vit_tiny_patch16_224',
            img_size=32,
            patch_size=8,
            embed_dim=16,
            depth=4,
            num_heads=2,
            patch_drop_rate=.5)
        model = PEFTBackbone(lambda: model, method, allow_random_base=True)
        model.eval()(images)
        model.train()
        if fails:
            with pytest.raises(SiteError, match='DTLPlus needs the whole'):
                model(images)
        else:
            model(images)


@BOTH
def test_merge_is_refused_with_a_reason(method):
    with pytest.raises(MergeError, match='DTL.* beside the backbone'):
        merged_state_dict(swin('mmdet', method))


@pytest.mark.parametrize('method,message', [
    (dict(SMALL, rank=17), 'DTL: rank=17 is larger than the width 16'),
    (dict(SMALL, start=4), 'DTL: start=4 is none of the blocks .* 0 to 3'),
    (dict(SMALL, start=0, layers=[1, 2]), 'start=0 is none .* 1 to 2'),
    (dict(SMALL, beta=0), 'beta must be a number above 0'),
    (dict(PLUS, rank=0), 'DTLPlus: rank must be a whole number'),
    (dict(PLUS, kernel_size=0), 'kernel_size must be a whole number'),
    (dict(SMALL, kernel_size=3), "no argument 'kernel_size'"),
])
def test_arguments(method, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', method)


def test_networks_are_what_they_say():
    for cls in (DTL, DTLPlus):
        assert cls.writes and not cls.joins_outputs
    assert DTLPlus.theta is not DTL.theta
