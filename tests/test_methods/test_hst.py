import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import build_pair, perturb
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmpeft
from mmpeft.errors import MergeError, PEFTError
from mmpeft.injection import PEFTBackbone
from mmpeft.merging import merged_state_dict
from mmpeft.methods.hst import check_levels
from mmpeft.readers import check_readers
from .checks import _check_digests, check_close
from .pyramid_checks import (PYRAMIDS, check_an_error_leaves_nothing,
                             check_moved_statistics, check_parts_of_a_forward,
                             check_refused)
from .recorded import digest, fill, load, tensor
from .swins import swin, trained

pytest.importorskip('mmpretrain')

DIMS = dict(dims=(4, 6, 8), num_heads=(1, 2, 2))
SMALL = dict(type='HST', **DIMS)


def vit(method=SMALL, depth=4, **kwargs):
    from mmpretrain.models.backbones import VisionTransformer
    arch = dict(
        embed_dims=16, num_layers=depth, num_heads=2, feedforward_channels=64)
    kwargs = dict(
        dict(img_size=48, patch_size=8, out_type='featmap'), **kwargs)
    return PEFTBackbone(
        VisionTransformer,
        copy.deepcopy(method),
        allow_random_base=True,
        arch=arch,
        **kwargs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('with_cp', [True, False])
def test_released(dtype, with_cp):
    """All maps, what trains and all its gradients, with BatchNorm in
    training."""
    recorded = load('released_hst')
    outs, grads = (1e-5, 1e-4) if dtype is torch.float32 else (2e-7, 2e-7)
    method = dict(
        type='HST',
        dims=(8, 12, 16, 20),
        num_heads=(2, 3, 4, 5),
        with_cp=with_cp)
    backbone = vit(method, depth=8, img_size=(48, 64))
    fill(backbone.to(dtype))
    loss = 0.
    found = backbone.train()(tensor('image', 2, 3, 48, 64, dtype=dtype))
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
    # A bias of all keys is the same to a softmax: rounding is left of it.
    largest = max(float(g.abs().max()) for g in own.values())
    keys = [n for n in names if n.endswith('.k.bias')]
    assert len(keys) == 8
    for name in keys:
        assert own.pop(name).abs().max() < grads * largest
    kept = [i for i, n in enumerate(names) if n in own]
    recorded.update(
        names='\n'.join(sorted(own)), grads=recorded['grads'][kept])
    _check_digests(recorded, own, grads)


def test_maps():
    """Strides of 4 pixels and on, on images that patches do not divide."""
    backbone = vit().eval()
    assert mmpeft.out_channels(backbone) == (4, 6, 8)
    for size, expected in (((48, 48), [(12, 12), (6, 6),
                                       (3, 3)]), ((60, 44), [(15, 11), (8, 6),
                                                             (4, 3)])):
        maps = backbone(torch.randn(2, 3, *size))
        assert [tuple(m.shape[2:]) for m in maps] == expected
        assert [m.shape[1] for m in maps] == [4, 6, 8]
    assert mmpeft.out_channels(vit('LoRA:rank=2')) is None


def test_what_trains():
    names = trained(vit())
    assert {n.split('.peft.')[0]
            for n in names
            if '.peft.' in n} == {f'layers.{i}'
                                  for i in range(4)}
    stock = {n for n in names if 'peft.' not in n}
    assert stock == {
        f'layers.{i}.{norm}.{leaf}'
        for i in range(4)
        for norm in ('ln1', 'ln2')
        for leaf in ('weight', 'bias')
    }


def test_start():
    torch.manual_seed(0)
    backbone = vit(dict(type='HST'))
    backbone.init_weights()
    network = backbone.peft.hst
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(.02, rel=.2)
            assert not module.bias.any()
    # sqrt(2 / fan_out) with a fan of 9 x 64
    std = network.embeds[2].conv.weight.std().item()
    assert std == pytest.approx((2 / (9 * 64))**.5, rel=.05)
    # uniform in (-b, b), b**2 = 6 / (16 + 16)
    token = backbone.layers[0].peft.hst['tokens'].token
    assert .1 < token.abs().max() <= (6 / 32)**.5


def test_the_token_is_seen_and_dropped():
    """A token changes what its block passes on, and the block after it gets
    no other than its own."""
    backbone = perturb(vit()).eval()
    image, sizes = torch.randn(1, 3, 48, 48), []
    for layer in backbone.layers:
        layer.register_forward_hook(lambda m, a, y: sizes.append(y.shape[1]))
    first = backbone(image)
    assert sizes == [1 + 36] * 4
    nn.init.normal_(backbone.layers[2].peft.hst['tokens'].token)
    second = backbone(image)
    # Three levels of 2, 1 and 1 blocks.
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(first[2], second[2])


@pytest.mark.parametrize('count,depths,expected', [
    (12, None, [4, 4, 4]),
    (4, None, [2, 1, 1]),
    (4, (1, 1, 2), (1, 1, 2)),
])
def test_depths(count, depths, expected):
    assert check_levels(count, (4, 6, 8), (1, 2, 2), depths) == expected


def test_out_indices_do_not_matter():
    image, found = torch.randn(1, 3, 48, 48), []
    for kwargs in (dict(), dict(out_indices=[1, 3]),
                   dict(out_type='cls_token')):
        backbone = vit(**kwargs).eval()
        fill(backbone)
        found.append(backbone(image))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    # But those behind the last one are not run beside.
    assert len(vit(out_indices=[2]).peft.hst.blocks) == 3


def test_moved_statistics_are_in_the_delta(tmp_path):
    check_moved_statistics(vit, str(tmp_path / 'hst_delta.safetensors'))


def test_an_error_leaves_nothing():
    check_an_error_leaves_nothing(vit())


def test_with_other_methods():
    """Gradients of all that trains; nothing is put where no output is."""
    methods = ['LoRA:rank=2', 'Mona:dim=4', 'DTL', 'PrefixTuning:num_tokens=2',
               'SSF', SMALL]  # yapf: disable
    backbone = perturb(vit(methods)).train()
    assert not any(n.startswith('ln1.') for n in trained(backbone))
    sum(o.square().mean()
        for o in backbone(torch.randn(2, 3, 48, 48))).backward()
    for name, parameter in trained(backbone).items():
        assert parameter.grad is not None, name


@pytest.mark.parametrize('kind', ['vit', 'vit_sam'])
@pytest.mark.parametrize('method', ['BitFit', 'LNTune'])
def test_no_selector_trains_what_nothing_reads(kind, method, image):
    _, backbone = build_pair(kind, [method, SMALL])
    sum(o.square().mean() for o in backbone(image)).backward()
    for name, parameter in trained(backbone).items():
        assert parameter.grad is not None, name


@pytest.mark.parametrize('other,message', [
    ('E3VA:rank=2', 'HST replaces the outputs'),
    ('LAST:rank=2', 'HST replaces the outputs'),
    (dict(SMALL, name='second'), 'HST replaces the outputs'),
    ('VPTDeep:num_tokens=2', 'VPTDeep and MetaToken cannot stand together'),
    ('VPTShallow:num_tokens=2', 'cannot stand together'),
])
def test_not_with(other, message):
    with pytest.raises(PEFTError, match=message):
        vit([other, SMALL])


@pytest.mark.parametrize('kind', PYRAMIDS)
def test_refused_beside_a_pyramid(kind):
    check_refused(kind, SMALL)


def test_parts_of_a_forward():
    check_parts_of_a_forward(SMALL, [4, 6, 8], lambda shape: shape[1])


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='HST .*beside the backbone'):
        merged_state_dict(vit())


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_heads=(1, 2)), 'are 3 levels, and num_heads=.* are 2'),
    (dict(num_heads=(1, 4, 2)), '4 heads do not divide the width 6'),
    (dict(num_heads=(5, 2, 2)), 'num_heads=5 is larger than the width 4'),
    (dict(dims=(0, 6, 8)), 'dims must be a whole number'),
    (dict(dims=(2, ) * 5, num_heads=(1, ) * 5), '5 levels need as many'),
    (dict(depths=(1, 1)), r'depths=\(1, 1\) must be 3 numbers'),
    (dict(depths=(1, 1, 3)), 'whose sum is 4'),
    (dict(mlp_ratio=0), 'mlp_ratio must be a number above 0'),
    (dict(layers=[0, 1, 2]), 'ends with layers.3; `layers` leaves it out'),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        vit(dict(SMALL, **kwargs))


