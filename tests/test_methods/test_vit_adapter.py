import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import perturb

import mmpeft
from mmpeft.errors import MergeError, PEFTError
from mmpeft.injection import PEFTBackbone
from mmpeft.merging import merged_state_dict
from mmpeft.methods.deformable import (ConvFFN, DeformableAttention, Extractor,
                                       Injector)
from mmpeft.methods.vit_adapter import ViTAdapter
from . import reference as ref
from .checks import TOLERANCE, _check_digests, check_close, check_gradients
from .pyramid_checks import (PYRAMIDS, check_an_error_leaves_nothing,
                             check_moved_statistics, check_parts_of_a_forward,
                             check_refused)
from .recorded import digest, fill, load, tensor
from .swins import trained

pytest.importorskip('mmpretrain')

SMALL = dict(
    type='ViTAdapter',
    inplanes=4,
    num_heads=2,
    num_points=3,
    drop_path_rate=0.)
ARCH = dict(embed_dims=16, num_layers=5, num_heads=2, feedforward_channels=32)
DTYPES = (torch.float32, torch.float64)
# BatchNorm takes away what they add: their gradients are rounding.
IDLE = ('prior.projs.0.bias', 'up.bias')
# Of 44 x 60 pixels: none divides another.
FINE, SIZES, GRID = (11, 15), ((6, 8), (3, 4), (2, 2)), (6, 8)


def vit(method=SMALL, **kwargs):
    from mmpretrain.models.backbones import VisionTransformer
    kwargs = dict(
        dict(arch=ARCH, img_size=48, patch_size=8, out_type='featmap'),
        **kwargs)
    if method is None:
        return VisionTransformer(**kwargs)
    return PEFTBackbone(
        VisionTransformer,
        copy.deepcopy(method),
        allow_random_base=True,
        **kwargs)


# --------------------------------------------------------- in plain operations
def between(places, count):
    """(..., count), how much of each of some cells in a row is at a place,
    where 0 is the center of the first."""
    cells = torch.arange(count, dtype=places.dtype)
    return (1 - (places[..., None] - cells).abs()).clamp(min=0)


def resize(x, size):
    """(B, C, H, W) -> (B, C, *size), bilinear; edges go on outside."""
    rows, columns = (between(
        ((torch.arange(n, dtype=x.dtype) + .5) * m / n - .5).clamp(0,
                                                                   m - 1), m)
                     for n, m in zip(size, x.shape[2:]))
    return torch.einsum('ih,jw,bchw->bcij', rows, columns, x)


def norm(x, p, at):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean)**2).mean(-1, keepdim=True)
    scale, shift = p[at + 'weight'], p[at + 'bias']
    return (x - mean) / torch.sqrt(variance + 1e-6) * scale + shift


def batch_norm(x, p, at):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean)**2).mean((0, 2, 3), keepdim=True)
    scale, shift = (p[at + n][:, None, None] for n in ('weight', 'bias'))
    return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift


def linear(x, p, at):
    return ref.linear(x, p[at + 'weight'], p[at + 'bias'])


def cells(sizes):
    """Row and column of each token, as parts of the height and the width."""
    return torch.tensor([((i + .5) / h, (j + .5) / w) for h, w in sizes
                         for i in range(h) for j in range(w)],
                        dtype=torch.float64)


def deformable(q, v, p, at, q_sizes, v_sizes, heads=2):
    """Query by query, with the weight of every token of every map."""
    levels, (batch, count) = len(v_sizes), q.shape[:2]
    shape = (batch, count, heads, levels, -1)
    offsets = linear(q, p, at + 'offsets.').reshape(*shape[:-1], -1, 2)
    scores = torch.exp(linear(q, p, at + 'weights.')).reshape(shape)
    scores = scores / scores.sum((-2, -1), keepdim=True)
    places = cells(q_sizes)
    value, start, out = linear(v, p, at + 'value.'), 0, 0.
    for level, (h, w) in enumerate(v_sizes):
        part = value[:, start:start + h * w].reshape(batch, h, w, heads, -1)
        start += h * w
        x, y = offsets[:, :, :, level].unbind(-1)
        rows = between(places[:, 0, None, None] * h - .5 + y, h)
        columns = between(places[:, 1, None, None] * w - .5 + x, w)
        out = out + torch.einsum('bnkp,bnkpi,bnkpj,bijkd->bnkd',
                                 scores[:, :, :, level], rows, columns, part)
    return linear(out.flatten(2), p, at + 'proj.')


