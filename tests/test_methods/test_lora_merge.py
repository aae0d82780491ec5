import pytest
import torch

from mmpeft.errors import MergeError
from mmpeft.merging import merge, merged_state_dict
from .checks import check_close
from .recorded import fill, tensor
from .swins import LIBRARIES, swin

ALL = ('q', 'k', 'v', 'proj', 'fc1', 'fc2')


def image(*size):
    return tensor('image', 2, 3, *size, dtype=torch.float32)


def lora(library, **kwargs):
    backbone = swin(library, dict(type='LoRA', **dict(dict(rank=3), **kwargs)))
    fill(backbone)
    # An update that is smaller than the weight, as in any run; larger ones
    # lose more digits in float32 than merging may.
    for name, parameter in backbone.named_parameters():
        if name.endswith('lora_B'):
            parameter.data.mul_(.25)
    backbone.eval()
    return backbone


def check_merge(library, backbone, size=(36, 28)):
    """The stock model with the merged weights computes the same."""
    with torch.no_grad():
        expected = backbone(image(*size))
    stock = swin(library)
    keys = set(stock.state_dict())
    merged = merged_state_dict(backbone)
    assert set(merged) == keys
    stock.load_state_dict(merged, strict=True)
    stock.eval()
    with torch.no_grad():
        for i, (out, wanted) in enumerate(zip(stock(image(*size)), expected)):
            check_close(out, wanted, 1e-5, f'output {i}')


@pytest.mark.parametrize('targets', [(t, ) for t in ALL] + [('q', 'v'), ALL])
def test_every_target(targets):
    check_merge('mmdet', lora('mmdet', targets=targets))


@pytest.mark.parametrize('kwargs', [
    dict(alpha=1),
    dict(alpha=12.),
    dict(rslora=True),
    dict(alpha=5, rslora=True, drop_rate=.3),
    dict(layers='stage:1'),
    dict(overrides={'stage:0': dict(rank=5, targets=['fc2'])}),
])
def test_every_scale(kwargs):
    check_merge('mmdet', lora('mmdet', **kwargs))


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('size', [(36, 28), (33, 50), (64, 64)])
def test_sizes_that_the_window_does_not_divide(library, size):
    check_merge(library, lora(library, targets=ALL), size)


@pytest.mark.parametrize('library', LIBRARIES)
def test_two_adapters_and_a_selector(library):
    backbone = swin(library, [
        dict(type='LoRA', rank=3, targets=['q', 'fc1']),
        dict(type='LoRA', rank=2, targets=['q', 'proj'], name='second'),
        dict(type='LNTune')
    ])
    fill(backbone)
    backbone.eval()
    check_merge(library, backbone)


def test_in_place():
    backbone = lora('mmseg', targets=ALL)
    stock = swin('mmseg')
    with torch.no_grad():
        expected = backbone(image(36, 28))
        merge(backbone)
        found = backbone(image(36, 28))
    assert list(backbone.state_dict()) == list(stock.state_dict())
    assert [type(m)
            for m in backbone.modules()] == [type(m) for m in stock.modules()]
    for out, wanted in zip(found, expected):
        check_close(out, wanted, 1e-5, 'merged in place')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    backbone = lora('mmdet', targets=ALL).to(dtype)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    merged = merged_state_dict(backbone)
    block = 'stages.0.blocks.1'
    key, peft = f'{block}.ffn.layers.1.weight', f'{block}.peft.lora.fc2.lora'
    exact = before[key].double(
    ) + before[f'{peft}_B'].double() @ before[f'{peft}_A'].double()
    assert merged[key].dtype == dtype
    assert torch.equal(merged[key], exact.to(dtype))
    # The product alone, in this precision, would be another number.
    naive = before[key] + (
        before[f'{peft}_B'].float() @ before[f'{peft}_A'].float()).to(dtype)
    assert not torch.equal(naive, merged[key])
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_float32_is_rounded_once():
    backbone = lora('mmdet')
    state = backbone.state_dict()
    key = 'stages.1.blocks.0.attn.w_msa.qkv.weight'
    down, up = (
        state[f'stages.1.blocks.0.peft.lora.qkv.lora_{f}'].double()
        for f in 'AB')
    exact = state[key].double()
    exact[:32] += up[:32] @ down[:3]
    exact[64:] += up[32:] @ down[3:]
    assert torch.equal(merged_state_dict(backbone)[key], exact.float())


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(value):
    backbone = lora('mmdet')
    block = backbone.stages[0].blocks[1]
    block.peft['lora']['qkv'].lora_B.data[2, 1] = value
    before = block.attn.w_msa.qkv.weight.clone()
    for function in (merged_state_dict, merge):
        with pytest.raises(MergeError, match='blocks.1.*lora_B.*not finite'):
            function(backbone)
    assert torch.equal(block.attn.w_msa.qkv.weight, before)
    assert 'lora' in block.peft


def test_overflow_of_half_precision_is_refused():
    backbone = lora('mmdet', targets=['proj']).half()
    backbone.stages[0].blocks[0].peft['lora']['proj'].lora_B.data.fill_(6e4)
    backbone.stages[0].blocks[0].peft['lora']['proj'].lora_A.data.fill_(6e4)
    with pytest.raises(MergeError, match='does not fit into torch.float16'):
        merged_state_dict(backbone)


@pytest.mark.parametrize('other', ['Mona', 'Adapter', 'AdaptFormer'])
def test_beside_a_method_that_cannot_merge(other):
    backbone = swin('mmdet', [
        dict(type='LoRA', rank=3),
        dict(type=other, dim=4),
    ])
    with pytest.raises(MergeError, match=f'{other} .*non-linearity'):
        merge(backbone)
    assert {'lora'} < set(backbone.stages[0].blocks[0].peft)


@pytest.mark.parametrize('method',
                         ['Full', 'Frozen', 'Partial', 'BitFit', 'LNTune'])
@pytest.mark.parametrize('library', LIBRARIES)
def test_in_place_methods_merge_to_themselves(library, method):
    backbone = swin(library, method)
    fill(backbone)
    merged = merged_state_dict(backbone)
    stock = swin(library)
    assert list(merged) == list(stock.state_dict())
    for key, value in backbone.state_dict().items():
        assert torch.equal(merged[key], value), key
    stock.load_state_dict(merged, strict=True)
