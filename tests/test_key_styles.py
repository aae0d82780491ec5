"""Names of weights in different libraries, against the libraries' models."""

import pytest
import torch
from commands import run_tool
from conftest import perturb
from mmengine.registry import MODELS, init_default_scope

from mmpeft.errors import PEFTError
from mmpeft.key_styles import STYLES, convert, hint, style_of

VIT = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=64)


def evaluate(*models):
    # The stock train() and eval() of some return nothing.
    for model in models:
        model.eval()


def mm_vit(**kwargs):
    pytest.importorskip('mmpretrain')
    return perturb(
        MODELS.build(
            dict(
                type='mmpretrain.VisionTransformer',
                arch=VIT,
                img_size=32,
                patch_size=8,
                out_type='raw',
                **kwargs)),
        only='')


def timm_vit(**kwargs):
    from timm.models.vision_transformer import VisionTransformer
    return perturb(
        VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=3,
            **kwargs),
        only='')


def mm_swin(library):
    pytest.importorskip(library)
    own = dict(arch=dict(
        embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 1, 1])) \
        if library == 'mmpretrain' else dict(
            embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 1, 1, 1))
    return MODELS.build(
        dict(type=f'{library}.SwinTransformer', out_indices=(3, ), **own))


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize('scale', [None, .3])
def test_timm_vit(image, scale):
    pytest.importorskip('timm')
    theirs = timm_vit(init_values=scale)
    ours = mm_vit(layer_scale_init_value=scale or 0.)
    state, report = convert(theirs.state_dict(), 'mmpretrain-vit')
    assert report.source == 'timm-vit'
    assert report.dropped == ['head.weight', 'head.bias']
    ours.load_state_dict(state, strict=True)
    evaluate(theirs, ours)
    expected = theirs.forward_features(image)
    assert (ours(image)[0] - expected).abs().max() < 1e-5
    back, _ = convert(ours.state_dict(), 'timm-vit')
    own = theirs.state_dict()
    assert set(back) == set(own) - set(report.dropped)
    assert all(torch.equal(v, own[k]) for k, v in back.items())


def test_mmseg_vit(image):
    pytest.importorskip('mmseg')
    theirs = perturb(
        MODELS.build(
            dict(
                type='mmseg.VisionTransformer',
                img_size=(32, 32),
                patch_size=8,
                embed_dims=16,
                num_layers=2,
                num_heads=2,
                out_indices=(1, ),
                patch_bias=True,
                final_norm=True)),
        only='')
    # mmseg's epsilon is another one by default.
    ours = mm_vit(out_indices=(1, ), norm_cfg=dict(type='LN', eps=1e-6))
    theirs.ln1.eps = 1e-6
    for layer in theirs.layers:
        layer.ln1.eps = layer.ln2.eps = 1e-6
    state, report = convert(theirs.state_dict(), 'mmpretrain-vit')
    assert report.source == 'mmseg-vit' and report.dropped == []
    ours.load_state_dict(state, strict=True)
    evaluate(theirs, ours)
    expected = theirs(image)[0].flatten(2).transpose(1, 2)
    assert (ours(image)[0][:, 1:] - expected).abs().max() < 1e-5
    back, _ = convert(state, 'mmseg-vit')
    theirs.load_state_dict(back, strict=True)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain'])
def test_timm_swin(library, image):
    """Patch merging reads its input in another order there."""
    pytest.importorskip('timm')
    from timm.models.swin_transformer import SwinTransformer
    theirs = perturb(
        SwinTransformer(
            img_size=224,
            embed_dim=16,
            depths=(1, 1, 2, 1),
            num_heads=(1, 1, 1, 1),
            num_classes=3),
        only='')
    ours = mm_swin(library)
    state, report = convert(theirs.state_dict(), 'mm-swin')
    assert report.source in ('timm-swin', 'official-swin')
    rest = ours.load_state_dict(state, strict=False)
    assert rest.unexpected_keys == []
    assert all('relative_position_index' in k for k in rest.missing_keys)
    evaluate(theirs, ours)
    image = torch.randn(1, 3, 224, 224)
    expected = theirs.forward_features(image)
    if expected.shape[-1] == 128:
        expected = expected.movedim(-1, 1)
    assert (ours(image)[0] - expected).abs().max() < 1e-4
    for style in ('timm-swin', 'official-swin'):
        other, _ = convert(ours.state_dict(), style)
        assert style_of(other) == (style, '')
        again, _ = convert(other, 'mm-swin')
        assert all(torch.equal(state[k], v) for k, v in again.items())


def test_official_swin_as_the_stock_converter_reads_it():
    mmdet = pytest.importorskip('mmdet')
    assert mmdet
    from mmdet.models.backbones.swin import swin_converter
    state = perturb(mm_swin('mmdet'), only='').state_dict()
    official, _ = convert(state, 'official-swin')
    assert 'layers.0.downsample.reduction.weight' in official
    expected = swin_converter(official)
    found, _ = convert(official, 'mm-swin')
    for key, value in found.items():
        # It leaves the norm of the classifier as it is called.
        key = {
            'norm3.weight': 'norm.weight',
            'norm3.bias': 'norm.bias'
        }.get(key, key)
        assert torch.equal(expected[f'backbone.{key}'], value), key


