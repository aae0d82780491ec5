import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import mmpeft
from mmpeft.contrast import supervised_contrast
from mmpeft.errors import PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import GPS
from mmpeft.methods.gps import Biases
from .checks import TOLERANCE, check_close
from .recorded import load, tensor, value
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)


def loss_of(backbone, image):
    # Not the square, whose mean is 1 behind a norm.
    return sum((out**3).mean() for out in backbone(image))


def build(layer, num_inputs, index=None):
    """Beside a layer, with values by the rule."""
    out_dims, in_dims = layer.weight.flatten(1).shape
    name = 'fc1' if layer.weight.ndim == 2 else 'patch_embed'
    place = type(site('fc1', 4))(name, in_dims, out_dims)
    module = GPS(place, num_inputs)
    module.bind_layer(layer)
    if index is None:
        index = tensor('order', out_dims, in_dims).argsort(1)[:, :num_inputs]
    module.settle_on(index)
    module.values.data.copy_(
        torch.from_numpy(value('values', module.values.shape)))
    return module.to(layer.weight)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape,in_dims,out_dims,num_inputs', [
    ((2, 5), 12, 10, 1),
    ((3, ), 6, 16, 4),
    ((1, 2, 3), 8, 3, 8),
])
def test_equals_a_weight_that_trains_where_it_was_chosen(
        shape, in_dims, out_dims, num_inputs, dtype):
    """Output and all gradients, as with the masked gradient of a weight."""
    layer = nn.Linear(in_dims, out_dims).to(dtype)
    module = build(layer, num_inputs)
    dense = torch.zeros(out_dims, in_dims, dtype=torch.double)
    dense.scatter_(1, module.index.long(), module.values.detach().double())
    weight = (layer.weight.double() + dense).detach().requires_grad_()
    x = tensor('x', *shape, in_dims).to(dtype).requires_grad_()
    plain = x.detach().double().requires_grad_()
    out = module(x, layer(x), NO_LAYOUT)
    expected = F.linear(plain, weight, layer.bias.double())
    check_close(out, expected, TOLERANCE[dtype], 'output')
    factor = tensor('weight', *out.shape, dtype=dtype)
    (out * factor).sum().backward()
    (expected * factor.double()).sum().backward()
    check_close(x.grad, plain.grad, TOLERANCE[dtype], 'gradient of x')
    check_close(module.values.grad, weight.grad.gather(1, module.index.long()),
                TOLERANCE[dtype], 'gradient of values')


def test_gradcheck():
    layer = nn.Linear(5, 4).double()
    module = build(layer, 2, torch.tensor([[0, 3], [3, 4], [0, 1], [0, 3]]))
    x = tensor('x', 3, 5).requires_grad_()
    y = tensor('y', 3, 4).requires_grad_()

    def run(x, y, values):
        module.values.data.copy_(values)
        from mmpeft.methods.gps import SparseProduct
        return SparseProduct.apply(x, y, values, module.index)

    torch.autograd.gradcheck(
        run, (x, y, module.values.detach().clone().requires_grad_()))


@pytest.mark.parametrize('padding', [0, 2])
def test_a_stem(padding):
    layer = nn.Conv2d(3, 8, 4, stride=4, padding=padding).double()
    module = build(layer, 3)
    x = tensor('x', 2, 9, 12, 3).requires_grad_()
    y = layer(x.movedim(-1, 1)).movedim(1, -1)
    out = module(x, y, NO_LAYOUT)
    weight, _ = module.merge(layer.weight.flatten(1), None)
    expected = F.conv2d(
        x.movedim(-1, 1), weight.view_as(layer.weight), layer.bias, 4,
        padding).movedim(1, -1)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert module.values.grad.abs().sum() > 0