def read(q, v, p, at, *sizes):
    return deformable(
        norm(q, p, at + 'query_norm.'), norm(v, p, at + 'value_norm.'), p,
        at + 'attention.', *sizes)


def inject_formula(x, c, p, at='', sizes=SIZES):
    return x + p[at + 'gamma'] * read(x, c, p, at, [GRID], sizes)


def ffn_formula(c, p, at='', sizes=SIZES):
    t, parts, start = linear(c, p, at + 'fc1.'), [], 0
    for h, w in sizes:
        grid = t[:, start:start + h * w].transpose(1, 2).unflatten(2, (h, w))
        grid = ref.depthwise(grid, p[at + 'conv.weight'], p[at + 'conv.bias'])
        parts.append(grid.flatten(2).transpose(1, 2))
        start += h * w
    return linear(ref.gelu(torch.cat(parts, 1)), p, at + 'fc2.')


def extract_formula(c, x, p, at='', sizes=SIZES):
    c = c + read(c, x, p, at, sizes, [GRID])
    return c + ffn_formula(norm(c, p, at + 'ffn_norm.'), p, at + 'ffn.', sizes)


def prior_formula(image, p):
    """Maps of the four strides."""
    maps, x = [], image
    for stage in range(4):
        for i in range(3 if stage == 0 else 1):
            at = f'prior.stages.{stage}.{3 * i}.weight'
            x = F.conv2d(x, p[at], stride=1 if i else 2, padding=1)
            x = ref.relu(
                batch_norm(x, p, f'prior.stages.{stage}.{3 * i + 1}.'))
        if stage == 0:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        weight = p[f'prior.projs.{stage}.weight'][..., 0, 0]
        bias = p[f'prior.projs.{stage}.bias']
        maps.append(
            torch.einsum('oc,bchw->bohw', weight, x) + bias[:, None, None])
    return maps


def compose(stock, image, p, depths):
    """The four maps, of the stem and the blocks of a stock ViT."""
    entered = []
    hook = stock.layers[0].register_forward_pre_hook(
        lambda _, args: entered.append(args[0]))
    stock(image)
    hook.remove()
    x, seen, blocks = entered[0], [], iter(stock.layers)
    fine, *maps = prior_formula(image, p)
    sizes = [tuple(m.shape[2:]) for m in maps]
    assert tuple(fine.shape[2:]) == FINE and tuple(sizes) == SIZES
    c = torch.cat([
        m.flatten(2).transpose(1, 2) + p['level_embed'][i]
        for i, m in enumerate(maps)
    ], 1)
    for group, depth in enumerate(depths):
        grid = inject_formula(x[:, 1:], c, p, f'injectors.{group}.')
        x = torch.cat([x[:, :1], grid], 1)
        for _ in range(depth):
            x = next(blocks)(x)
        for i in [group] if group < 3 else [3, 4, 5]:
            c = extract_formula(c, x[:, 1:], p, f'extractors.{i}.')
        seen.append(x[:, 1:].transpose(1, 2).unflatten(2, GRID))
    maps, start = [], 0
    for h, w in sizes:
        tokens = c[:, start:start + h * w]
        maps.append(tokens.transpose(1, 2).unflatten(2, (h, w)))
        start += h * w
    twice = torch.einsum('bchw,coij->bohiwj', maps[0], p['up.weight'])
    twice = twice.flatten(4).flatten(2, 3) + p['up.bias'][:, None, None]
    maps = [fine + twice[..., :FINE[0], :FINE[1]], *maps]
    return [
        batch_norm(m + resize(x, m.shape[2:]), p, f'norms.{i}.')
        for i, (m, x) in enumerate(zip(maps, seen))
    ]


