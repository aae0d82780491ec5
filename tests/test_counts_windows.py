"""Parameters of Swin V2 and ViTSAM, counted on built models and from
formulas."""
import pytest
from test_counts import BLOCK, no_init, over_blocks  # noqa: F401

from mmpeft.counting import count_params
from mmpeft.injection import PEFTBackbone

pytest.importorskip('mmpretrain')


def sam_b(name):
    d, neck = 768, 256
    # Rows and columns of the windows of 14, and in four blocks of the map.
    places = 8 * 2 * 27 * 64 + 4 * 2 * 127 * 64
    outside = dict(
        # The stem, positions of 64 x 64, two convolutions and two norms.
        full=3 * 16**2 * d + d + 64**2 * d + d * neck + 9 * neck**2 +
        4 * neck + places,
        bitfit=d + 2 * neck,
        ln_tune=4 * neck,
        ssf=2 * (d + neck))
    return 12 * BLOCK[name](d, 0) + outside.get(name, 0)


@pytest.mark.parametrize('method,name,trainable', [
    ('Full', 'full', 89_670_912),
    ('BitFit', 'bitfit', 102_656),
    ('LNTune', 'ln_tune', 37_888),
    ('LoRA', 'lora', 2_359_296),
    ('Mona', 'mona', 2_684_928),
    ('SSF', 'ssf', 204_800),
    ('VPTDeep:num_tokens=50', 'vpt_deep', 460_800),
])
def test_sam_b(method, name, trainable):
    """The released encoder at 1024 pixels has 89.67 M."""
    from mmpretrain.models.backbones import ViTSAM
    counts = count_params(
        PEFTBackbone(ViTSAM, method, arch='base', img_size=1024))
    assert counts['backbone_trainable'] == trainable == sam_b(name)
    assert counts['backbone_total'] == 89_670_912


def swin_v2_b(name):
    if name == 'frozen':
        return 0
    block = dict(
        BLOCK,
        # No bias of the keys; 512 hidden units for the relative position
        # (a bias in, none out), a scale for each head.
        full=lambda d, h: 12 * d**2 + 12 * d + 3 * 512 + 512 * h + h,
        bitfit=lambda d, h: 10 * d + 512)[name]
    d = 128
    # Norms of the stem, behind each patch merging and of the output.
    norms = d + 2 * d + 4 * d + 8 * d + 8 * d
    return over_blocks('b', block) + dict(
        full=48 * d + d + (1 + 4 + 16) * 8 * d**2 + 2 * norms,
        bitfit=d + norms,
        ln_tune=2 * norms,
        ssf=2 * d + 2 * norms).get(name, 0)


@pytest.mark.parametrize('method,name,trainable', [
    ('Full', 'full', 86_893_816),
    ('Frozen', 'frozen', 0),
    ('BitFit', 'bitfit', 135_680),
    ('LNTune', 'ln_tune', 54_016),
    ('LoRA', 'lora', 3_080_192),
    ('Mona', 'mona', 3_667_456),
    ('SSF', 'ssf', 270_848),
    ('VPTDeep:num_tokens=50', 'vpt_deep', 601_600),
])
def test_swin_v2_b(method, name, trainable):
    """87.92 M with the 1,025,000 of its classifier."""
    from mmpretrain.models.backbones import SwinTransformerV2
    counts = count_params(PEFTBackbone(SwinTransformerV2, method, arch='base'))
    assert counts['backbone_trainable'] == swin_v2_b(name) == trainable
    assert counts['backbone_total'] == 86_893_816
