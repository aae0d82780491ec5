"""What is particular to timm's Swin, bare and in ``TIMMBackbone``."""
import copy

import pytest
import torch
import torch.nn as nn
from conftest import perturb
from families import (TOGETHER, Sum, blocks_of, builders, check_bare,
                      check_gradients, check_joined, check_merged,
                      check_methods, near, run, scope_of, stream_of)
from mmengine.config import Config
from test_counts import BLOCK
from test_sites import Prompt

import mmpeft
from mmpeft.config import find_backbones
from mmpeft.counting import count_params
from mmpeft.errors import SiteError
from mmpeft.injection import PEFTBackbone, inject
from mmpeft.methods.windows import partition, reverse, window_mask
from mmpeft.state import attached_modules

timm = pytest.importorskip('timm')

BASE = dict(
    type='mmpretrain.TIMMBackbone',
    model_name='swin_tiny_patch4_window7_224',
    img_size=(60, 44),
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    drop_path_rate=.2)
VARIANTS = {
    'map': dict(),
    'features': dict(features_only=True),
    'features of mmseg': dict(type='mmseg.TIMMBackbone', pretrained=False),
    'first stage': dict(features_only=True, out_indices=(0, )),
    'last stage': dict(features_only=True, out_indices=(1, )),
    'channels first': dict(features_only=True, feature_cls='getter'),
    'by name': dict(features_only=True, feature_cls='dict'),
    'any size': dict(features_only=True, dynamic_img_size=True),
    'always windows': dict(always_partition=True),
    'windows that are no squares': dict(window_size=(5, 3)),
    'narrow heads': dict(head_dim=4),
}


def cfg_of(variant, **kwargs):
    named = VARIANTS[variant] if isinstance(variant, str) else variant
    return copy.deepcopy({**BASE, **named, **kwargs})


stock_of, peft_of = builders(cfg_of)
scope = scope_of('mmpretrain')


@pytest.mark.parametrize('variant', [*VARIANTS, 'fused'])
def test_stock_forward(variant, image):
    stock = stock_of('map' if variant == 'fused' else variant)
    for block in blocks_of(stock):
        block.module.attn.fused_attn = variant == 'fused'
    check_bare(stock, image)


@pytest.mark.parametrize('variant', [
    'map', 'features', 'first stage', 'channels first',
    'windows that are no squares', 'narrow heads'
])
def test_methods(variant, image):
    methods = TOGETHER
    if variant == 'narrow heads':
        methods = [m for m in methods if m[:6] != 'Prefix']
        with pytest.raises(SiteError, match="'attn_kv'.* 8 channels"):
            peft_of(variant, 'PrefixTuning:num_tokens=2')
    check_methods(*peft_of(variant, '+'.join(methods)), image)


def test_norms_and_merging(image):
    for variant, norm in (('map', {'timm_model.norm'}), ('features', set())):
        stock, peft = peft_of(variant, 'SSF+RepAdapter:dim=4+LNTune')
        check_gradients(perturb(peft).eval(), image)
        found = {
            m.site.block
            for m in attached_modules(peft) if '.blocks.' not in m.site.block
        }
        second = 'layers.1' if norm else 'layers_1'
        assert found == norm | {
            f'timm_model.{p}'
            for p in ('patch_embed.proj', 'patch_embed.norm',
                      f'{second}.downsample.norm')
        }
        check_merged(stock, peft, image)


# ---------------------------------------------------------------- attention
@pytest.mark.parametrize(
    'variant',
    ['fused', 'any size', 'windows that are no squares', 'narrow heads'])
def test_no_tokens_is_stock_attention(variant, image):
    stock = stock_of('map' if variant == 'fused' else variant)
    for block in blocks_of(stock):
        block.module.attn.fused_attn = variant == 'fused'
    peft = inject(
        copy.deepcopy(stock), [dict(type=Prompt, num=0, carries=True)],
        allow_random_base=True)
    assert near(run(peft, image), run(stock, image))


def test_prompts_join_every_window(image):
    """Against the formula, in a window of a shifted block."""
    _, peft = peft_of('map', 'VPTDeep:num_tokens=3')
    block, seen = peft.timm_model.layers[0].blocks[1], {}
    assert block.shift_size == (3, 3)
    block.attn.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(
            x=args[0], mask=kwargs['mask'], y=out),
        with_kwargs=True)
    peft.eval()
    run(peft, image)
    attn, x = block.attn, seen['x']
    prompts = block.norm1(block.peft['vpt_deep']['tokens'].prompts.weight)
    x = torch.cat([prompts.expand(len(x), -1, -1), x], dim=1)
    q, k, v = attn.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    scores = q[:, :, 3:] * attn.scale @ k.transpose(-2, -1)
    scores[..., 3:] += attn._get_rel_pos_bias()
    scores[..., 3:] += seen['mask'].repeat(2, 1, 1)[:, None]
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert (attn.proj(y) - seen['y']).abs().max() < 1e-5


def test_a_carried_token_stands_for_all_four_neighbours():
    """Through the patch merging, like a map of nothing else."""
    stock = stock_of('map')
    block = blocks_of(stock)[2]
    merging = block.family.mergings(stock)[1]
    token = torch.randn(2, 1, 16)
    expected = merging(token.view(2, 1, 1, 16).expand(-1, 4, 6, -1))
    found = block.family.merge_tokens(merging, token)
    assert torch.allclose(expected[:, 1, 2], found[:, 0], atol=1e-6)


