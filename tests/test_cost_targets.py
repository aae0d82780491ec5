"""What is kept for backward by Swin-B at 512 x 512, beside full fine-tuning.

Bytes are the same on every machine of one torch; the targets hold for the
default stack (torch 2.1 keeps more in some operations).
"""
import json
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from mmpeft.engine.measure import kept_by_forward

pytestmark = pytest.mark.slow

with open(Path(__file__).parents[1] / 'docs/en/cost/targets.json') as file:
    TARGETS = json.load(file)


def kept(method, memory='fast', with_cp=False):
    pytest.importorskip('mmdet.models')
    torch.manual_seed(0)
    backbone = MODELS.build(
        dict(
            type='mmpeft.PEFTBackbone',
            stock='mmdet.SwinTransformer',
            embed_dims=128,
            depths=[2, 2, 18, 2],
            num_heads=[4, 8, 16, 32],
            window_size=7,
            drop_path_rate=.3,
            patch_norm=True,
            with_cp=with_cp,
            method=method,
            memory=memory,
            allow_random_base=True)).train()
    image = torch.randn(2, 3, 512, 512)
    backbone(image)
    return kept_by_forward(backbone, image).saved


@pytest.fixture(scope='module')
def full():
    return kept('Full')


@pytest.mark.skipif(
    torch.__version__.startswith('2.1.'),
    reason='the targets are for the default stack')
@pytest.mark.parametrize('method', TARGETS)
def test_targets(method, full):
    for setting, target in TARGETS[method].items():
        with_cp = setting == 'with_cp'
        memory = 'lean' if with_cp else setting
        assert kept(method, memory, with_cp) <= target['bytes'] * full, setting