# -------------------------------------------------------------------- formulas
def attention(levels):
    return DeformableAttention(16, 8, 2, 3, levels)


def check(module, formula, dtype, *names):
    """Output and all gradients, those of its inputs included."""
    fill(module.to(dtype))
    leaves = ref.parameters(module)
    counts = dict(x=GRID[0] * GRID[1], c=sum(h * w for h, w in SIZES))
    ours = [tensor(n, 2, counts[n], 16, dtype=dtype) for n in names]
    plain = [t.double().requires_grad_() for t in ours]
    out = module(*[t.requires_grad_() for t in ours])
    expected = formula(*plain, leaves)
    check_close(out, expected, TOLERANCE[dtype], 'output')
    weight = tensor('weight', *out.shape, dtype=dtype)
    (out * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    check_gradients(module, leaves, dtype, type(module).__name__)
    for mine, theirs in zip(ours, plain):
        check_close(mine.grad, theirs.grad, TOLERANCE[dtype], 'of an input')


class Bound(nn.Module):
    """A module with what it gets besides tensors."""

    def __init__(self, module, *args):
        super().__init__()
        self.module, self.args = module, args

    def forward(self, *tensors):
        return self.module(*tensors, *self.args)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('with_cp', [True, False])
def test_injector(dtype, with_cp):
    module = Bound(Injector(attention(3), 16, with_cp), GRID, SIZES)
    check(module, lambda x, c, p: inject_formula(x, c, p, 'module.'), dtype,
          'x', 'c')


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('with_cp', [True, False])
def test_extractor(dtype, with_cp):
    module = Bound(Extractor(attention(1), 16, 4, 0., with_cp), SIZES, GRID)
    check(module, lambda c, x, p: extract_formula(c, x, p, 'module.'), dtype,
          'c', 'x')


@pytest.mark.parametrize('dtype', DTYPES)
def test_conv_ffn(dtype):
    module = Bound(ConvFFN(16, 4), SIZES)
    check(module, lambda c, p: ffn_formula(c, p, 'module.'), dtype, 'c')


@pytest.mark.parametrize('with_cp', [True, False])
@pytest.mark.parametrize('depths,expected', [(None, (2, 1, 1, 1)),
                                             ((1, 1, 1, 2), (1, 1, 1, 2))])
def test_network(depths, expected, with_cp):
    """All maps and all gradients, with BatchNorm in training."""
    backbone = vit(dict(SMALL, depths=depths, with_cp=with_cp))
    stock = vit(None)
    for model in (backbone, stock):
        fill(model.double())
        model.train()
    image = tensor('image', 2, 3, 44, 60)
    network = backbone.peft.vit_adapter
    leaves = ref.parameters(network)
    loss = expected_loss = 0.
    for i, (mine, theirs) in enumerate(
            zip(backbone(image), compose(stock, image, leaves, expected))):
        check_close(mine, theirs, 1e-11, f'output {i}')
        weight = tensor(f'weight {i}', *mine.shape)
        loss = loss + (mine * weight).sum()
        expected_loss = expected_loss + (theirs * weight).sum()
    loss.backward(), expected_loss.backward()
    for name, parameter in network.named_parameters():
        if name in IDLE:
            assert parameter.grad.abs().max() < 1e-9
        else:
            check_close(parameter.grad, leaves[name].grad, 1e-10, name)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('with_cp', [True, False])
def test_released(dtype, with_cp):
    """All maps and the gradients of all that trains, in training."""
    recorded = load('released_vit_adapter')
    outs, grads = (1e-5, 1e-4) if dtype is torch.float32 else (2e-7, 2e-7)
    backbone = vit(
        dict(SMALL, depths=(2, 1, 1, 1), with_cp=with_cp),
        img_size=(64, 96),
        patch_size=16,
        with_cls_token=False)
    fill(backbone.to(dtype))
    backbone.train()
    loss, found = 0., backbone(tensor('image', 2, 3, 64, 96, dtype=dtype))
    for i, out in enumerate(found):
        loss += (out * tensor(f'weight {i}', *out.shape, dtype=dtype)).sum()
        mine = digest(f'out{i}', out.detach().numpy())
        check_close(mine, recorded[f'out{i}_digest'], outs, f'output {i}')
        if i > 1:
            check_close(out[0], recorded[f'out{i}'], outs, f'output {i}')
    loss.backward()
    own = {n: p.grad for n, p in trained(backbone).items()}
    names = str(recorded['names']).split('\n')
    assert sorted(own) == names
    largest = max(float(g.abs().max()) for g in own.values())
    for name in IDLE:
        assert own.pop('peft.vit_adapter.' +
                       name).abs().max() < grads * largest
    kept = [i for i, n in enumerate(names) if n in own]
    recorded.update(
        names='\n'.join(sorted(own)), grads=recorded['grads'][kept])
    _check_digests(recorded, own, grads)


# ------------------------------------------------------------------ the start
def test_the_stream_starts_frozen():
    """Every block gets, bit for bit, what it gets in the stock ViT."""
    torch.manual_seed(0)
    backbone, stock = vit(), vit(None)
    backbone.init_weights()
    stock.load_state_dict(
        {k: backbone.state_dict()[k]
         for k in stock.state_dict()})
    streams = []
    for model in (backbone, stock):
        model.eval()
        streams.append([])
        for layer in model.layers:
            layer.register_forward_hook(
                lambda _, args, y, seen=streams[-1]: seen.append(y))
        with torch.no_grad():
            model(torch.randn(1, 3, 48, 48, generator=torch.manual_seed(1)))
    assert len(streams[0]) == 5
    assert all(map(torch.equal, *streams))


def test_start():
    torch.manual_seed(0)
    arch = dict(ARCH, embed_dims=128)
    backbone = vit(dict(type='ViTAdapter', num_heads=8), arch=arch)
    backbone.init_weights()
    network = backbone.peft.vit_adapter
    for module in network.injectors:
        assert not module.gamma.any()
        assert module.gamma.shape == (128, )
    for module in network.modules():
        if isinstance(module, DeformableAttention):
            for linear in (module.offsets, module.weights):
                assert not linear.weight.any()
            assert not module.weights.bias.any()
            # uniform in (-b, b), b**2 = 6 / (in + out)
            for linear in (module.value, module.proj):
                bound = (6 / (128 + 64))**.5
                assert .95 * bound < linear.weight.abs().max() <= bound
                assert not linear.bias.any()
    bias = network.injectors[0].attention.offsets.bias.reshape(8, 3, 4, 2)
    first = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1),
             (1, -1)]
    for point in range(4):
        expected = torch.tensor(first, dtype=bias.dtype) * (point + 1)
        for level in range(3):
            torch.testing.assert_close(bias[:, level, point].detach(),
                                       expected)
    ffn = network.extractors[5].ffn
    assert ffn.fc1.out_features == 32
    assert ffn.fc1.weight.std().item() == pytest.approx(.02, rel=.1)
    # sqrt(2 / fan_out), with a fan of 9 for one channel each
    assert ffn.conv.weight.std().item() == pytest.approx((2 / 9)**.5, rel=.2)
    assert network.up.weight.std().item() == pytest.approx(
        (2 / (4 * 128))**.5, rel=.05)
    assert network.level_embed.std().item() == pytest.approx(1, rel=.2)