# ---------------------------------------------------------- who reads the maps
def model_of(library, **parts):
    pytest.importorskip(library)
    init_default_scope(library)
    return MODELS.build(parts)


def backbone_cfg():
    return dict(
        type='mmpeft.PEFTBackbone',
        stock='mmpretrain.VisionTransformer',
        method=SMALL,
        arch=dict(
            embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32),
        img_size=48,
        patch_size=8,
        out_type='featmap',
        allow_random_base=True)


def segmentor(head, **kwargs):
    return model_of(
        'mmseg',
        type='EncoderDecoder',
        backbone=backbone_cfg(),
        decode_head=dict(channels=4, num_classes=3, **head),
        **kwargs)


PYRAMID = dict(type='UPerHead', in_channels=[4, 6, 8], in_index=[0, 1, 2])
FCN = dict(type='FCNHead', in_channels=8, in_index=2)


@pytest.mark.parametrize('head,aux,message', [
    (PYRAMID, None, None),
    (PYRAMID, FCN, None),
    (dict(FCN, in_index=-1), None, None),
    (dict(FCN, in_channels=[4, 6], in_index=[0, 1],
          input_transform='resize_concat'), None, None),
    (dict(PYRAMID, in_channels=[16] * 3), None,
     r'3 maps of 4, 6, 8 channels.* decode_head \(UPerHead\) is made for '
     r'16, 16, 16. Set model.decode_head.in_channels=\[4, 6, 8\]'),
    (PYRAMID, dict(FCN, in_channels=16),
     'auxiliary_head .* is made for 16. Set .*in_channels=8 .*in_index is 2'),
    (PYRAMID, [FCN, dict(FCN, in_channels=6)], r'auxiliary_head.1 .* for 6'),
    (dict(FCN, in_channels=[4, 4], in_index=[0, 1],
          input_transform='resize_concat'), None, 'is made for 8'),
])  # yapf: disable
def test_heads_of_segmentors(head, aux, message):
    parts = {}
    if aux is not None:
        many = aux if isinstance(aux, list) else [aux]
        heads = [dict(a, channels=4, num_classes=3) for a in many]
        parts['auxiliary_head'] = heads if isinstance(aux, list) else heads[0]
    model = segmentor(head, **parts)
    if message is None:
        check_readers(model)
        outs = model.backbone.eval()(torch.randn(1, 3, 48, 48))
        model.decode_head.eval()(outs)
        return
    with pytest.raises(PEFTError, match=message):
        check_readers(model)


