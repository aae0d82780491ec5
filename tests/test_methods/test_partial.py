import pytest
import torch

from mmpeft.errors import PEFTError
from .checks import check_released_backbone
from .recorded import tensor
from .swins import LIBRARIES, swin, trained

FOUR = dict(embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


def below(backbone, *roots):
    return {
        name
        for name, _ in backbone.named_parameters() if any(
            name.startswith(f'{root}.') for root in roots)
    }


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('kwargs,roots', [
    (dict(), ['stages.3.blocks.1']),
    (dict(num_blocks=3),
     ['stages.2.blocks.1', 'stages.3.blocks.0', 'stages.3.blocks.1']),
    (dict(num_blocks=1, final_norm=True), ['stages.3.blocks.1', 'norm3']),
    (dict(num_stages=1), ['stages.3']),
    (dict(num_stages=2, final_norm=True), ['stages.2', 'stages.3', 'norm3']),
    (dict(num_stages=4), ['stages']),
    (dict(num_blocks=1, layers='stage:2'), ['stages.2.blocks.1']),
])
def test_what_trains(library, kwargs, roots):
    backbone = swin(library, dict(type='Partial', **kwargs), **FOUR)
    assert set(trained(backbone)) == below(backbone, *roots)


def test_block_1_does_not_mean_blocks_10_and_up():
    """The released code matches the substring ``layers.3.blocks.1``."""
    backbone = swin(
        'mmdet', 'Partial', embed_dims=8, depths=(1, 12), num_heads=(1, 2))
    assert set(trained(backbone)) == below(backbone, 'stages.1.blocks.11')
    backbone = swin(
        'mmdet',
        dict(type='Partial', layers=r'stages\.1\.blocks\.1'),
        embed_dims=8,
        depths=(1, 12),
        num_heads=(1, 2))
    assert set(trained(backbone)) == below(backbone, 'stages.1.blocks.1')


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_released_backbone(library, dtype):
    """Also the same parameters: the recorded names are what trains there."""
    check_released_backbone('released_partial_1_swin', library, 'Partial',
                            dtype, **FOUR)


def test_blocks_before_run_without_autograd():
    backbone = swin('mmdet', 'Partial', **FOUR)
    backbone.train()
    outs = backbone(tensor('image', 1, 3, 36, 28, dtype=torch.float32))
    assert [out.requires_grad for out in outs] == [False] * 3 + [True]


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_blocks=0), 'num_blocks=0 must be .* 1 to 4'),
    (dict(num_blocks=5), 'num_blocks=5 must be .* 1 to 4'),
    (dict(num_blocks=1.), 'num_blocks=1.0 must be .* 1 to 4'),
    (dict(num_stages=3), 'num_stages=3 must be .* 1 to 2'),
    (dict(num_stages=True), 'num_stages=True must be .* 1 to 2'),
    (dict(blocks=1), "no argument 'blocks'.*did you mean 'num_blocks'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='Partial', **kwargs))