@pytest.mark.parametrize('shift', [0, (2, 1)])
def test_windows_that_are_no_squares(shift):
    """As the networks beside the backbone see them."""
    tokens = torch.arange(1., 2 * 35 + 1).view(2, 35, 1)
    windows = partition(tokens, (7, 5), (4, 3), shift)
    assert windows.shape == (2, 4, 12, 1)
    assert torch.equal(reverse(windows, (7, 5), (4, 3), shift), tokens)
    mask = window_mask((7, 5), (4, 3), shift, tokens.device)
    assert mask.shape == (1, 4, 1, 12, 12)
    assert not mask[0, -1].all() and mask[0, 0].all()
    _, peft = peft_of('windows that are no squares', 'LAST:rank=4')
    assert peft.peft.last.trunk.blocks[1].window_size == (5, 3)
    run(peft, torch.randn(1, 3, 60, 44))[0].sum().backward()
    assert all(p.grad is not None for p in peft.peft.last.parameters())


# ------------------------------------------------------------------ outputs
@pytest.mark.parametrize('variant', VARIANTS)
def test_side_networks_join_each_output_once(variant, image):
    """Against the stock blocks by hand."""
    stock, peft = peft_of(variant, dict(type=Sum))
    stock.eval(), peft.eval()
    blocks, (_, *ys) = blocks_of(stock), stream_of(stock, image)
    plain = run(stock, image)
    family, state, expected = blocks[0].family, 0, []
    for i, block in enumerate(blocks):
        if block.stage and not blocks[i - 1].stage:
            state = family.mergings(stock)[1](state)
        state = state + ys[i]
        if i == len(blocks) - 1 or blocks[i + 1].stage > block.stage:
            expected.append(ys[i] + state)
    model = stock.timm_model
    if isinstance(model, timm.models.SwinTransformer):
        expected = [model.forward_head(model.norm(expected[-1]))]
    if variant == 'channels first':
        expected = [y.permute(0, 3, 1, 2) for y in expected]
    expected = expected[-len(plain):]
    check_joined(stock, peft, image, expected)


def test_features_taken_by_hooks(image):
    """Timm's own hooks see the stock outputs: nothing can join there."""
    cfg = dict(features_only=True, feature_cls='hook')
    stock, peft = peft_of(cfg, 'Mona:dim=4')
    assert not any(
        torch.equal(a, b) for a, b in zip(run(stock, image), run(peft, image)))
    with pytest.raises(SiteError, match="feature_cls to 'list'"):
        peft_of(cfg, 'E3VA:rank=2')


# --------------------------------------------------- weights, configs, models
def test_configs_are_recognised():

    def config(name):
        return Config(
            dict(
                model=dict(
                    type='mmpretrain.ImageClassifier',
                    backbone=dict(BASE, model_name=name))))

    for name in ('swin_tiny_patch4_window7_224',
                 'swin_base_patch4_window12_384.ms_in22k', 'swin_s3_tiny_224'):
        assert list(find_backbones(config(name))) == ['model.backbone'], name
    for name in ('swinv2_tiny_window8_256', 'swinv2_cr_tiny_ns_224'):
        assert not find_backbones(config(name)), name
        with pytest.raises(SiteError, match=f"of '{name}' has no block"):
            PEFTBackbone(BASE['type'], 'LoRA', model_name=name)


def test_a_bare_model(image):
    """Its head is no part of the backbone."""
    cfg = {k: v for k, v in BASE.items() if k != 'type'}
    model = timm.create_model(**cfg, num_classes=5)
    whole = nn.ModuleDict(dict(encoder=model))
    mmpeft.apply(whole, 'Mona:dim=4')
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n
            for n in trained
            if 'peft' not in n} == {'head.fc.weight', 'head.fc.bias'}
    counts = count_params(whole)
    assert counts['backbone_trainable'] == counts['backbone_added']
    assert counts['model_trainable'] == counts['backbone_added'] + 5 * 33
    assert whole.encoder(image).shape == (2, 5)


@pytest.mark.parametrize('method,name', [
    ('Mona', 'mona'),
    ('LoRA', 'lora'),
    ('BitFit', 'bitfit'),
    ('SSF', 'ssf'),
])
def test_counts_of_swin_b(method, name, monkeypatch):
    """In the blocks the same as mmdet's, by the same formulas."""
    for init in ('kaiming_uniform_', 'uniform_', 'trunc_normal_', 'normal_'):
        monkeypatch.setattr(nn.init, init, lambda tensor, *a, **k: tensor)
    peft = PEFTBackbone(
        'mmseg.TIMMBackbone',
        method,
        model_name='swin_base_patch4_window7_224',
        pretrained=False,
        weight_init='skip')
    found = sum(p.numel() for b in blocks_of(peft)
                for p in b.module.parameters() if p.requires_grad)
    depths, widths = (2, 2, 18, 2), (128, 256, 512, 1024)
    assert found == sum(n * BLOCK[name](d, d // 32)
                        for n, d in zip(depths, widths))
    assert name != 'mona' or found == 3_667_456
