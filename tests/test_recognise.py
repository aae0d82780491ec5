"""Which backbones of a config are supported, told without building them."""
import importlib
import json

import pytest
import torch.nn as nn
from commands import run_tool
from mmengine.config import Config

from mmpeft.backbones.recognise import makes_other_blocks
from mmpeft.config import configs_root, find_backbones, load_config

pytest.importorskip('mmpretrain')
stock = importlib.import_module('mmpretrain.models.backbones')


class OtherBlocks(stock.VisionTransformer):
    """Has blocks of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layers = nn.ModuleList(nn.Identity() for _ in range(2))


class SameBlocks(stock.VisionTransformer):
    """Makes the stock blocks by itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layers = nn.ModuleList(
            stock.vision_transformer.TransformerEncoderLayer(16, 2, 32)
            for _ in range(2))


class MoreBeside(stock.VisionTransformer):
    """Adds something and uses what is there."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gate = nn.Linear(len(self.layers), 2)


class BelowOther(OtherBlocks):
    """Inherits the other blocks."""


@pytest.mark.parametrize('cls, supported', [
    (stock.VisionTransformer, True),
    (stock.SwinTransformer, True),
    (SameBlocks, True),
    (MoreBeside, True),
    (OtherBlocks, False),
    (BelowOther, False),
])
def test_subclasses(cls, supported):
    cfg = Config(dict(model=dict(backbone=dict(type=cls))))
    assert bool(find_backbones(cfg)) == supported


@pytest.mark.parametrize('name, block', [
    ('vit_eva02.ViTEVA02', 'vision_transformer.TransformerEncoderLayer'),
    ('deit3.DeiT3', 'vision_transformer.TransformerEncoderLayer'),
    ('beit.BEiTViT', 'vision_transformer.TransformerEncoderLayer'),
])
def test_stock_subclasses_with_other_blocks(name, block):
    module, cls = name.split('.')
    backbones = 'mmpretrain.models.backbones'
    cls = getattr(getattr(stock, module), cls)
    pattern = r'(?P<stage_path>layers)\.\d+'
    assert makes_other_blocks(cls, pattern, [f'{backbones}.{block}'])


def test_swin_names_its_blocks_through_its_stages():
    backbones = 'mmpretrain.models.backbones.swin_transformer'
    pattern = r'(?P<stage_path>stages\.\d+)\.blocks\.\d+'
    assert not makes_other_blocks(stock.SwinTransformer, pattern,
                                  [f'{backbones}.SwinBlock'])
    assert makes_other_blocks(stock.SwinTransformer, pattern,
                              ['nowhere.Block'])


@pytest.mark.parametrize('by', ['name', 'path'])
def test_backbones_without_a_head_get_the_scope_of_their_library(by):
    name = 'dinov2/vit-small-p14_dinov2-pre_headless.py'
    config = f'mmpretrain::{name}'
    if by == 'path':
        config = configs_root('mmpretrain') / name
    cfg = load_config(str(config))
    assert cfg.default_scope == 'mmpretrain'
    assert list(find_backbones(cfg)) == ['model.backbone']


def test_own_config_keeps_its_scope(tmp_path):
    path = tmp_path / 'own.py'
    path.write_text("model = dict(type='X')\n")
    assert 'default_scope' not in load_config(str(path))


def test_count_of_a_backbone_without_a_head():
    done = run_tool('count_params.py',
                    'mmpretrain::dinov2/vit-small-p14_dinov2-pre_headless.py',
                    '--method', 'LoRA:rank=4', '--json')
    row, = json.loads(done.stdout)
    # 12 blocks, q and v, 384 -> 4 -> 384
    assert row['backbone_trainable'] == 12 * 2 * 2 * 384 * 4, done.stderr
