"""Parameters of real sizes, counted on built models and from formulas."""
import importlib

import pytest
import torch.nn as nn

from mmpeft.counting import count_params
from mmpeft.injection import PEFTBackbone

DEPTHS = (2, 2, 18, 2)
WIDTHS = dict(b=(128, 256, 512, 1024), l=(192, 384, 768, 1536))
HEADS = dict(b=(4, 8, 16, 32), l=(6, 12, 24, 48))
MODULES = dict(
    mmdet='mmdet.models.backbones.swin',
    mmseg='mmseg.models.backbones.swin',
    mmpretrain='mmpretrain.models.backbones.swin_transformer')


@pytest.fixture(autouse=True)
def no_init(monkeypatch):
    """Memory that nobody writes to is never mapped: Swin-L builds at once."""
    for name in ('kaiming_uniform_', 'uniform_', 'trunc_normal_', 'zeros_',
                 'ones_', 'constant_'):
        monkeypatch.setattr(nn.init, name, lambda tensor, *a, **k: tensor)


def build(size, method, library='mmdet', out_indices=(0, 1, 2, 3), freeze=()):
    pytest.importorskip(library)
    stock = importlib.import_module(MODULES[library]).SwinTransformer
    if library == 'mmpretrain':
        kwargs = dict(arch=dict(b='base', l='large')[size])
    else:
        kwargs = dict(
            embed_dims=WIDTHS[size][0], depths=DEPTHS, num_heads=HEADS[size])
    return PEFTBackbone(
        stock, method, freeze=freeze, out_indices=out_indices, **kwargs)


def over_blocks(size, count):
    """Sum of ``count(width, heads)`` over all blocks."""
    return sum(n * count(d, h)
               for n, d, h in zip(DEPTHS, WIDTHS[size], HEADS[size]))


def norm_widths(size, outs=(0, 1, 2, 3)):
    """Widths of all LayerNorms outside the blocks: stem, merging, outputs."""
    widths = WIDTHS[size]
    return [widths[0]] + [4 * d
                          for d in widths[:3]] + [widths[i] for i in outs]


# The closed forms: d width, h heads, m = r = 64.
BLOCK = dict(
    # qkv, proj, fc1, fc2 with biases, two norms, 169 relative positions.
    full=lambda d, h: 12 * d**2 + 13 * d + 169 * h,
    bitfit=lambda d, h: 11 * d + 169 * h,
    ln_tune=lambda d, h: 4 * d,
    adapter=lambda d, h: 2 * (2 * d * 64 + 64 + d),
    pfeiffer=lambda d, h: 2 * d * 64 + 64 + d,
    adaptformer=lambda d, h: 2 * d * 64 + 64 + d,
    lora=lambda d, h: 2 * 2 * 64 * d,
    # Two projections, norm, two gains; 3x3, 5x5, 7x7, three biases, 1x1.
    mona=lambda d, h: 2 * (2 * d * 64 + 64 + 5 * d +
                           (9 + 25 + 49 + 3) * 64 + 64**2 + 64),
)


def closed_form(size, name, outs=(0, 1, 2, 3)):
    if name == 'frozen':
        return 0
    if name == 'partial':
        return BLOCK['full'](WIDTHS[size][-1], HEADS[size][-1])
    count = over_blocks(size, BLOCK[name])
    width, norms = WIDTHS[size][0], sum(norm_widths(size, outs))
    if name == 'full':
        merging = sum(4 * d * 2 * d for d in WIDTHS[size][:3])
        count += 3 * 16 * width + width + merging + 2 * norms
    elif name == 'bitfit':
        count += width + norms
    elif name == 'ln_tune':
        count += 2 * norms
    return count


# method, name of the closed form, Swin-B, Swin-L; the numbers are those that
# the released classes have, see tests/data/README.md.
ROWS = [
    ('Full', 'full', 86_745_016, 194_998_164),
    ('Frozen', 'frozen', 0, 0),
    ('Partial', 'partial', 12_601_632, 28_339_632),
    ('BitFit', 'bitfit', 201_656, 302_484),
    ('LNTune', 'ln_tune', 59_392, 89_088),
    ('Adapter', 'adapter', 3_107_328, 4_659_456),
    ('Adapter:placement=pfeiffer', 'pfeiffer', 1_553_664, 2_329_728),
    ('AdaptFormer', 'adaptformer', 1_553_664, 2_329_728),
    ('LoRA', 'lora', 3_080_192, 4_620_288),
    ('Mona', 'mona', 3_667_456, 5_267_712),
]
ATTACHED = ('adapter', 'pfeiffer', 'adaptformer', 'lora', 'mona')


@pytest.mark.parametrize('method,name,base,large', ROWS)
@pytest.mark.parametrize('size', 'bl')
def test_every_method(method, name, base, large, size):
    counts = count_params(build(size, method))
    trainable = dict(b=base, l=large)[size]
    assert counts['backbone_trainable'] == trainable == closed_form(size, name)
    assert counts['backbone_total'] == closed_form(size, 'full')
    assert counts['backbone_added'] == trainable * (name in ATTACHED)
    assert sum(counts['by_stage'].values()) == trainable


@pytest.mark.parametrize('library', ['mmseg', 'mmpretrain'])
@pytest.mark.parametrize('method,name', [r[:2] for r in ROWS])
def test_other_libraries(library, method, name):
    counts = count_params(build('b', method, library))
    assert counts['backbone_trainable'] == closed_form('b', name)
    assert counts['backbone_total'] == closed_form('b', 'full')


@pytest.mark.parametrize('method,name,trainable', [
    ('Full', 'full', 194_987_988),
    ('Partial', 'partial', 28_339_632),
    ('BitFit', 'bitfit', 301_908),
    ('LNTune', 'ln_tune', 88_320),
    ('Adapter', 'adapter', 4_659_456),
    ('AdaptFormer', 'adaptformer', 2_329_728),
    ('LoRA', 'lora', 4_620_288),
    ('Mona', 'mona', 5_267_712),
])
def test_voc_recipe(method, name, trainable):
    """Three outputs and a frozen stem."""
    counts = count_params(
        build('l', method, out_indices=(1, 2, 3), freeze=('patch_embed', )))
    # Of the stem: a 4x4 convolution of 3 channels, its bias and a norm.
    stem = dict(full=48 * 192 + 3 * 192, bitfit=2 * 192, ln_tune=2 * 192)
    expected = closed_form('l', name, (1, 2, 3)) - stem.get(name, 0)
    assert counts['backbone_trainable'] == trainable == expected
    assert counts['backbone_total'] == closed_form('l', 'full', (1, 2, 3))


@pytest.mark.parametrize('method,trainable', [
    ('BitFit:rel_pos_tables=False', 201_656 - 63_544),
    ('Adapter:dim=8,placement=pfeiffer', 12_032 * 17 + 24 * 8),
    ('LoRA:rank=8', 385_024),
    ('LoRA:rank=8,targets=[q,k,v,proj,fc1,fc2]', 18 * 8 * 12_032),
    ('Partial:final_norm=True', 12_601_632 + 2_048),
    ('LoRA+LNTune', 3_080_192 + 59_392),
])
def test_other_settings(method, trainable):
    assert count_params(build('b', method))['backbone_trainable'] == trainable


def test_full_in_millions():
    """As published: 86.75, 0.20, 0.06, 12.60 and 3.11 M in Swin-B."""
    published = dict(
        full=86.75, bitfit=.20, ln_tune=.06, partial=12.60, adapter=3.11)
    for name, millions in published.items():
        assert round(closed_form('b', name) / 1e6, 2) == millions
