"""Parameters of ViT-B, counted on built models and from formulas."""
import pytest
from test_counts import BLOCK, no_init  # noqa: F401

from mmpeft.counting import count_params
from mmpeft.injection import PEFTBackbone

pytest.importorskip('mmpretrain')

WIDTH, DEPTH = 768, 12


def build(method, **kwargs):
    from mmpretrain.models.backbones import VisionTransformer
    kwargs = {**dict(arch='base', out_type='featmap'), **kwargs}
    return PEFTBackbone(VisionTransformer, method, **kwargs)


def hst(d):
    """A token and two norms for each block; the pyramid."""
    widths = (32, 48, 64, 72)
    # Convolutions without and with bias around a norm, and a norm.
    count = 12 * (d + 4 * d) + 27 * 32 + 64 + 4 * 32**2 + 32 + 64
    for before, w in zip((None, *widths), widths):
        if before:
            count += 9 * before * w + 3 * w
        # Three blocks with a norm for their token; into the level; its norm.
        count += 3 * (12 * w**2 + 13 * w + 2 * w) + (d + 1) * w + 2 * w
    return count


def vit_adapter(d):
    """Convolutions, embeddings of levels, four injectors, six extractors, a
    transposed convolution and the norms of the maps."""
    n, half, quarter = 64, d // 2, d // 4
    # Into 64, 64, 64, 128, 256 and 256 channels, with norms; four out of them.
    prior = 27 * n + 9 * n**2 * (2 + 2 + 8 + 16) + 2 * n * (3 + 2 + 4 + 4)
    prior += 11 * n * d + 4 * d

    def attention(levels):
        """Two norms; values and back; 12 x 4 points of two offsets and a
        weight in each map."""
        return 4 * d + (2 * d + 1) * half + d + 3 * (d + 1) * 12 * 4 * levels

    # A norm, two linear layers and a depthwise convolution.
    ffn = 2 * d + 2 * d * quarter + quarter + d + 10 * quarter
    return (prior + 3 * d + 4 * (attention(3) + d) + 6 * (attention(1) + ffn) +
            4 * d**2 + d + 4 * 2 * d)


def closed_form(name):
    d = WIDTH
    if name == 'frozen':
        return 0
    if name == 'partial':
        return BLOCK['full'](d, 0)
    if name == 'hst':
        return hst(d)
    if name == 'vit_adapter':
        return vit_adapter(d)
    if name in ('dtl', 'dtl_plus'):
        return DEPTH * 2 * 2 * d + (5**2 * d if name == 'dtl_plus' else 0)
    return DEPTH * BLOCK[name](d, 0) + dict(
        # Stem with bias, class token, 14 x 14 positions and its, final norm.
        full=3 * 16**2 * d + d + d + 197 * d + 2 * d,
        bitfit=2 * d,
        ln_tune=2 * d,
        vpt_shallow=100 * d,
        fact_tt=2 * 16 * d,
        fact_tk=2 * 32 * d + 32**3,
        rein=2 * (d**2 + d) + 1,
        ssf=2 * 2 * d,
        e3va=2 * d,
        gps=2 * d,
        # Into the ladder, and out of it.
        lst=(d + 1) * d // 8 + (d // 8 + 1) * d,
    ).get(name, 0)


