import re

import pytest
import torch
import torch.nn as nn
from conftest import build_pair, peft_cfg, stock_cfg
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

from mmpeft.errors import PEFTError, SiteError
from mmpeft.injection import PEFTBackbone, inject
from mmpeft.methods import BitFit, LoRA, Mona
from mmpeft.state import attached_modules


def added(backbone):
    return sorted({
        n.split('.peft.')[0]
        for n, _ in backbone.named_parameters() if '.peft.' in n
    })


def test_layers_and_overrides(library):
    _, peft = build_pair(
        library,
        dict(
            type='Mona',
            dim=4,
            layers='stage:1',
            overrides={
                -1: dict(dim=2),
            }))
    assert added(peft) == ['stages.1.blocks.0', 'stages.1.blocks.1']
    shapes = [m.project1.weight.shape[0] for m in attached_modules(peft)]
    assert shapes == [4, 4, 2, 2]
    # Blocks before the first attached one run without autograd.
    seen = {}
    for i in (0, 1):
        peft.stages[i].blocks[0].register_forward_hook(
            lambda m, a, out, i=i: seen.update({i: out.requires_grad}))
    peft(torch.randn(1, 3, 56, 56))
    assert seen == {0: False, 1: True}


def test_composition_keeps_order_and_keys(library):
    _, peft = build_pair(
        library,
        ['LNTune',
         dict(type='LoRA', rank=2, name='first'), 'Mona:dim=2'])
    block = peft.stages[0].blocks[0]
    assert list(block.peft) == ['first', 'mona']
    keys = [n for n, _ in block.named_parameters() if n.startswith('peft.')]
    assert 'peft.first.qkv.lora_A' in keys
    assert 'peft.mona.ffn_residual.adapter_conv.conv1.weight' in keys
    for name, parameter in peft.named_parameters():
        is_norm = re.search(r'norm\d?\.(weight|bias)$', name) is not None
        assert parameter.requires_grad == ('.peft.' in name or is_norm)


def test_selector_layers(library):
    _, peft = build_pair(library, dict(type='BitFit', layers=[0]))
    trained = [n for n, p in peft.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith('stages.0.blocks.0.') for n in trained)
    tables = [n for n in trained if n.endswith('bias_table')]
    assert len(tables) == 1
    _, peft = build_pair(library, BitFit.__name__ + ':rel_pos_tables=False')
    assert not any(
        n.endswith('table') and p.requires_grad
        for n, p in peft.named_parameters())


def test_freeze(library):
    _, peft = build_pair(library, 'Full', freeze=('patch_embed', ))
    for name, parameter in peft.named_parameters():
        assert parameter.requires_grad != name.startswith('patch_embed.')
    with pytest.raises(PEFTError, match="'patch_embd' names no part.*stages"):
        build_pair(library, 'Full', freeze=['patch_embd'])


def test_unreached_stages_are_left_out(library):
    """Their parameters would train without a gradient: an error for DDP."""
    for method in ('Mona:dim=4', 'LNTune', 'BitFit'):
        peft = MODELS.build(
            dict(
                peft_cfg(library, method, allow_random_base=True),
                out_indices=(0, )))
        loss = sum(o.sum() for o in peft(torch.randn(1, 3, 56, 56)))
        loss.backward()
        trained = [p for p in peft.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None for p in trained)
    assert peft.peft.skipped == ['stages.1.blocks.0', 'stages.1.blocks.1']


def test_eval_frozen(library, image):
    _, peft = build_pair(library, 'Mona:dim=4,drop_rate=0', eval_frozen=True)
    assert peft.train() is peft and peft.training
    assert attached_modules(peft)[0].training
    assert not peft.stages[1].blocks[1].norm1.training
    first, second = peft(image), peft(image)
    # No drop-path left, though the backbone is in training mode.
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_batchnorm_of_the_frozen_base_keeps_its_statistics(library):
    stock, _ = build_pair(library, 'Frozen')
    stock.add_module('extra', nn.BatchNorm2d(3))
    inject(stock, 'Frozen', allow_random_base=True)
    stock.train()
    assert not stock.extra.training
    stock.extra.weight.requires_grad = True
    stock.train()
    assert stock.extra.training