def test_steps_reach_everything():
    """At first nothing of an injector but its gain gets a gradient, and the
    norms of the queries only when offsets and weights depend on them."""
    backbone = vit().train()
    own = trained(backbone)
    assert all(n.startswith('peft.vit_adapter.') for n in own)
    frozen = {
        n: p.clone()
        for n, p in backbone.named_parameters() if n not in own
    }
    optimizer = torch.optim.SGD(own.values(), lr=.1)
    for step in range(3):
        optimizer.zero_grad()
        image = torch.randn(2, 3, 44, 60, generator=torch.manual_seed(step))
        sum((o**3).mean() for o in backbone(image)).backward()
        if step == 0:
            for name, parameter in own.items():
                assert parameter.grad is not None, name
                if '.injectors.' in name:
                    assert parameter.grad.any() == ('gamma' in name), name
        optimizer.step()
    assert not [n for n, p in own.items() if not p.grad.any()]
    assert all(
        torch.equal(backbone.get_parameter(n), p) for n, p in frozen.items())


# ------------------------------------------------------------------- behaviour
def test_maps():
    """Strides of 4 pixels and on, on images that 32 does not divide."""
    backbone = vit().eval()
    assert mmpeft.out_channels(backbone) == (16, ) * 4
    for size, expected in (((64, 32), [(16, 8), (8, 4), (4, 2), (2, 1)]),
                           ((44, 60), [FINE, *SIZES]), ((33, 50), [(9, 13),
                                                                   (5, 7),
                                                                   (3, 4),
                                                                   (2, 2)])):
        maps = backbone(torch.randn(2, 3, *size))
        assert [tuple(m.shape[2:]) for m in maps] == expected
        assert [m.shape[1] for m in maps] == [16] * 4


