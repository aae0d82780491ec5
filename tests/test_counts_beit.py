"""Parameters of BEiT-B and EVA-02-B, from those of ViT-B."""
import pytest
from test_counts import no_init  # noqa: F401
from test_counts_vit import DEPTH, ROWS, WIDTH, closed_form

from mmpeft.counting import count_params
from mmpeft.errors import PEFTError
from mmpeft.injection import PEFTBackbone

pytest.importorskip('mmpretrain')


def beit(name):
    """No bias of the keys, but two gammas and a table for 14 x 14 positions
    and 12 heads, and no absolute positions."""
    d, table = WIDTH, ((2 * 14 - 1)**2 + 3) * 12
    # GPS trains what has "bias" in its name, tables included.
    block = dict(
        full=d + table, partial=d + table, bitfit=table - d, gps=table - d)
    extra = block.get(name, 0) * (1 if name == 'partial' else DEPTH)
    return closed_form(name) + extra - (197 * d if name == 'full' else 0)


@pytest.mark.parametrize('method,name', [r[:2] for r in ROWS])
def test_beit(method, name):
    from mmpretrain.models.backbones import BEiTViT
    peft = PEFTBackbone(BEiTViT, method, out_type='featmap', final_norm=True)
    counts = count_params(peft)
    assert counts['backbone_trainable'] == beit(name)
    assert counts['backbone_total'] == beit('full')


@pytest.mark.parametrize('method,name', [r[:2] for r in ROWS[:10]])
def test_beit_of_mmseg(method, name):
    pytest.importorskip('mmseg')
    from mmseg.models.backbones import MAE, BEiT
    counts = count_params(PEFTBackbone(BEiT, method, final_norm=True))
    assert counts['backbone_trainable'] == beit(name)
    assert counts['backbone_total'] == beit('full')
    if method in ('LoRA', 'Mona'):
        counts = count_params(PEFTBackbone(MAE, method, final_norm=True))
        assert counts['backbone_trainable'] == closed_form(name)
        # The bias of the keys and positions of ViT as well.
        d = WIDTH
        assert counts['backbone_total'] == beit('full') + DEPTH * d + 197 * d


def eva02(name):
    """A gate of 2048 beside the hidden units, which are as many, and in base
    a norm of those; the two layers have 6144 + 768 outputs and 768 + 2048
    inputs, where those of ViT have 3072 + 768 and 768 + 3072."""
    d, hidden = WIDTH, 2048
    mlp = (d + 1) * 2 * hidden + (hidden + 1) * d + 2 * hidden
    block = dict(
        full=mlp - 8 * d**2 - 5 * d,
        partial=mlp - 8 * d**2 - 5 * d,
        bitfit=2 * hidden + hidden - 4 * d,
        ln_tune=2 * hidden,
        ia3=hidden - 4 * d,
        # The ladder's hidden units, of an eighth of the width.
        lst=(2 * d // 8 + 1) * (hidden - 4 * d) // 8,
        # A parallel map from the hidden units to the width.
        hydra=2 * (hidden - 4 * d),
        ssf=2 * (2 * hidden - 4 * d),
        # A weight and a bias of each output.
        gps=2 * (2 * hidden - 4 * d),
    )
    return closed_form(name) + block.get(name,
                                         0) * (1 if name == 'partial' else 12)


@pytest.mark.parametrize('method,name', [r[:2] for r in ROWS])
def test_eva02(method, name):
    from mmpretrain.models.backbones import ViTEVA02

    def build():
        return PEFTBackbone(
            ViTEVA02, method, arch='base', sub_ln=True, out_type='featmap')

    if name.startswith('fact'):
        # 4096 and 2048 are no multiples of 768.
        with pytest.raises(PEFTError, match='FacT'):
            build()
        return
    counts = count_params(build())
    assert counts['backbone_trainable'] == eva02(name)
    assert counts['backbone_total'] == eva02('full')
