import os

import pytest
import torch
from conftest import METHODS, family_of, method_of, peft_cfg, stock_cfg
from kinds import KINDS
from mmengine.config import Config
from mmengine.registry import MODELS

from mmpeft.engine import checkpoint
from mmpeft.engine.listing import refusal
from mmpeft.errors import MissingFileError, PEFTError


def config(backbone):
    return Config(
        dict(
            default_scope='mmdet',
            custom_imports=dict(imports=['mmpeft', 'mine']),
            default_hooks=dict(
                timer=dict(type='IterTimerHook'),
                peft_report=dict(type='mmpeft.PEFTReportHook')),
            model=dict(type='X', backbone=backbone)))


def test_strip_method_gives_the_stock_config():
    cfg = config(peft_cfg('mmdet', 'LoRA:rank=4', freeze=('patch_embed', )))
    stock = checkpoint.strip_method(cfg)
    assert stock.model.backbone.to_dict() == stock_cfg('mmdet')
    assert list(stock.default_hooks) == ['timer']
    assert stock.custom_imports.imports == ['mine']
    # The given config is as it was.
    assert cfg.model.backbone.type == 'mmpeft.PEFTBackbone'
    cfg.custom_imports.imports = 'mmpeft'
    ours, theirs = dict(type='mmpeft.RankBudgetHook'), dict(type='EMAHook')
    cfg.custom_hooks = [ours, theirs]
    stock = checkpoint.strip_method(cfg)
    assert 'custom_imports' not in stock and stock.custom_hooks == [theirs]


def test_files_are_told_apart_by_content(tmp_path):
    cfg = config(peft_cfg('mmdet', 'LoRA:rank=4+LNTune'))
    cfg.model = dict(cfg.model.backbone)  # no head
    key = 'stages.0.blocks.0.peft.{}.qkv.lora_A'
    full, merged, other, base = (str(tmp_path / n) for n in 'fmob')
    one, whole = torch.ones(1), MODELS.build(stock_cfg('mmdet')).state_dict()
    checkpoint.write_checkpoint(
        dict(state_dict={key.format('lora'): one}), full)
    checkpoint.write_checkpoint(whole, merged)
    checkpoint.write_checkpoint({key.format('mona'): one}, other)
    assert checkpoint.match_checkpoint(cfg, full) is cfg
    stripped = checkpoint.match_checkpoint(cfg, merged)
    assert stripped.model.type == 'mmdet.SwinTransformer'
    with pytest.raises(PEFTError, match='holds mona, .* attaches lora'):
        checkpoint.match_checkpoint(cfg, other)
    with pytest.raises(MissingFileError, match='no checkpoint'):
        checkpoint.match_checkpoint(cfg, str(tmp_path / 'nothing'))
    # What training starts from is no merged model.
    del whole['norm0.weight']
    checkpoint.write_checkpoint(whole, base)
    with pytest.raises(PEFTError, match="1 of its .*'norm0.weight'"):
        checkpoint.match_checkpoint(cfg, base)


@pytest.mark.parametrize('kind', ['mmdet', 'vit'])
def test_every_method_is_known_in_its_files(tmp_path, kind):
    """Also of networks, which are beside the blocks, and what is shared."""
    pytest.importorskip(KINDS[kind].library)
    path = str(tmp_path / 'x.pth')
    for name in ('Mona', 'VPTShallow', 'FacTTK', 'VeRA', 'BAPAT', 'SCT', 'GPS',
                 'NOAH', 'LST', 'E3VA', 'LAST', 'DTL', 'HST', 'ViTAdapter',
                 'BitFit'):
        if refusal(method_of(name), family_of(kind)):
            continue
        cfg = config(peft_cfg(kind, METHODS[name]))
        state = MODELS.build(cfg.model.backbone).state_dict()
        checkpoint.write_checkpoint(dict(state_dict=state), path)
        assert checkpoint.match_checkpoint(cfg, path) is cfg, name


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = str(tmp_path / 'x.pth')
    checkpoint.write_checkpoint(dict(a=1), path)
    before = open(path, 'rb').read()

    def broken(value, file):
        file.write(b'half')
        raise OSError('No space left on device')

    monkeypatch.setattr(torch, 'save', broken)
    with pytest.raises(PEFTError, match='No space.*has not changed'):
        checkpoint.write_checkpoint(dict(a=2), path)
    assert open(path, 'rb').read() == before
    assert os.listdir(tmp_path) == ['x.pth']


def test_loading_is_exact():
    model = torch.nn.Linear(2, 2)
    state = model.state_dict()
    for change, says in ((dict(more=torch.ones(1)), 'has besides 1 of the 2'),
                         (dict(bias=torch.ones(3)), 'in another shape 1')):
        with pytest.raises(PEFTError, match=says):
            checkpoint.load_exactly(model, {**state, **change}, 'file')
    with pytest.raises(PEFTError, match="lacks 1 .*'bias'"):
        checkpoint.load_exactly(model, dict(weight=state['weight']), 'file')
    checkpoint.load_exactly(model, state, 'file')