def test_attached_modules_follow_dtype(library):
    stock, _ = build_pair(library, 'Frozen')
    inject(stock.double(), 'LoRA:rank=2', allow_random_base=True)
    assert {p.dtype for p in stock.parameters()} == {torch.float64}


def test_pretrained_weights_count_as_loaded(library, tmp_path):
    stock, _ = build_pair(library, 'Frozen')
    path = str(tmp_path / 'base.pth')
    state = {f'backbone.{k}': v for k, v in stock.state_dict().items()}
    torch.save(dict(state_dict=state), path)
    init_cfg = ConfigDict(
        type='Pretrained', checkpoint=path, prefix='backbone.')
    image = torch.randn(1, 3, 56, 56)

    def build(**kwargs):
        cfg = dict(peft_cfg(library, 'Mona:dim=4'), init_cfg=init_cfg)
        backbone = MODELS.build(dict(cfg, **kwargs))
        backbone.init_weights()
        backbone.train()
        return backbone

    build()(image)
    # Evaluation asks for nothing: that is how a delta is tested.
    bare = MODELS.build(peft_cfg(library, 'Mona:dim=4'))
    bare.eval()
    bare(image)
    missing = 'backbone.stages.1.blocks.0.attn.w_msa.qkv.weight'
    torch.save(
        dict(state_dict={
            k: v
            for k, v in state.items() if k != missing
        }), path)
    with pytest.raises(PEFTError, match='1 of .* frozen weights.*qkv.weight'):
        build()(image)


def test_weights_of_another_width(library, tmp_path):
    stock, _ = build_pair(library, 'Frozen')
    path = str(tmp_path / 'base.pth')
    state = {
        f'backbone.{k}': torch.cat([v, v]) if k.endswith('qkv.bias') else v
        for k, v in stock.state_dict().items()
    }
    torch.save(dict(state_dict=state), path)
    peft = MODELS.build(
        dict(
            peft_cfg(library, 'Full'),
            init_cfg=ConfigDict(
                type='Pretrained', checkpoint=path, prefix='backbone.')))
    if library == 'mmpretrain':
        # mmengine's loader logs and goes on.
        peft.init_weights()
        return
    with pytest.raises(PEFTError, match='another architecture.*size mismatch'):
        peft.init_weights()


def test_stock_by_any_name(library):
    cfg = peft_cfg(library, 'Frozen')
    cls = type(MODELS.build(stock_cfg(library)))
    full = f'{cls.__module__}.{cls.__qualname__}'
    for name in (cls, full, cfg['stock']):
        assert type(MODELS.build(dict(cfg, stock=name))) is cls
    with DefaultScope.overwrite_default_scope(library):
        built = MODELS.build(dict(cfg, stock='SwinTransformer'))
    assert type(built) is cls


def test_mistakes(library):
    cfg = peft_cfg(library, 'Mona:dim=4')
    with pytest.raises(PEFTError, match='frozen_stages=1.*freeze='):
        PEFTBackbone(**{
            k: v
            for k, v in dict(cfg, frozen_stages=1).items() if k != 'type'
        })
    with pytest.raises(PEFTError, match='needs a method'):
        build_pair(library, None)
    with pytest.raises(PEFTError, match='dim=64 is larger than the width 16'):
        build_pair(library, 'Mona')
    with pytest.raises(PEFTError, match='attached already'):
        inject(build_pair(library, 'Mona:dim=4')[1], 'LNTune')
    with pytest.raises(SiteError, match='no block mmpeft knows.*Swin'):
        inject(nn.Conv2d(3, 3, 1), 'Mona')


def test_nothing_is_touched_by_a_mistake(library):
    stock, _ = build_pair(library, 'Full')
    state = list(stock.state_dict())
    for method in ('Mona:dim=4+LoRA:rank=99', 'LoRA:rank=2,layers=[9]'):
        with pytest.raises(PEFTError):
            inject(stock, method)
        assert list(stock.state_dict()) == state
        assert all(p.requires_grad for p in stock.parameters())


def test_public_classes_have_their_contract():
    assert Mona.needs_grid and Mona.no_merge and LoRA.no_merge is None
