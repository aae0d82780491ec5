import pytest
import torch
import torch.nn.functional as F

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import SCT
from mmpeft.sites import TokenLayout
from .checks import check_block, check_module, check_released_module
from .recorded import load, tensor, value
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)
INDEX = [1, 4, 5, 9]


def build(dims=12, index=INDEX, name='attn_residual', **kwargs):
    module = SCT(site(name, dims), num_channels=len(index), **kwargs)
    module.settle_on(torch.tensor(index))
    return module


def formula(y, p, index, scale, prefix=''):
    """Channel by channel."""
    weight, bias = p[prefix + 'weight'], p[prefix + 'bias']
    columns = list(y.unbind(-1))
    old = [columns[i] for i in index]
    for row, i in enumerate(index):
        total = bias[row] + sum(w * c for w, c in zip(weight[row], old))
        columns[i] = columns[i] + scale * total
    return torch.stack(columns, -1)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name,index,scale,shape', [
    ('attn_residual', INDEX, 1., (2, 15)),
    ('attn_residual', [7], .3, (3, 1)),
    ('fc2', list(range(12)), 2., (1, 3, 5)),
])
def test_formula(name, index, scale, shape, dtype):
    module = build(index=index, name=name, scale=scale)
    x = tensor('x', *shape, module.site.in_dims)
    check_module(module, lambda x, y, p: formula(y, p, index, scale), x,
                 tensor('y', *shape, 12), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('drop_path_rate', [0., .5])
def test_behind_the_attention(library, drop_path_rate, monkeypatch):
    index = [2, 3, 11]
    monkeypatch.setattr(SCT, 'forget',
                        lambda self: self.settle_on(torch.tensor(index)))

    def block(x, p, attention, mlp, drop):
        x = x + drop(attention(x))
        x = formula(x, p, index, .5, 'peft.sct.attn_residual.')
        return x + drop(mlp(x))

    check_block(library, dict(type='SCT', num_channels=3, scale=.5), block,
                drop_path_rate)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    """That for Swin; the one for ViT leaves the scale out."""
    index = load('released_sct')['index'].tolist()
    check_released_module('released_sct', build(32, index, scale=.4),
                          lambda m, x: m(x, x, NO_LAYOUT), (2, 15, 32), dtype)


def test_released_choice():
    """Of two blocks and three batches of images with labels, whose first token
    does not count."""
    expected = load('released_sct_channels')['attn']
    labels = [[0, 2, 1], [2, 2, 5], [0, 7, 5]]
    modules = [build(32, range(6)).double() for _ in range(2)]
    for i, label in enumerate(labels):
        y = tensor(f'batch {i}', 3, 16, 32)
        for number, module in enumerate(modules):
            factor = torch.from_numpy(value(f'block {number}', (1, 32)))[0]
            y = y * factor + y.flip(1)
            module.see(y, TokenLayout((3, 5), 1), torch.tensor(label))
    for module, index in zip(modules, expected):
        assert module.chosen(module.total(8)).tolist() == index.tolist()


def test_tokens_count_for_the_class_under_them():
    """A map of 2 x 3 tokens over 4 x 6 pixels, in plain loops."""
    module = build(5, [0, 1], name='fc2')
    y = tensor('y', 2, 6, 5)
    pixels = torch.tensor([[[0, 0, 1, 1, -1, -1], [0, 0, 1, 1, -1, -1],
                            [3, 3, 3, 3, 0, 0], [3, 3, 3, 3, 0, 0]],
                           [[1] * 6] * 2 + [[-1] * 6] * 2])
    module.see(y, TokenLayout((2, 3)), pixels)
    tokens = [[0, 1, -1, 3, 3, 0], [1, 1, 1, -1, -1, -1]]
    energy = torch.zeros(4, 5, dtype=torch.double)
    for b, row in enumerate(tokens):
        for n, label in enumerate(row):
            if label >= 0:
                energy[label] += y[b, n]**2
    torch.testing.assert_close(module.total(4), energy)
    best = energy.sqrt().mean(0).argsort(descending=True)[:2].sort().values
    assert module.chosen(module.total(4)).tolist() == best.tolist()
    # Another call adds to it.
    module.see(y, TokenLayout((2, 3)), pixels)
    torch.testing.assert_close(module.total(4), 2 * energy)


def test_without_labels_all_is_one_class():
    module = build(5, [0])
    y = tensor('y', 2, 7, 5)
    module.see(y, TokenLayout((2, 3), 1), None)
    torch.testing.assert_close(
        module.total(1), (y[:, 1:]**2).sum((0, 1))[None])


def test_ties_give_exactly_as_many():
    """The first ones, in the order of the channels."""
    module = build(6, [0, 1, 2])
    scores = torch.tensor([[1., 4., 4., 4., 4., 9.]])**2
    assert module.chosen(scores).tolist() == [1, 2, 5]
    assert module.chosen(torch.zeros(2, 6)).tolist() == [0, 1, 2]


def test_classes_need_a_grid():
    module = build(5, [0])
    with pytest.raises(PEFTError, match='tokens form no grid'):
        module.see(
            torch.ones(1, 4, 5), TokenLayout(),
            torch.zeros(1, 8, 8, dtype=torch.long))


def test_start():
    module = SCT(site('attn_residual', 400), num_channels=200)
    assert (module.bias == 0).all() and (module.index == -1).all()
    assert .019 < module.weight.std() < .021


def test_uncalibrated_is_the_frozen_model_and_does_not_train():
    module = SCT(site('attn_residual', 12), num_channels=3)
    y = tensor('y', 2, 5, 12, dtype=torch.float32)
    assert module.eval()(y, y, NO_LAYOUT) is y
    with pytest.raises(PEFTError, match='has to look at data.*CalibrateHook'):
        module.train()(y, y, NO_LAYOUT)


@pytest.mark.parametrize('index', [[0, 1, 12], [-1, 1, 2], [-2, -2, -2]])
def test_spoilt_choice(index):
    module = build(index=[0, 1, 2])
    state = dict(module.state_dict(), index=torch.tensor(index))
    module.load_state_dict(state)
    with pytest.raises(PEFTError, match=r'not from 0 to 11: .* damaged'):
        module(torch.ones(1, 12), torch.ones(1, 12), NO_LAYOUT)


def test_a_loaded_choice_counts():
    state = build().state_dict()
    module = SCT(site('attn_residual', 12), num_channels=4)
    assert not module.is_calibrated
    module.load_state_dict(state)
    assert module.is_calibrated
    module.reset_parameters()
    assert not module.is_calibrated


def test_count():
    backbone = swin('mmdet', dict(type='SCT', num_channels=5))
    assert sum(p.numel() for p in trained(backbone).values()) == 4 * (25 + 5)


def test_merge_of_the_mlp():
    module = build(name='fc2', scale=.7).double()
    for name, parameter in module.named_parameters():
        parameter.data.copy_(torch.from_numpy(value(name, parameter.shape)))
    weight, bias = tensor('w', 12, 48), tensor('b', 12)
    x = tensor('x', 7, 48)
    for b in (bias, None):
        y = F.linear(x, weight, b)
        merged = module.merge(weight, b)
        torch.testing.assert_close(
            F.linear(x, *merged), module(x, y, NO_LAYOUT))
    assert torch.equal(weight, tensor('w', 12, 48))


def test_merge_behind_the_attention_is_refused():
    with pytest.raises(MergeError, match='SCT .*shortcut; target=mlp merges'):
        merged_state_dict(swin('mmdet', 'SCT:num_channels=4'))


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_channels=0), 'num_channels must be a whole number'),
    (dict(num_channels=17), 'num_channels=17 is larger than the width 16'),
    (dict(num_channels=4, scale=0), 'scale must be a number above 0'),
    (dict(num_channels=4, target='qkv'), "target='qkv' must be one of attn"),
    (dict(topN=96), "no argument 'topN'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='SCT', **kwargs))
