import os
import os.path as osp
import subprocess
import sys

import pytest
import torch
from conftest import build_pair
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmpeft
from mmpeft.config import find_backbones, load_config
from mmpeft.state import attached_modules


def test_import_needs_no_library():
    code = ('import sys, mmpeft; '
            'print([m for m in ("mmcv", "mmdet", "mmseg", "mmpretrain", '
            '"timm", "cv2") if m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code],
                          capture_output=True,
                          text=True,
                          check=True)
    assert done.stdout.strip() == '[]'


def test_public_names():
    for name in mmpeft.__all__:
        assert getattr(mmpeft, name) is not None
    with pytest.raises(AttributeError):
        mmpeft.nothing


def test_no_public_name_is_that_of_a_module():
    """Python would put the module in the place of the function as soon as
    anything imports it."""
    folder = osp.dirname(mmpeft.__file__)
    taken = {name.partition('.')[0] for name in os.listdir(folder)}
    assert not taken & set(mmpeft.__all__)


@pytest.mark.parametrize('name, path', [
    ('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 'model.backbone'),
    ('mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_'
     'ade20k-512x512.py', 'model.backbone'),
    ('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
     'model.backbone'),
])
def test_stock_configs(name, path):
    pytest.importorskip(name.split('::')[0])
    cfg = load_config(name)
    assert list(find_backbones(cfg)) == [path]
    changed = mmpeft.apply(cfg, 'LoRA:rank=8')
    assert changed.model.backbone.type == 'mmpeft.PEFTBackbone'
    assert changed.model.backbone.stock == \
        f'{cfg.default_scope}.SwinTransformer'
    assert cfg.model.backbone.type == 'SwinTransformer'
    # Again: the method is replaced, nothing is wrapped twice.
    again = mmpeft.apply(changed, dict(type='Mona'), drop_path_rate=.1)
    assert again.model.backbone.method == dict(type='Mona')
    assert again.model.backbone.drop_path_rate == .1
    assert again.model.backbone.stock == changed.model.backbone.stock


def test_config_mistakes():
    pytest.importorskip('mmdet')
    resnet = load_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    with pytest.raises(mmpeft.PEFTError, match="'ResNet'.*Supported.*Swin"):
        mmpeft.apply(resnet, 'Mona')
    with pytest.raises(mmpeft.PEFTError, match='--at model.neck'):
        mmpeft.apply(resnet, 'Mona', at='model.neck')
    with pytest.raises(mmpeft.MissingFileError, match='mask-rcnn_swin-t'):
        load_config('mmdet::swin/mask-rcnn_swin-x.py')
    with pytest.raises(mmpeft.PEFTError, match='come from one of mmdet'):
        load_config('timm::swin.py')
    with pytest.raises(mmpeft.MissingFileError, match='nowhere.py'):
        load_config('nowhere.py')
    two = Config(
        dict(
            default_scope='mmdet',
            model=dict(
                type='X',
                a=dict(type='SwinTransformer'),
                b=[dict(type='SwinTransformer', _scope_='mmseg')])))
    with pytest.raises(mmpeft.PEFTError, match='model.a, model.b.0.*--at'):
        mmpeft.apply(two, 'Mona')
    # The scope that a node brings along is the one it is built in.
    assert mmpeft.apply(two, 'Mona', at='model.b.0').model.b[0].stock == \
        'mmseg.SwinTransformer'


def test_new_style_config(tmp_path):
    """Classes instead of names, dumped and read again."""
    pytest.importorskip('mmseg')
    path = tmp_path / 'lazy.py'
    path.write_text('from mmseg.models.backbones import SwinTransformer\n'
                    'from mmpeft.injection import PEFTBackbone\n'
                    'from mmpeft.methods import Mona\n'
                    "default_scope = 'mmseg'\n"
                    'model = dict(backbone=dict(\n'
                    '    type=PEFTBackbone, stock=SwinTransformer,\n'
                    '    method=dict(type=Mona, dim=4), embed_dims=16,\n'
                    '    depths=(2, 2), num_heads=(2, 4), strides=(4, 2),\n'
                    '    out_indices=(0, 1)))\n')
    cfg = Config.fromfile(str(path), lazy_import=True)
    cfg.dump(str(tmp_path / 'dumped.py'))
    again = Config.fromfile(str(tmp_path / 'dumped.py'))
    keys = [
        list(MODELS.build(c.model.backbone).state_dict()) for c in (cfg, again)
    ]
    assert keys[0] == keys[1] and any('.peft.mona.' in k for k in keys[0])
    assert list(find_backbones(again)) == ['model.backbone']
    replaced = mmpeft.apply(again, 'LoRA')
    assert replaced.model.backbone.method == 'LoRA'


def test_apply_to_a_model(library, image):
    stock, _ = build_pair(library, 'Frozen')
    model = torch.nn.ModuleDict(
        dict(backbone=stock, head=torch.nn.Linear(2, 2)))
    assert mmpeft.apply(model, 'Mona:dim=4') is model
    assert attached_modules(model)
    assert all(p.requires_grad for p in model['head'].parameters())
    # The weights it holds count as loaded.
    stock.train()(image)
    counts = mmpeft.count_params(model, metric=50.)
    assert counts['backbone_trainable'] == counts['backbone_added'] > 0
    assert counts['model_trainable'] == counts['backbone_trainable'] + 6
    assert sum(counts['by_stage'].values()) == counts['backbone_trainable']
    assert counts['ppt'] == pytest.approx(50 * counts['ppt_factor'])


def test_ppt_factor():
    from mmpeft.counting import ppt_factor
    assert ppt_factor(0) == 1
    # P = C: exp(-log10(2)) = 2 ** (-1 / ln(10))
    assert ppt_factor(10_000_000) == pytest.approx(2**-.4342944819)


def test_config_path():
    path = mmpeft.config_path('mona/mask-rcnn_swin-b_coco.py')
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    assert cfg.model.backbone.method.type == 'Mona'
