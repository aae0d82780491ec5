import pytest
import torch

from mmpeft.errors import PEFTError
from .recorded import fill, tensor
from .swins import LIBRARIES, swin, trained


@pytest.mark.parametrize('library', LIBRARIES)
def test_full_equals_stock_bit_for_bit(library):
    ours, stock = swin(library, 'Full'), swin(library)
    image = tensor('image', 2, 3, 36, 28, dtype=torch.float32)
    for model in (ours, stock):
        fill(model)
        model.train()
        sum(out.square().mean() for out in model(image)).backward()
    assert list(ours.state_dict()) == list(stock.state_dict())
    for (name, mine), (_, theirs) in zip(ours.named_parameters(),
                                         stock.named_parameters()):
        assert mine.requires_grad
        assert torch.equal(mine.grad, theirs.grad), name


@pytest.mark.parametrize('library', LIBRARIES)
def test_full_with_drop_path_draws_as_stock(library):
    image = tensor('image', 4, 3, 36, 28, dtype=torch.float32)
    outs = []
    for method in ('Full', None):
        model = swin(library, method, drop_path_rate=.5)
        fill(model)
        model.train()
        torch.manual_seed(0)
        outs.append(model(image))
    for mine, theirs in zip(*outs):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize('library', LIBRARIES)
def test_full_with_parts_that_stay_frozen(library):
    backbone = swin(library, 'Full', freeze=('patch_embed', 'stages.0.blocks'))
    left = set(dict(backbone.named_parameters())) - set(trained(backbone))
    assert left == {
        name
        for name, _ in backbone.named_parameters()
        if name.startswith(('patch_embed.', 'stages.0.blocks.'))
    }


@pytest.mark.parametrize('library', LIBRARIES)
def test_frozen_trains_nothing(library):
    backbone = swin(library, 'Frozen')
    assert trained(backbone) == {}
    backbone.train()
    outs = backbone(tensor('image', 1, 3, 36, 28, dtype=torch.float32))
    assert not any(out.requires_grad for out in outs)


def test_frozen_leaves_drop_path_active():
    image = tensor('image', 4, 3, 36, 28, dtype=torch.float32)
    backbone = swin('mmdet', 'Frozen', drop_path_rate=.5)
    fill(backbone)
    backbone.train()
    assert not torch.equal(backbone(image)[1], backbone(image)[1])


@pytest.mark.parametrize('method', ['Full', 'Frozen'])
@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=4), "no argument 'dim'"),
    (dict(overrides={'0': {}}), 'nothing to override'),
])
def test_arguments(method, kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type=method, **kwargs))