class Net(nn.Module):
    """Layers by the names that the released code reads."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 8, 4)
        self.norm = nn.LayerNorm(8)
        self.qkv, self.fc2 = nn.Linear(8, 24), nn.Linear(32, 8)


@pytest.mark.parametrize('num_inputs', [1, 3])
def test_released_choice(num_inputs):
    recorded, net = load('released_gps'), Net().double()
    for name, parameter in net.named_parameters():
        parameter.grad = tensor(f'grad {name}', *parameter.shape)
    for name in ('patch_embed.proj', 'qkv', 'fc2'):
        module = build(net.get_submodule(name), num_inputs)
        index = module.chosen(module.total(1))
        assert (index.diff(dim=1) > 0).all()
        shape = module.stock_layer.weight.flatten(1).shape
        mine = torch.zeros(shape).scatter(1, index, 1).numpy().astype(bool)
        packed = recorded[f'{name}.weight {num_inputs}']
        assert (np.packbits(mine, axis=1) == packed).all()
    # What trains whole, besides the head, and what does not at all.
    biases = {
        f'{path}.{leaf}'
        for path, module in net.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
        if Biases().selects(module, leaf)
    }
    whole = str(recorded[f'train {num_inputs}']).split('\n')
    assert biases == {n for n in whole if not n.startswith('head')}
    frozen = set(str(recorded[f'frozen {num_inputs}']).split('\n'))
    assert frozen == {'norm.weight', 'norm.bias'} and not frozen & biases


def test_released_contrast():
    recorded = load('released_gps')
    views = [tensor(f'view {i}', 6, 10).requires_grad_() for i in (1, 2)]
    labels = torch.tensor([0, 1, 0, 2, 2, 0])
    loss = supervised_contrast(torch.cat(views), labels.repeat(2))
    assert abs(loss.item() - float(recorded['contrast'])) < 1e-6
    loss.backward()
    for i, view in enumerate(views, 1):
        check_close(view.grad, recorded[f'grad view {i}'], 1e-6, f'view {i}')


def test_ties_and_dead_neurons():
    """Exactly so many, the first ones."""
    module = build(nn.Linear(5, 2), 2)
    total = torch.tensor([[1., -3., 3., 0., 3.], [0.] * 5])
    assert module.chosen(total).tolist() == [[1, 2], [0, 1]]
    with pytest.raises(PEFTError, match='not finite'):
        module.chosen(total / 0)


@pytest.mark.parametrize('library', LIBRARIES)
def test_chooses_by_the_gradient_of_stock(library):
    """Summed over batches, of the model without drop-path."""
    method = dict(type='GPS', num_inputs=2)
    peft = swin(library, method, drop_path_rate=.5)
    stock = swin(library, drop_path_rate=.5)
    stock.load_state_dict(peft.state_dict(), strict=False)
    images = [torch.randn(1, 3, 36, 28) for _ in range(3)]
    mmpeft.calibrate(peft, images, loss_of)
    stock.eval()
    for image in images:
        loss_of(stock, image).backward()
    grads = {n: p.grad for n, p in stock.named_parameters()}
    names = {id(p): n for n, p in peft.named_parameters()}
    modules = [m for m in peft.modules() if isinstance(m, GPS)]
    # Four layers of four blocks, the stem and a merging.
    assert len(modules) == 18
    for module in modules:
        grad = grads[names[id(module.stock_layer.weight)]].flatten(1).abs()
        expected = grad.topk(2, dim=1).indices.sort(1).values
        assert (module.index == expected).float().mean() > .99


def test_decay_and_momentum_move_no_other_entry():
    """Bit for bit, after steps that move all that trains."""
    peft = swin('mmdet', 'GPS')
    image = torch.randn(2, 3, 36, 28)
    mmpeft.calibrate(peft, [image], loss_of)
    before = {k: v.clone() for k, v in peft.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in peft.parameters() if p.requires_grad], .1, weight_decay=.5)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(peft, image).backward()
        optimizer.step()
    merged = merged_state_dict(peft)
    chosen = {}
    names = {id(p): n for n, p in peft.named_parameters()}
    for module in peft.modules():
        if isinstance(module, GPS):
            weight = module.stock_layer.weight
            mask = torch.zeros_like(weight.flatten(1), dtype=torch.bool)
            mask.scatter_(1, module.index.long(), True)
            chosen[names[id(weight)]] = mask.view_as(weight)
    for name, value_ in merged.items():
        if name in chosen:
            mask = chosen[name]
            assert torch.equal(value_[~mask], before[name][~mask]), name
            moved = (value_ != before[name])[mask]
            assert moved.float().mean() > .9, name
        elif name not in trained(peft):
            assert torch.equal(value_, before[name]), name


def test_delta_holds_indices_and_values(tmp_path):
    peft = swin('mmdet', 'GPS:num_inputs=2')
    mmpeft.calibrate(peft, [torch.randn(1, 3, 36, 28)], loss_of)
    header = mmpeft.save_delta(peft, str(tmp_path / 'x_delta.safetensors'))
    assert header.format_version == 1
    rows = sum(m.stock_layer.weight.shape[0] for m in peft.modules()
               if isinstance(m, GPS))
    sizes = {'index': 0, 'values': 0}
    for name, (_, shape, _) in header.tensors.items():
        leaf = name.rpartition('.')[2]
        if leaf in sizes:
            sizes[leaf] += np.prod(shape)
        else:
            # The buffer stands beside a table that trains.
            assert 'bias' in leaf or leaf == 'relative_position_index'
    assert sizes == dict(index=2 * rows, values=2 * rows)
    # The weights themselves are of the base, all of them.
    assert 'stages.0.blocks.0.ffn.layers.1.weight' in header.base['names']
    counts = mmpeft.count_params(peft)
    assert counts['backbone_trainable'] == 2 * rows + sum(
        p.numel() for n, p in trained(peft).items() if 'peft' not in n)


def test_another_base_is_looked_at_anew():
    peft = swin('mmdet', 'GPS')
    image = torch.randn(1, 3, 36, 28)
    mmpeft.calibrate(peft, [image], loss_of)
    twin = swin('mmdet', 'GPS')
    twin.load_state_dict(peft.state_dict())
    loss_of(twin, image)
    peft.load_state_dict(swin('mmdet').state_dict(), strict=False)
    with pytest.raises(PEFTError, match='has to look at data'):
        loss_of(peft, image)


def test_starts_at_the_frozen_model():
    module = build(nn.Linear(12, 10), 2)
    module.reset_parameters()
    assert (module.values == 0).all() and (module.index == -1).all()


@pytest.mark.parametrize('num_inputs', [1, 3])
def test_count(num_inputs):
    backbone = swin('mmdet', dict(type='GPS', num_inputs=num_inputs))
    rows = sum(2 * 9 * d for d in (16, 32)) + 16 + 32
    biases = sum(2 * 9 * d for d in (16, 32)) + 16
    tables = 2 * 7**2 * (2 + 4)
    assert sum(p.numel() for p in trained(
        backbone).values()) == num_inputs * rows + biases + tables


def test_layers_leave_out_the_rest():
    backbone = swin('mmdet', 'GPS:layers=[1]')
    assert all(n.startswith('stages.0.blocks.1.') for n in trained(backbone))


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_inputs=0), 'num_inputs must be a whole number'),
    (dict(num_inputs=17), 'num_inputs=17 is larger than the width 16'),
    (dict(times_para=1), "no argument 'times_para'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='GPS', **kwargs))
