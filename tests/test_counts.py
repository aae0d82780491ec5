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
    vpt_shallow=lambda d, h: 0,
    vpt_deep=lambda d, h: 50 * d,
    prefix=lambda d, h: 2 * 20 * d,
    dora=lambda d, h: 2 * 2 * 64 * d + 2 * d,
    vera=lambda d, h: 2 * (256 + d),
    ia3=lambda d, h: 2 * d + 4 * d,
    ada_lora=lambda d, h: 2 * (2 * 8 * d + 8),
    fact_tt=lambda d, h: 12 * 16**2,
    fact_tk=lambda d, h: 12 * 32,
    # At proj d -> d, at fc2 4d -> d; parallel and sequential, with biases.
    hydra=lambda d, h: 2 * (4 * d + 7 * d) + 4 * 2 + 4 * d,
    rep_adapter=lambda d, h: 2 * (8 * d + 8 + 8 * d // 2 + d),
    # norm, qkv, proj, norm, fc1, fc2: d, 3d, d, d, 4d, d.
    ssf=lambda d, h: 2 * 11 * d,
    snf=lambda d, h: 2 * (2 * d + 5 * (2 * d + 1)),
    bapat=lambda d, h: 3 * 128 * d + 128 + 2 * d + 2 * d * 64 + 64 + d,
    # Two branches of rank 8, a bottleneck of half the width, shared kernels.
    lorand=lambda d, h: 2 * (2 * 2 * 8 * (d + d // 2) + 2 * 8**2 + d + d // 2),
    convpass=lambda d, h: 2 * (2 * 8 * d + 8 + d + 9 * 8**2 + 8),
    adapter_plus=lambda d, h: 2 * 8 * d + 8 + 2 * d,
    # Tokens as a product.
    rein=lambda d, h: 100 * 16 + 16 * d,
    # A transformer block of width d / 8, what brings its input there, a gate.
    lst=lambda d, h: 12 * (d // 8)**2 + 13 * d // 8 + (d + 1) * d // 8 + 1,
    last=lambda d, h: 4 * 16 * d,
    sct=lambda d, h: 96 * 96 + 96,
    # Of each row of the linear layers one entry and the bias; tables.
    gps=lambda d, h: 2 * 9 * d + 169 * h,
    # Prompts, one A for q, k and v, an adapter.
    noah=lambda d, h: 10 * d + 10 * (d + 3 * d) + 10 * (2 * d + 1) + d,
)
BLOCK['e3va'] = BLOCK['lorand']


def closed_form(size, name, outs=(0, 1, 2, 3)):
    if name == 'frozen':
        return 0
    if name == 'partial':
        return BLOCK['full'](WIDTHS[size][-1], HEADS[size][-1])
    count = over_blocks(size, BLOCK.get(name, lambda d, h: 0))
    width, norms = WIDTHS[size][0], sum(norm_widths(size, outs))
    if name == 'full':
        merging = sum(4 * d * 2 * d for d in WIDTHS[size][:3])
        count += 3 * 16 * width + width + merging + 2 * norms
    elif name == 'bitfit':
        count += width + norms
    elif name == 'ln_tune':
        count += 2 * norms
    elif name == 'vpt_shallow':
        count += 100 * width
    elif name == 'fact_tt':  # two factors for each stage
        count += sum(2 * 16 * d for d in WIDTHS[size])
    elif name == 'fact_tk':
        count += sum(2 * 32 * d + 32**3 for d in WIDTHS[size])
    elif name == 'rein':  # two linear layers and a number for each stage
        count += sum(2 * (d**2 + d) + 1 for d in WIDTHS[size])
    elif name == 'ssf':  # norms, and the projection of the stem
        count += 2 * (width + norms)
    elif name == 'e3va':  # its output norms
        count += 2 * sum(WIDTHS[size][i] for i in outs)
    elif name == 'lst':
        sides = [d // 8 for d in WIDTHS[size]]
        count += (width + 1) * sides[0]  # the stem's
        count += sum(8 * w**2 + 8 * w for w in sides[:3])  # mergings
        count += sum((sides[i] + 1) * WIDTHS[size][i] for i in outs)
    elif name == 'gps':  # the stem, and mergings without a bias
        count += 2 * width + sum(2 * d for d in WIDTHS[size][:3])
    elif name in ('dtl', 'dtl_plus'):  # in the last two stages
        for n, d in list(zip(DEPTHS, WIDTHS[size]))[2:]:
            count += n * 2 * 4 * d + (5**2 * d if name == 'dtl_plus' else 0)
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
    ('VPTShallow:num_tokens=100', 'vpt_shallow', 12_800, 19_200),
    ('VPTDeep:num_tokens=50', 'vpt_deep', 601_600, 902_400),
    ('PrefixTuning:num_tokens=20', 'prefix', 481_280, 721_920),
    ('DoRA:rank=64', 'dora', 3_104_256, 4_656_384),
    ('VeRA:rank=256', 'vera', 36_352, 48_384),
    ('IA3', 'ia3', 72_192, 108_288),
    ('AdaLoRA:rank=8', 'ada_lora', 385_408, 577_920),
    ('FacTTT:rank=16', 'fact_tt', 135_168, 165_888),
    ('FacTTK:rank=32', 'fact_tk', 263_168, 324_608),
    ('Hydra:rank=2', 'hydra', 313_024, 469_440),
    ('RepAdapter:dim=8', 'rep_adapter', 313_216, 469_632),
    ('SSF', 'ssf', 276_224, 414_336),
    ('SNF:num_flows=5', 'snf', 289_008, 433_392),
    ('BAPAT', 'bapat', 6_201_088, 9_299_328),
    ('LoRand', 'lorand', 1_197_312, 1_792_896),
    ('Convpass:dim=8', 'convpass', 437_504, 642_048),
    ('AdapterPlus:dim=8', 'adapter_plus', 216_768, 325_056),
    ('Rein', 'rein', 3_020_036, 6_599_812),
    ('E3VA', 'e3va', 1_201_152, 1_798_656),
    ('LST', 'lst', 2_424_168, 5_436_432),
    ('LAST:rank=16', 'last', 770_048, 1_155_072),
    ('SCT', 'sct', 223_488, 223_488),
    ('GPS', 'gps', 282_168, 423_252),
    ('DTL:rank=4', 'dtl', 90_112, 135_168),
    ('DTLPlus:rank=4', 'dtl_plus', 128_512, 192_768),
    ('NOAH:num_tokens=10,rank=10,dim=10', 'noah', 854_512, 1_281_648),
]
# In millions, as in the table of facts that these methods are built from.
MILLIONS = dict(
    vpt_shallow=('0.013', '0.019'),
    vpt_deep=('0.602', '0.902'),
    prefix=('0.481', '0.722'),
    dora=('3.104', '4.656'),
    vera=('0.036', '0.048'),
    ia3=('0.072', '0.108'),
    ada_lora=('0.385', '0.578'),
    fact_tt=('0.135', '0.166'),
    fact_tk=('0.263', '0.325'),
    hydra=('0.313', '0.469'),
    rep_adapter=('0.313', '0.470'),
    ssf=('0.276', '0.414'),
    snf=('0.289', '0.433'),
    bapat=('6.201', '9.299'),
    lorand=('1.197', '1.793'),
    convpass=('0.438', '0.642'),
    rein=('3.020', '6.600'),
    e3va=('1.201', '1.799'),
    lst=('2.424', '5.436'),
    last=('0.770', '1.155'),
    sct=('0.223', '0.223'),
    gps=('0.282', '0.423'),
    dtl=('0.090', '0.135'),
    dtl_plus=('0.129', '0.193'),
    noah=('0.855', '1.282'),
)


@pytest.mark.parametrize('method,name,base,large', ROWS)
@pytest.mark.parametrize('size', 'bl')
def test_every_method(method, name, base, large, size):
    counts = count_params(build(size, method))
    trainable = dict(b=base, l=large)[size]
    assert counts['backbone_trainable'] == trainable == closed_form(size, name)
    assert counts['backbone_total'] == closed_form(size, 'full')
    norms = counts['backbone_trainable'] - counts['backbone_added']
    attached = name not in ('full', 'frozen', 'partial', 'bitfit', 'ln_tune')
    if name == 'e3va':
        assert norms == 2 * sum(WIDTHS[size])
    elif name == 'gps':  # its biases
        rows = over_blocks(size, lambda d, h: 9 * d)
        entries = rows + WIDTHS[size][0] + 2 * sum(WIDTHS[size][:3])
        assert norms == trainable - entries
    else:
        assert norms == (0 if attached else trainable)
    if name in MILLIONS:
        assert f'{trainable / 1e6:.3f}' == MILLIONS[name]['bl'.index(size)]
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
