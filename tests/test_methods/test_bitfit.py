import pytest
import torch
import torch.nn as nn

from mmpeft.errors import PEFTError
from .checks import check_released_backbone
from .swins import LIBRARIES, swin, trained

FOUR = dict(embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
TABLE = 'relative_position_bias_table'


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('tables', [True, False])
def test_what_trains(library, tables):
    backbone = swin(library, dict(type='BitFit', rel_pos_tables=tables),
                    **FOUR)
    # By the modules that own them, not by the names that the method reads.
    expected = set()
    for path, module in backbone.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)):
            if module.bias is not None:
                expected.add(f'{path}.bias')
        if tables and hasattr(module, TABLE):
            expected.add(f'{path}.{TABLE}')
    assert set(trained(backbone)) == expected
    assert len(expected) == 65 - 8 * (not tables)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_released_backbone(library, dtype):
    """Also the same parameters: the recorded names are what trains there."""
    check_released_backbone('released_bitfit_swin', library, 'BitFit', dtype,
                            **FOUR)


@pytest.mark.parametrize('layers,count', [
    ([-1], 7),
    ('stage:1', 14),
    (r'stages\.[02]\.blocks\.1', 14),
])
def test_layers(layers, count):
    backbone = swin('mmdet', dict(type='BitFit', layers=layers), **FOUR)
    assert len(trained(backbone)) == count
    assert all('.blocks.' in name for name in trained(backbone))


@pytest.mark.parametrize('kwargs,message', [
    (dict(rel_pos_table=True), "did you mean 'rel_pos_tables'"),
    (dict(overrides={'stage:0': dict(rel_pos_tables=False)}), 'use `layers`'),
    (dict(layers=99), '99 matches no block'),
    (dict(name='Bit Fit'), 'cannot be part of a parameter key'),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='BitFit', **kwargs))
