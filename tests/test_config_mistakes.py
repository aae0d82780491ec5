"""Mistakes in a config: one sentence, before anything is trained."""
import os.path as osp
from collections import OrderedDict

import pytest
import torch
from commands import run_tool
from conftest import peft_cfg, stock_cfg
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmpeft.config import add_method, load_config
from mmpeft.config_checks import check_config
from mmpeft.engine.checkpoint import write_checkpoint
from mmpeft.engine.run import build_runner
from mmpeft.errors import PEFTError

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
METHODS = {
    'Lora:rank=4': "no method 'Lora' .did you mean 'LoRA'",
    'LoRA:rnk=4': "no argument 'rnk' .did you mean 'rank'",
    'LoRA:rank=0': 'rank must be a whole number of at least 1, but got 0',
    'LoRA:rank=64': 'rank=64 is larger than the width 16',
    'LoRA:rank=2.5': 'whole number .* got 2.5',
    'LoRA:targets=[q,x]': "targets=.'q', 'x'. must be .* q, k, v",
    'Mona:dim=99': 'dim=99 is larger than the width 16',
    'VPTDeep:num_tokens=0': 'num_tokens must be .* at least 1',
    'LoRA:rank=4,layers=99': 'layers: 99 matches no block. There are',
    'LoRA:rank=4,layers=foo.*': 'matches no block',
    'LoRA:rank=4+LoRA:rank=4': "Two methods are named 'lora'",
    'BitFit+LNTune': 'BitFit and LNTune would both train .*norm0.bias',
    'Full+BitFit': 'Full and BitFit would both train',
    'VPTShallow:num_tokens=2+VPTDeep:num_tokens=2': 'cannot stand together',
}


