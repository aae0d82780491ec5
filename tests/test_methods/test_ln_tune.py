import pytest
import torch
import torch.nn as nn

from mmpeft.errors import PEFTError
from .checks import check_released_backbone
from .swins import LIBRARIES, swin, trained

FOUR = dict(embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


@pytest.mark.parametrize('library', LIBRARIES)
def test_what_trains(library):
    backbone = swin(library, 'LNTune', **FOUR)
    expected = {
        f'{path}.{leaf}'
        for path, module in backbone.named_modules()
        if isinstance(module, nn.LayerNorm) for leaf in ('weight', 'bias')
    }
    assert set(trained(backbone)) == expected
    # Two in each block, three merging norms, the stem's and four outputs'.
    assert len(expected) == 2 * (8 * 2 + 3 + 1 + 4)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_released_backbone(library, dtype):
    """Also the same parameters: the recorded names are what trains there."""
    check_released_backbone('released_norm_tuning_swin', library, 'LNTune',
                            dtype, **FOUR)


def test_norms_of_attached_modules_are_counted_once():
    """Mona has norms of its own; they train, whoever selects."""
    backbone = swin('mmdet', ['LNTune', dict(type='Mona', dim=4)])
    mona = swin('mmdet', dict(type='Mona', dim=4))
    norms = swin('mmdet', 'LNTune')
    assert set(trained(backbone)) == set(trained(mona)) | set(trained(norms))


def test_layers():
    backbone = swin('mmdet', dict(type='LNTune', layers=[0]), **FOUR)
    assert sorted(trained(backbone)) == [
        f'stages.0.blocks.0.norm{i}.{leaf}' for i in (1, 2)
        for leaf in ('bias', 'weight')
    ]


@pytest.mark.parametrize('kwargs,message', [
    (dict(norm=True), "no argument 'norm'"),
    (dict(layers='stage:7'), 'matches no block'),
    (dict(layers='('), 'not a regular expression'),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='LNTune', **kwargs))