def test_prefixes_and_refusals():
    state = timm_style()
    for prefix in ('backbone.', 'module.', 'model.'):
        assert style_of(prefix + k for k in state) == ('timm-vit', prefix)
    with pytest.raises(PEFTError, match="style timm-vit; .* not to 'mm-swin'"):
        convert(state, 'mm-swin')
    with pytest.raises(PEFTError, match="'conv1.weight' and 0 others"):
        convert({'conv1.weight': torch.ones(1)}, 'mmpretrain-vit')
    assert set(STYLES) >= {'timm-vit', 'mm-swin'}


def timm_style():
    return convert(mm_vit().state_dict(), 'timm-vit')[0]


def test_hint():
    own = list(mm_vit().state_dict())
    timm = [k for k in timm_style() if k not in own]
    assert '--to mmpretrain-vit' in hint(timm, own)
    assert "prefix='backbone.'" in hint([f'backbone.{k}' for k in own], own)
    assert hint(['a.b'], own).endswith("such as 'a.b'.")
    swin = ['stages.0.blocks.0.attn.w_msa.qkv.weight']
    assert 'a Swin, and the model is a ViT' in hint(swin, own)


def test_command(tmp_path):
    source, out = tmp_path / 'in.pth', tmp_path / 'out.pth'
    torch.save(dict(model=timm_style(), epoch=3), source)
    command = ('convert_checkpoint.py', source, out, '--to', 'mmpretrain-vit')
    done = run_tool(*command)
    assert done.returncode == 0, done.stderr
    assert 'renamed blocks.0.norm1.weight -> layers.0.ln1.weight' \
        in done.stdout
    assert 'kept cls_token' in done.stdout
    written = torch.load(out, weights_only=True)['state_dict']
    mm_vit().load_state_dict(written, strict=True)
    again = run_tool(*command)
    assert again.returncode == 2 and 'exists already' in again.stderr


@pytest.fixture(autouse=True)
def scope():
    """Other tests leave that of another library behind."""
    pytest.importorskip('mmpretrain')
    init_default_scope('mmpretrain')


def classifier(file, method='LoRA:rank=2', **init):
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(
                type='mmpeft.PEFTBackbone',
                stock='mmpretrain.VisionTransformer',
                method=method,
                arch=VIT,
                img_size=32,
                patch_size=8,
                init_cfg=dict(type='Pretrained', checkpoint=str(file),
                              **init)),
            head=dict(
                type='mmpretrain.VisionTransformerClsHead',
                num_classes=3,
                in_channels=16)))
    model.init_weights()
    model.train()
    return model


@pytest.mark.parametrize('method', ['LoRA:rank=2', 'Full', 'Frozen'])
@pytest.mark.parametrize('kind', ['plain', 'deeper', 'prefix', 'swin'])
def test_weights_that_do_not_match_are_refused(tmp_path, method, kind, image):
    """Through init_cfg, with the keys that missed and what helps."""
    state, way_out = timm_style(), '--to mmpretrain-vit'
    if kind == 'deeper':
        state = dict(model=state)
    elif kind == 'prefix':
        state = {f'backbone.{k}': v for k, v in mm_vit().state_dict().items()}
        way_out = "prefix='backbone.'"
    elif kind == 'swin':
        state = mm_swin('mmpretrain').state_dict()
        way_out = 'a Swin, and the model is a ViT'
    torch.save(state, tmp_path / 'base.pth')
    model = classifier(tmp_path / 'base.pth', method)
    with pytest.raises(PEFTError) as error:
        model.extract_feat(image)
    assert way_out in str(error.value)
    # What the model lacks, and what the file has instead.
    assert "such as 'cls_token'" in str(error.value) or "such as 'p" in str(
        error.value) or "such as 'layers.0." in str(error.value)
    assert str(error.value).count('such as') == 2


def test_converted_weights_are_taken(tmp_path, image):
    state, _ = convert(timm_style(), 'mmpretrain-vit')
    torch.save(dict(state_dict=state), tmp_path / 'base.pth')
    model = classifier(tmp_path / 'base.pth')
    model.extract_feat(image)
    assert torch.equal(model.backbone.layers[1].attn.qkv.weight,
                       state['layers.1.attn.qkv.weight'])
    with pytest.raises(PEFTError, match="begins with 'backbone.'"):
        classifier(tmp_path / 'base.pth', prefix='backbone.')
    # From nothing, where no weights are given: that is Full's own business.
    model.backbone.peft.base_checked = False
    model.backbone.peft.loaded.clear()
    with pytest.raises(PEFTError, match='adapters on random weights'):
        model.extract_feat(image)