def test_out_indices_do_not_matter():
    image, found = torch.randn(1, 3, 48, 48), []
    for kwargs in (dict(), dict(out_indices=[1, 4]),
                   dict(out_type='cls_token')):
        backbone = vit(**kwargs).eval()
        fill(backbone)
        found.append(backbone(image))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    # But those behind the last one are not run beside.
    network = vit(out_indices=[3]).peft.vit_adapter
    assert list(network.lasts) == [0, 1, 2, 3]


def test_extra_tokens_stand_aside():
    """They are left alone, and nothing of the pyramid reads them."""
    backbone = vit().eval()
    fill(backbone)
    network, seen = backbone.peft.vit_adapter, []
    place, layout = network.trunk.blocks[0], None
    backbone.layers[0].peft.grid.hw_shape = GRID
    x = torch.randn(2, 49, 16)
    layout = backbone.layers[0].peft.grid.layout(x)
    assert layout.num_extra_tokens == 1
    u = network.start(x, layout, torch.randn(2, 3, 44, 60))
    entered = network.enter(u, place, x, layout)
    assert torch.equal(entered[:, :1], x[:, :1])
    assert (entered[:, 1:] - x[:, 1:]).abs().min() > 0
    for shift in (0., 1.):
        other = torch.cat([x[:, :1] + shift, x[:, 1:]], 1)
        last = network.trunk.blocks[1]
        seen.append(network.step(u, last, other, other, {}, layout).c)
    assert not torch.equal(seen[0], u.c)
    assert torch.equal(*seen)


def test_drop_path():
    """A sample skips the convolution, and the others make up for it."""
    module = Extractor(attention(1), 16, 4, .5, True)
    fill(module.double())
    c, x = tensor('c', 8, 64, 16), tensor('x', 8, 48, 16)
    torch.manual_seed(0)
    whole = module.eval()(c, x, SIZES, GRID)
    found = module.train()(c, x, SIZES, GRID)
    bare = c + module.read(c, x, SIZES, [GRID])
    gain = ((found - bare) / (whole - bare)).flatten(1)
    kept = gain[:, 0].round()
    assert set(kept.tolist()) == {0., 2.}
    torch.testing.assert_close(gain, kept[:, None].expand_as(gain))


def test_moved_statistics_are_in_the_delta(tmp_path):
    check_moved_statistics(vit, str(tmp_path / 'delta.safetensors'))


