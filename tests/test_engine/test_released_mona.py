"""The baseline is what the released module computed."""
import pytest
import torch
from conftest import stock_cfg
from mmengine.config import Config

from mmpeft.engine.measure import kept_by_forward
from mmpeft.engine.module_cost import compare
from mmpeft.engine.released_mona import ReleasedMona
from mmpeft.engine.settings import Settings
from mmpeft.errors import PEFTError
from mmpeft.methods import Mona
from mmpeft.sites import Site

pytest.importorskip('mmdet')

from test_methods.checks import check_released_module  # noqa: E402


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_it_computes_what_was_recorded(dtype):
    check_released_module('released_mona', ReleasedMona(64, 64, 0.),
                          lambda m, y: m(y, (3, 5)), (2, 15, 64), dtype)


def test_its_parameters_are_ours():
    ours = Mona(Site('attn_residual', 24, 24), dim=8)
    theirs = ReleasedMona(24, 8)
    assert {
        n: p.shape
        for n, p in ours.named_parameters()
    } == {
        n: p.shape
        for n, p in theirs.named_parameters()
    }
    assert (theirs.gamma == 1e-6).all() and (theirs.gammax == 1).all()


def test_it_keeps_what_the_formula_makes_autograd_keep():
    """By hand, in maps of the full width and of the bottleneck."""
    batch, side, width, dim = 2, 5, 16, 4
    module = ReleasedMona(width, dim, drop_rate=0.).eval()
    y = torch.randn(batch, side**2, width, requires_grad=True)
    module(y, (side, side))
    tokens = batch * side**2
    full, narrow, statistic = (4 * tokens * n for n in (width, dim, 1))
    # Norm and u; inputs of the depthwise convolutions, of the pointwise one,
    # of GELU and of W2; y itself was there before.
    expected = 2 * full + 4 * narrow + 2 * statistic
    assert kept_by_forward(module, y, (side, side)).saved == expected


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=dict(type='RetinaNet', backbone=stock_cfg('mmdet'))))
    path.write_text(cfg.pretty_text)
    return str(path)


def test_ours_against_it(config):
    settings = Settings(2, (60, 44), 2)
    first, second, total = compare(config, ['Mona:dim=4'], settings)
    assert (first['width'], first['hw_shape']) == (16, [15, 11])
    assert (second['width'], second['hw_shape']) == (32, [8, 6])
    assert first['modules'] == second['modules'] == 4
    for row in (first, second, total):
        assert row['parameters'] == row['released_parameters']
        assert row['output_difference'] <= 4e-6
        assert row['gradient_difference'] <= 1e-5
        assert row[
            'ratio_saved'] == row['saved_bytes'] / row['released_saved_bytes']
        assert row['step_s'] > 0 and row['released_step_s'] > 0
    assert total['modules'] == 8
    assert total['released_saved_bytes'] == 4 * (
        first['released_saved_bytes'] + second['released_saved_bytes'])


@pytest.mark.parametrize(
    'methods',
    (['LoRA:rank=4'], ['Mona', 'Mona:dim=4'], ['Mona:dim=4+LNTune']))
def test_of_other_methods_nothing_is_known(config, methods):
    with pytest.raises(PEFTError, match='one method, Mona'):
        compare(config, methods, Settings(2, (60, 44), 0))
