"""What networks are held to whose maps take the place of a ViT's outputs."""
import copy
from typing import Any, Callable

import pytest
import torch
import torch.nn as nn
from conftest import peft_cfg, perturb
from mmengine.registry import MODELS

import mmpeft
from mmpeft.errors import PEFTError, SiteError
from mmpeft.injection import inject
from .swins import trained

#: Kinds of backbone that are pyramids themselves, and what they need.
PYRAMIDS = dict(
    mmdet=('mmdet', ),
    swin_v2=(),
    timm_swin=('mmseg', 'timm'),
    mit=('mmseg', ))


def check_moved_statistics(vit: Callable[[], nn.Module], path: str) -> None:
    """Those of BatchNorm are in the delta."""
    backbone = perturb(vit()).train()
    state = copy.deepcopy(backbone.state_dict())
    loss = sum(o.square().mean() for o in backbone(torch.randn(2, 3, 48, 48)))
    loss.backward()
    torch.optim.SGD(trained(backbone).values(), lr=.1).step()
    header = mmpeft.save_delta(backbone, path)
    assert any(n.endswith('running_var') for n in header.tensors)
    image, fresh = torch.randn(1, 3, 48, 48), vit()
    fresh.load_state_dict(state)
    mmpeft.load_delta(fresh, path)
    assert all(map(torch.equal, backbone.eval()(image), fresh.eval()(image)))


def check_an_error_leaves_nothing(backbone: nn.Module) -> None:
    """A forward that fails, and the one after it, end with no state."""
    backbone.eval()
    stream, image = backbone.peft.stream, torch.randn(1, 3, 48, 48)
    handle = backbone.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backbone(image)
    assert stream.image is None and not stream.states
    handle.remove()
    backbone(image)
    assert stream.image is None and not stream.states


def check_refused(kind: str, method: dict) -> None:
    """Beside a backbone with stages."""
    for package in PYRAMIDS[kind]:
        pytest.importorskip(package)
    with pytest.raises(
            SiteError,
            match=f'{method["type"]} cannot run beside .* has stages'):
        MODELS.build(peft_cfg(kind, method))


def check_parts_of_a_forward(method: dict, expected: Any,
                             size_of: Callable) -> None:
    """The image is asked for where blocks run without the whole forward.

    Args:
        method (dict): What is attached.
        expected (list): Of each map, what ``size_of`` gives.
        size_of (Callable): Of the shape of a map.
    """
    pytest.importorskip('timm')
    import timm
    model = timm.create_model(
        'vit_tiny_patch16_224', embed_dim=16, depth=4, num_heads=2)
    inject(model, method, allow_random_base=True)
    image = torch.randn(1, 3, 224, 224)
    assert [size_of(o.shape) for o in model(image)] == expected
    message = f'{method["type"]} reads the image .* call the'
    with pytest.raises(PEFTError, match=message):
        model.forward_features(image)