def test_a_copy_runs_its_own():
    backbone = perturb(vit()).eval()
    image = torch.randn(1, 3, 48, 48)
    expected, twin = backbone(image), copy.deepcopy(backbone)
    perturb(backbone)
    assert all(map(torch.equal, twin(image), expected))


def test_an_error_leaves_nothing():
    backbone = vit()
    check_an_error_leaves_nothing(backbone)
    with pytest.raises(PEFTError, match="state of 'vit_adapter' .* layers.2"):
        backbone.layers[2](torch.randn(1, 37, 16))


def test_with_other_methods():
    methods = ['LoRA:rank=2', 'Mona:dim=4', 'DTL', 'VPTDeep:num_tokens=2',
               'SSF', SMALL]  # yapf: disable
    backbone = perturb(vit(methods)).train()
    sum(o.square().mean()
        for o in backbone(torch.randn(2, 3, 48, 48))).backward()
    for name, parameter in trained(backbone).items():
        assert parameter.grad is not None, name


def test_parts_of_a_forward():
    check_parts_of_a_forward(SMALL, [56, 28, 14, 7], lambda shape: shape[-1])


# -------------------------------------------------------------------- refusals
@pytest.mark.parametrize('other', [
    'E3VA:rank=2', 'LST:reduction=4', 'HST:dims=[4],num_heads=[1]',
    dict(SMALL, name='second')
])
def test_not_with(other):
    with pytest.raises(PEFTError, match='replaces the outputs'):
        vit([other, SMALL])


@pytest.mark.parametrize('kind', PYRAMIDS)
def test_refused_beside_a_pyramid(kind):
    check_refused(kind, SMALL)


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='ViTAdapter .*beside the backbone'):
        merged_state_dict(vit())


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_heads=3), '3 heads do not divide the width 8 .*=0.5 of 16'),
    (dict(num_heads=16), '16 heads do not divide the width 8'),
    (dict(num_heads=0), 'num_heads must be a whole number'),
    (dict(num_points=0), 'num_points must be a whole number'),
    (dict(inplanes=1.5), 'inplanes must be a whole number'),
    (dict(deform_ratio=0), 'deform_ratio must be a number above 0'),
    (dict(deform_ratio=.01), '=0.01 of the width 16 is less than 1; use 0.06'),
    (dict(ffn_ratio=.05), 'ffn_ratio=0.05 of the width 16'),
    (dict(drop_path_rate=1.), 'drop_path_rate must be a number in'),
    (dict(depths=(2, 3)), r'depths=\(2, 3\) must be 4 numbers .* is 5'),
    (dict(depths=(0, 1, 2, 2)), 'numbers above 0 whose sum is 5'),
    (dict(layers=[2, 3, 4]), '4 levels need as many blocks .* beside 3'),
    (dict(layers=[0, 1, 2, 3]), 'ends with layers.4; `layers` leaves it out'),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        vit(dict(SMALL, **kwargs))


def test_count():
    """As stated in the docstring, by part."""
    network = vit(dict(type='ViTAdapter', num_heads=2)).peft.vit_adapter
    assert isinstance(network, ViTAdapter)
    counts = {
        n: sum(p.numel() for p in m.parameters())
        for n, m in network.named_children()
    }
    d, inner, hidden, n = 16, 8, 4, 64

    def attention_count(levels):
        return 2 * (d + 1) * inner + d - inner + 3 * (d + 1) * 2 * 4 * levels

    assert counts == dict(
        prior=27 * n + 9 * n * n * (2 + 2 + 8 + 16) + 2 * n * (3 + 2 + 4 + 4) +
        11 * n * d + 4 * d,
        injectors=4 * (attention_count(3) + 4 * d + d),
        extractors=6 * (attention_count(1) + 6 * d + 2 * d * hidden + d +
                        hidden + 10 * hidden),
        up=4 * d * d + d,
        norms=4 * 2 * d)