# method, name of the closed form, trainable parameters, the same in millions
# as in the table of facts that the methods are built from. E3VA's there is
# without the final norm, which trains.
ROWS = [
    ('Full', 'full', 85_798_656, '85.799'),
    ('Frozen', 'frozen', 0, '0.000'),
    ('Partial', 'partial', 7_087_872, '7.088'),
    ('BitFit', 'bitfit', 102_912, '0.103'),
    ('LNTune', 'ln_tune', 38_400, '0.038'),
    ('Adapter', 'adapter', 2_379_264, '2.379'),
    ('Adapter:placement=pfeiffer', 'pfeiffer', 1_189_632, '1.190'),
    ('AdaptFormer', 'adaptformer', 1_189_632, '1.190'),
    ('LoRA', 'lora', 2_359_296, '2.359'),
    ('Mona', 'mona', 2_684_928, '2.685'),
    ('VPTShallow:num_tokens=100', 'vpt_shallow', 76_800, '0.077'),
    ('VPTDeep:num_tokens=50', 'vpt_deep', 460_800, '0.461'),
    ('PrefixTuning:num_tokens=20', 'prefix', 368_640, '0.369'),
    ('DoRA:rank=64', 'dora', 2_377_728, '2.378'),
    ('VeRA:rank=256', 'vera', 24_576, '0.025'),
    ('IA3', 'ia3', 55_296, '0.055'),
    ('AdaLoRA:rank=8', 'ada_lora', 295_104, '0.295'),
    ('FacTTT:rank=16', 'fact_tt', 61_440, '0.061'),
    ('FacTTK:rank=32', 'fact_tk', 86_528, '0.087'),
    ('Hydra:rank=2', 'hydra', 239_712, '0.240'),
    ('RepAdapter:dim=8', 'rep_adapter', 239_808, '0.240'),
    ('SSF', 'ssf', 205_824, '0.206'),
    ('SNF:num_flows=5', 'snf', 221_304, '0.221'),
    ('BAPAT', 'bapat', 4_748_544, '4.749'),
    ('LoRand', 'lorand', 915_456, '0.915'),
    ('Convpass:dim=8', 'convpass', 327_552, '0.328'),
    ('AdapterPlus:dim=8', 'adapter_plus', 165_984, '0.166'),
    # The table's 1.742 have the link to queries of a head, which is left out.
    ('Rein', 'rein', 1_347_841, '1.348'),
    ('E3VA', 'e3va', 916_992, '0.917'),
    ('LST', 'lst', 2_376_300, '2.376'),
    ('LAST:rank=16', 'last', 589_824, '0.590'),
    ('SCT', 'sct', 111_744, '0.112'),
    ('GPS', 'gps', 167_424, '0.167'),
    ('DTL:rank=2', 'dtl', 36_864, '0.037'),
    ('DTLPlus:rank=2', 'dtl_plus', 56_064, '0.056'),
    ('HST', 'hst', 764_840, '0.765'),
    ('ViTAdapter', 'vit_adapter', 13_680_608, '13.681'),
    ('NOAH:num_tokens=10,rank=10,dim=10', 'noah', 654_456, '0.654'),
]


@pytest.mark.parametrize('method,name,trainable,millions', ROWS)
def test_every_method(method, name, trainable, millions):
    counts = count_params(build(method))
    assert counts['backbone_trainable'] == trainable == closed_form(name)
    assert f'{trainable / 1e6:.3f}' == millions
    assert counts['backbone_total'] == closed_form('full')
    assert sum(counts['by_stage'].values()) == trainable


@pytest.mark.parametrize('method,name', [r[:2] for r in ROWS])
def test_mmseg(method, name):
    """The same, though its attention packs its weights."""
    pytest.importorskip('mmseg')
    from mmseg.models.backbones import VisionTransformer
    peft = PEFTBackbone(
        VisionTransformer, method, patch_bias=True, final_norm=True)
    counts = count_params(peft)
    assert counts['backbone_trainable'] == closed_form(name)
    assert counts['backbone_total'] == closed_form('full')


@pytest.mark.parametrize('method,trainable', [
    ('Adapter:dim=8,placement=pfeiffer', 156_768),
    ('LoRA:rank=8', 294_912),
    ('LoRA:rank=8,targets=[q,k,v,proj,fc1,fc2]', 18 * 8 * 9_216),
    ('Partial:final_norm=True', 7_087_872 + 1_536),
])
def test_other_settings(method, trainable):
    assert count_params(build(method))['backbone_trainable'] == trainable


def test_outputs_of_many_blocks():
    """As UPerNet takes them: the ladder has one way out for all."""
    for method, trainable in (('LST', 2_376_300), ('Mona', 2_684_928)):
        peft = build(method, out_indices=(3, 5, 7, 11))
        assert count_params(peft)['backbone_trainable'] == trainable


def test_class_token_head():
    """The grid of the last block reaches no output."""
    counts = count_params(build('Mona', out_type='cls_token'))
    assert counts['backbone_trainable'] == 2_684_928 * 11 // 12
    counts = count_params(build('Convpass:dim=8', out_type='cls_token'))
    assert counts['backbone_trainable'] == 327_552