@pytest.mark.parametrize('channels,message', [
    ([4, 6, 8], None),
    ([16, 16, 16], 'neck .FPN. is made for 16, 16, 16'),
    ([4, 6, 8, 8], 'neck .FPN. is made for 4, 6, 8, 8'),
])
def test_necks_of_detectors(channels, message):
    """A head behind a neck is the neck's."""
    model = model_of(
        'mmdet',
        type='RetinaNet',
        backbone=backbone_cfg(),
        neck=dict(
            type='FPN', in_channels=channels, out_channels=12, num_outs=5),
        bbox_head=dict(
            type='RetinaHead', num_classes=2, in_channels=12, stacked_convs=1))
    if message is None:
        check_readers(model)
        model.neck(model.backbone.eval()(torch.randn(1, 3, 48, 48)))
    else:
        with pytest.raises(PEFTError, match=message):
            check_readers(model)


@pytest.mark.parametrize('scales,message', [
    ([1, 1., 1], None),
    ([2, 1, .5], 'model.neck has a MultiLevelNeck, .* by 2, 1, 0.5, as if'),
])
def test_necks_that_make_a_pyramid(scales, message):
    """Of one."""
    neck = dict(
        type='MultiLevelNeck',
        in_channels=[4, 6, 8],
        out_channels=4,
        scales=scales)
    model = segmentor(dict(PYRAMID, in_channels=[4] * 3), neck=neck)
    if message is None:
        check_readers(model)
    else:
        with pytest.raises(PEFTError, match=message):
            check_readers(model)


@pytest.mark.parametrize('channels,message', [
    (8, None),
    (16, 'head .LinearClsHead. is made for 16. Set model.head.in_channels=8'),
])
def test_heads_of_classifiers(channels, message):
    """Behind a neck that has no channels."""
    model = model_of(
        'mmpretrain',
        type='ImageClassifier',
        backbone=backbone_cfg(),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', in_channels=channels, num_classes=3))
    if message is None:
        check_readers(model)
        assert model.eval()(torch.randn(1, 3, 48, 48)).shape == (1, 3)
    else:
        with pytest.raises(PEFTError, match=message):
            check_readers(model)


def test_applied_to_a_model():
    """It is as it was if its head does not fit."""
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    stock = dict(backbone_cfg(), type='mmpretrain.VisionTransformer')
    for key in ('stock', 'method', 'allow_random_base'):
        stock.pop(key)
    for channels, fits in (([4, 6, 8], True), ([16] * 3, False)):
        model = MODELS.build(
            dict(
                type='EncoderDecoder',
                backbone=stock,
                decode_head=dict(
                    PYRAMID, in_channels=channels, channels=4, num_classes=3)))
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        if fits:
            assert mmpeft.apply(model, SMALL) is model
            continue
        with pytest.raises(PEFTError, match=r'in_channels=\[4, 6, 8\]'):
            mmpeft.apply(model, SMALL)
        assert names == [
            n for n, p in model.named_parameters() if p.requires_grad
        ]


def test_a_run_stops_before_its_first_iteration():
    """Whatever tool starts it."""
    from mmpeft.engine.hooks import PEFTReportHook
    for channels, fits in ((4, 6, 8), True), ((16, 16, 16), False):
        model = segmentor(dict(PYRAMID, in_channels=list(channels)))
        runner = SimpleNamespace(
            cfg=Config(dict(model=dict(backbone=backbone_cfg()))), model=model)
        if fits:
            PEFTReportHook().before_run(runner)
        else:
            with pytest.raises(PEFTError, match='is made for 16, 16, 16'):
                PEFTReportHook().before_run(runner)


def test_other_backbones_are_not_asked():
    check_readers(nn.ModuleDict(dict(backbone=swin('mmdet', 'LoRA:rank=2'))))
