"""Folded models, against the same models as they were."""
import copy

import pytest
import torch
from conftest import METHODS, build_pair, perturb
from kinds import KINDS

import mmpeft
from mmpeft.errors import MergeError, PEFTError
from mmpeft.methods import Mona
from mmpeft.methods.folded import Folded
from mmpeft.sites import Site, TokenLayout

# Where blocks differ in what they hand to a method that reads the grid.
FAMILIES = ('mmdet', 'mmpretrain', 'vit', 'vit_sam')


def models(kind, method='Mona:dim=4'):
    pytest.importorskip(KINDS[kind].library)
    _, model = build_pair(kind, method)
    perturb(model)
    model.eval()
    return model


def gap(found, expected):
    return max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected))


@pytest.mark.parametrize('dims,dim,hw,extra', [(12, 4, (3, 5), 0),
                                               (8, 8, (9, 2), 1),
                                               (96, 64, (1, 7), 0),
                                               (128, 64, (14, 14), 3)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_module(dims, dim, hw, extra, dtype):
    """Trained far away from its start, on tokens with an offset."""
    torch.manual_seed(0)
    module = Mona(Site('ffn_residual', dims, dims), dim=dim).eval().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(.3 * torch.randn_like(parameter))
    y = 3 * torch.randn(2, extra + hw[0] * hw[1], dims, dtype=dtype) + 1
    layout = TokenLayout(hw, extra)
    with torch.no_grad():
        found = module.folded()(y, y, layout)
        expected = module.double()(y.double(), y.double(), layout)
    assert found.dtype == dtype
    assert torch.equal(found[:, :extra], y[:, :extra])
    limit = 4e-6 if dtype == torch.float32 else 1e-14
    assert gap([found.double()], [expected]) < limit
    # What it adds, and not only the tokens that pass.
    added, wanted = found.double() - y.double(), expected - y.double()
    assert gap([added[:, extra:]], [wanted[:, extra:]]) < limit


@pytest.mark.parametrize('kind', FAMILIES)
def test_model(kind):
    model = models(kind)
    for size in KINDS[kind].sizes:
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(image)
            folded = mmpeft.fold(copy.deepcopy(model))
            assert gap(folded(image), expected) < 4e-6
            assert gap(copy.deepcopy(folded)(image), expected) < 4e-6
    assert not any(isinstance(m, Mona) for m in folded.modules())
    assert not any('.peft.' in n for n, _ in folded.named_parameters())


def test_beside_others():
    """They stay, and numbers are copies."""
    model = models('mmdet', 'Mona:dim=4+LoRA:rank=2')
    image = torch.randn(1, 3, 60, 44)
    folded = copy.deepcopy(model)
    peft = folded.stages[0].blocks[1].peft
    mona = peft['mona']['attn_residual']
    assert mmpeft.fold(folded) is folded
    with torch.no_grad():
        expected = model(image)
        for parameter in mona.parameters():
            parameter.zero_()
        assert gap(folded(image), expected) < 4e-6
    assert isinstance(peft['mona']['attn_residual'], Folded)
    assert peft['lora']['qkv'].lora_A.requires_grad


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """As near to the exact numbers as the plain module is."""
    torch.manual_seed(0)
    exact = Mona(Site('ffn_residual', 32, 32), dim=16).eval().to(dtype)
    y, layout = torch.randn(1, 35, 32).to(dtype), TokenLayout((7, 5))
    plain = copy.deepcopy(exact)
    try:
        plain(y, y, layout)
    except RuntimeError as error:
        pytest.skip(f'no {dtype} on this CPU: {error}')
    exact.double()
    with torch.no_grad():
        wanted = exact(y.double(), y.double(), layout)
        folded = plain.folded()
        assert folded.kernel.dtype == dtype
        found = folded(y, y, layout).double()
        assert gap([found], [wanted]) < 1.5 * torch.finfo(dtype).eps


def test_no_checkpoint_and_no_training(tmp_path):
    model = models('mmdet')
    state = model.state_dict()
    image = torch.randn(1, 3, 60, 44)
    mmpeft.fold(model)
    expected = model(image)[0]
    file = str(tmp_path / 'x_delta.safetensors')
    for call, match in (
        (model.state_dict, 'folded model has no state dict'),
        (lambda: mmpeft.save_delta(model, file), 'has no state dict'),
        (lambda: model.load_state_dict(state), 'loads no weights'),
        (model.train, 'does not train'),
        (lambda: mmpeft.fold(model), 'nothing to fold'),
    ):
        with pytest.raises(PEFTError, match=match):
            call()
    with pytest.raises(MergeError, match='folded for inference'):
        mmpeft.merge(model)
    model.eval()
    assert torch.equal(model(image)[0], expected)
    assert not list(tmp_path.iterdir())


def test_refusals_change_nothing(tmp_path):
    model = models('mmdet')
    keys = list(model.state_dict())
    model.train()
    with pytest.raises(PEFTError, match='call model.eval'):
        mmpeft.fold(model)
    assert list(model.state_dict()) == keys
    with pytest.raises(PEFTError, match='has LoRA; .*mmpeft.merge'):
        mmpeft.fold(models('mmdet', METHODS['LoRA']))
    file = str(tmp_path / 'x_delta.safetensors')
    mmpeft.save_delta(model, file)
    stock, _ = build_pair('mmdet', 'Frozen')
    stock.eval()  # which returns None, in stock
    with pytest.raises(PEFTError, match='has no method'):
        mmpeft.fold(stock)
    mmpeft.attach(stock, file, 'a')
    with pytest.raises(PEFTError, match='Tasks take turns'):
        mmpeft.fold(stock)