@pytest.fixture(autouse=True)
def no_scope(monkeypatch):
    """As in a fresh process: models that other tests built leave the scope of
    their library behind, in which a bare name is found."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())


@pytest.mark.parametrize('method', METHODS)
def test_method(method):
    pytest.importorskip('mmdet')
    with pytest.raises(PEFTError, match=METHODS[method]):
        MODELS.build(peft_cfg('mmdet', method))


@pytest.mark.parametrize('change,match', [
    (dict(method=3), 'A method is a dict .* got 3'),
    (dict(method=[]), 'list of methods is empty'),
    (dict(method=dict(rank=3)), 'needs a type'),
    (dict(method=None), 'needs a method'),
    (dict(stock=None), 'needs the stock backbone'),
    (dict(stock='mmdet.SwinTransfomer'),
     "no stock backbone 'mmdet.SwinTransfomer' .did you mean "
     "'mmdet.SwinTransformer'"),
    (dict(stock='mmdett.SwinTransformer'),
     "did you mean 'mmdet.SwinTransformer'"),
    (dict(stock='mmnone.SwinTransformer'), 'as mmnone is not installed'),
    (dict(stock='SwinTransformer'), 'no stock backbone .* with its library'),
    (dict(stock=dict(type='mmdet.SwinTransformer')), 'but got one of dict'),
    (dict(stock=torch.nn.Identity()), 'one of Identity; mmpeft.apply takes'),
    (dict(eval_frozn=True), "no argument 'eval_frozn' .did you mean 'eval_f"),
    (dict(windw_size=7), "no argument 'windw_size' .did you mean 'window_s"),
    (dict(stock='mmdet.FPN'), 'FPN. takes no argument .* as in the stock'),
    (dict(frozen_stages=1), 'frozen_stages=1 would freeze'),
])
def test_backbone(change, match):
    pytest.importorskip('mmdet')
    with pytest.raises(PEFTError, match=match):
        MODELS.build(dict(peft_cfg('mmdet', 'LoRA:rank=4'), **change))


def test_backbone_of_another_library():
    pytest.importorskip('mmpretrain')
    cfg = peft_cfg('mmdet', 'LoRA:rank=4')
    cfg.update(stock='mmpretrain.SwinTransformer')
    with pytest.raises(PEFTError, match="no argument '.*differ between libr"):
        MODELS.build(cfg)


def test_backbone_of_no_family():
    pytest.importorskip('mmdet')
    cfg = dict(
        type='mmpeft.PEFTBackbone',
        stock='mmdet.ResNet',
        depth=18,
        method='LoRA')
    with pytest.raises(PEFTError, match='ResNet has no block mmpeft knows'):
        MODELS.build(cfg)


def config(backbone, **kwargs):
    return Config(
        dict(model=dict(type='mmdet.X', backbone=backbone), **kwargs))


def test_config():
    pytest.importorskip('mmdet')
    good = peft_cfg('mmdet', 'LoRA:rank=4')
    check_config(config(good))
    check_config(config(stock_cfg('mmdet'), activation_checkpointing=['a']))
    with pytest.raises(PEFTError, match='set with_cp=True'):
        check_config(config(good, activation_checkpointing=['backbone']))
    with pytest.raises(PEFTError, match='model.backbone has a method, but'):
        check_config(config(dict(stock_cfg('mmdet'), method='LoRA')))
    with pytest.raises(PEFTError, match="no method 'Mora'"):
        check_config(config(dict(good, method='Mora')))


@pytest.mark.parametrize('text, match', [
    ("_base_ = './gone.py'", 'a file that is not there: .*gone.py'),
    ("_base_ = 'mmpeft::mona/gone.py'", 'a file that is not there: .*gone.py'),
    ("_base_ = 'mmnone::mona/gone.py'", 'LIBRARY::FOLDER/FILE.py of an'),
    ("_base_ = 'mmocr::dbnet/gone.py'", 'LIBRARY::FOLDER/FILE.py of an'),
    ("_base_ = 'mmnone::gone.py'", 'LIBRARY::FOLDER/FILE.py of an'),
    ('model = dict(\n', 'no valid Python, in line 1: .* never closed'),
    ('a = b', "cannot be read as a config .NameError: name 'b' is not"),
])
def test_file(tmp_path, text, match):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(PEFTError, match=match):
        load_config(str(tmp_path / 'config.py'))


def test_no_backbone():
    for model in ({}, dict(model='mmdet.X'), dict(model=dict(type='mmdet.X'))):
        with pytest.raises(PEFTError, match='No supported backbone'):
            add_method(Config(model), 'LoRA')


def test_folder_that_cannot_be_made(tmp_path):
    file = tmp_path / 'file'
    file.write_text('mine')
    cfg = Config(dict(launcher='none', work_dir=str(file / 'run')))
    with pytest.raises(PEFTError, match='cannot be made .*--work-dir'):
        build_runner(cfg)
    with pytest.raises(PEFTError, match='could not be written'):
        write_checkpoint({}, str(file / 'x.pth'))
    assert file.read_text() == 'mine'


@pytest.mark.parametrize('text,match', [
    ("model = dict(backbone=dict(type='mmpeft.PEFTBackbon'))",
     'mmpeft.PEFTBackbon is not in the'),
    ("model = dict(backbone=dict(method='Lora'))", "did you mean 'LoRA'"),
    ("activation_checkpointing = ['backbone']", 'set with_cp=True'),
])
def test_tools_say_it_in_one_sentence(tmp_path, text, match):
    """Exit status 2, no traceback."""
    pytest.importorskip('mmdet')
    base = osp.join(ROOT, 'configs', 'mona', 'mask-rcnn_swin-nano_shapes.py')
    file = tmp_path / 'config.py'
    file.write_text(f'_base_ = {base!r}\n{text}\n'
                    'train_dataloader = dict(dataset=dict(indices=2))\n')
    tool = 'count_params.py' if 'Backbon\'' in text else 'train.py'
    done = run_tool(tool, file, cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-1500:]
    assert match in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'work_dirs').exists()
