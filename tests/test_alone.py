"""Each method alone, with neck and head frozen too, on the demo detector."""
import pytest
import torch
from conftest import METHODS, method_of
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmpeft
from mmpeft.backbones.swin import SwinSites
from mmpeft.engine.listing import refusal
from mmpeft.methods.base import Selector

pytest.importorskip('mmdet')

NAMES = [
    n for n in METHODS if n == 'BitFit' or not (
        issubclass(method_of(n), Selector) or refusal(method_of(n), SwinSites))
]
STEPS = 50
FEW = 4


def detector(method):
    """The demo's Mask R-CNN with random weights; only the method trains."""
    cfg = Config.fromfile(
        mmpeft.config_path('full/mask-rcnn_swin-nano_shapes.py'))
    init_default_scope('mmdet')
    cfg.model.backbone.update(
        method=method, init_cfg=None, allow_random_base=True)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if not name.startswith('backbone.'):
            parameter.requires_grad = False
    return model.train()


def batch_of(model):
    from mmdet.testing import demo_mm_inputs
    batch = demo_mm_inputs(
        2, [[3, 64, 64]] * 2, num_classes=5, num_items=[4, 4], with_mask=True)
    return model.data_preprocessor(batch, True)


def train(model, steps):
    """Losses of steps on one batch."""
    batch = batch_of(model)
    mmpeft.calibrate(
        model, [batch], lambda model, batch: model.parse_losses(
            model(**batch, mode='loss'))[0])
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-3, weight_decay=0)
    losses = []
    for step in range(steps):
        # Another draw each time: drop-path leaves modules out of a step.
        torch.manual_seed(step)
        loss, _ = model.parse_losses(model(**batch, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    still = [n for n, p in own.items() if torch.equal(p, before[n])]
    return losses, still


@pytest.mark.parametrize('name', NAMES)
def test_a_few_steps_move_every_tensor(name):
    losses, still = train(detector(METHODS[name]), FEW)
    assert still == []
    assert all(loss == loss for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_fifty_steps_lower_the_loss(name):
    losses, still = train(detector(METHODS[name]), STEPS)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f'{name}: {first:.3f} -> {last:.3f}')
    assert last < first and still == []
