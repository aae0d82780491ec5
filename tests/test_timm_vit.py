"""What is particular to timm's ViT, bare and in ``TIMMBackbone``."""
import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
from conftest import perturb
from families import (TOGETHER, Sum, blocks_of, builders, check_bare,
                      check_gradients, check_joined, check_merged,
                      check_methods, check_recognised, equal, image_of,
                      loss_of, near, run, scope_of, stream_of)
from mmengine.config import Config
from test_counts_vit import ROWS, closed_form
from test_sites import Prompt

import mmpeft
from mmpeft.config import add_method, find_backbones
from mmpeft.counting import count_params
from mmpeft.errors import PEFTError, SiteError
from mmpeft.injection import PEFTBackbone, inject
from mmpeft.state import attached_modules

timm = pytest.importorskip('timm')
LAYERS = timm.layers

BASE = dict(
    type='mmpretrain.TIMMBackbone',
    model_name='vit_tiny_patch16_224',
    img_size=(40, 32),
    patch_size=8,
    embed_dim=16,
    depth=3,
    num_heads=2,
    drop_path_rate=.2)
FEATURES = dict(features_only=True, out_indices=(0, 2))
VARIANTS = {
    'tokens':
    dict(),
    'features':
    FEATURES,
    'features of mmseg':
    dict(FEATURES, type='mmseg.TIMMBackbone', pretrained=False),
    'logits of mmseg':
    dict(
        type='mmseg.TIMMBackbone',
        pretrained=False,
        features_only=False,
        num_classes=5),
    'not the last':
    dict(features_only=True, out_indices=(0, 1)),
    'registers':
    dict(FEATURES, reg_tokens=2, no_embed_class=True),
    'no class token':
    dict(class_token=False, global_pool='avg'),
    'norms in the attention':
    dict(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    'LayerScale':
    dict(FEATURES, init_values=.1),
    'CLIP':
    dict(pre_norm=True, norm_layer='LN'),
    'any size':
    dict(FEATURES, dynamic_img_size=True, dynamic_img_pad=True),
    'packed SwiGLU':
    dict(mlp_layer=LAYERS.SwiGLUPacked),
    'fewer patches':
    dict(patch_drop_rate=.5),
    'DeiT, two tokens':
    dict(model_name='deit_tiny_distilled_patch16_224'),
}
# Blocks that lack a site, and variants for single tests.
SPLIT = dict(mlp_layer=LAYERS.SwiGLU)
DIFFERENTIAL = dict(attn_layer='diff')


def cfg_of(variant, **kwargs):
    named = VARIANTS[variant] if isinstance(variant, str) else variant
    return copy.deepcopy({**BASE, **named, **kwargs})


stock_of, peft_of = builders(cfg_of)
scope = scope_of('mmpretrain')
image = image_of(40, 32)


def model_in(backbone):
    return next(m for m in backbone.modules()
                if isinstance(m, timm.models.VisionTransformer))


@pytest.mark.parametrize(
    'variant', [*VARIANTS, 'split SwiGLU', 'differential', 'unfused'])
def test_stock_forward(variant, image):
    special = {
        'split SwiGLU': SPLIT,
        'differential': DIFFERENTIAL,
        'unfused': dict(attn_drop_rate=.1)
    }
    stock = stock_of(special.get(variant, variant))
    if variant == 'unfused':
        for block in blocks_of(stock):
            block.module.attn.fused_attn = False
    check_bare(stock, image)


@pytest.mark.parametrize('variant', VARIANTS)
def test_methods(variant, image):
    methods = TOGETHER
    if variant == 'fewer patches':
        methods = [m for m in methods if m[:4] not in ('Mona', 'Conv')]
    check_methods(*peft_of(variant, '+'.join(methods)), image)


def test_norms_and_merging(image):
    for variant, parts in (('CLIP', {'norm_pre',
                                     'norm'}), ('no class token', {'fc_norm'}),
                           ('norms in the attention', {'norm'}), ('features',
                                                                  set())):
        stock, peft = peft_of(variant, 'SSF+RepAdapter:dim=4+LNTune')
        check_gradients(perturb(peft).eval(), image)
        found = {
            m.site.block.rsplit('.', 1)[-1]
            for m in attached_modules(peft) if '.blocks.' not in m.site.block
        }
        assert found == parts | {'proj'}
        if variant == 'CLIP':
            continue  # its stem has no bias to take the shift
        check_merged(stock, peft, image)


# ---------------------------------------------------------------- attention
def gated(backbone):
    torch.manual_seed(1)
    for block in blocks_of(backbone):
        attn = block.module.attn
        attn.gate = nn.Linear(16, 16)
    return backbone


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize(
    'variant', ['tokens', 'norms in the attention', 'registers', 'gate'])
def test_prompts_are_tokens_of_the_sequence(variant, fused, image):
    """[prompts, class, patches] through stock blocks."""
    stock = stock_of('tokens' if variant == 'gate' else variant)
    stock = gated(stock) if variant == 'gate' else stock
    for block in blocks_of(stock):
        block.module.attn.fused_attn = fused
    stock.eval()
    empty = inject(
        copy.deepcopy(stock), [dict(type=Prompt, num=0, carries=True)],
        allow_random_base=True).eval()
    assert near(run(empty, image), run(stock, image))
    peft = inject(
        copy.deepcopy(stock),
        'VPTShallow:num_tokens=3',
        allow_random_base=True).eval()
    prompts = peft.peft.vpt_shallow.weight.expand(2, -1, -1)
    blocks = model_in(stock).blocks
    blocks[0].register_forward_pre_hook(
        lambda m, args: torch.cat([prompts, args[0]], dim=1))
    outs = []
    for block in (blocks[0], blocks[2]):
        block.register_forward_hook(lambda m, args, y: outs.append(y))
    model = model_in(stock)
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    model.blocks(x)
    found = [*run(peft, image)]
    for i, y in enumerate(found):
        y = y if y.ndim == 3 else y.flatten(2).transpose(1, 2)
        expected = model.norm(outs[i - len(found)])
        assert (y - expected[:, -y.shape[1]:]).abs().max() < 1e-5


def test_prefix_joins_behind_the_norm_of_the_keys(image):
    _, peft = peft_of('norms in the attention',
                      'PrefixTuning:num_tokens=3,init_std=1.')
    block = peft.timm_model.blocks[0]
    attn, seen = block.attn, {}
    attn.register_forward_hook(
        lambda m, args, out: seen.update(x=args[0], y=out))
    peft.eval()
    run(peft, image)

    def heads(t):
        return t.expand(2, -1, -1).unflatten(-1, (2, 8)).transpose(1, 2)

    q, k, v = (
        heads(t) for t in nn.functional.linear(seen['x'], attn.qkv.weight,
                                               attn.qkv.bias).chunk(3, -1))
    keys, values = block.peft['prefix_tuning']['attn_kv'].prefix()
    k = torch.cat([heads(keys), attn.k_norm(k)], 2)
    v = torch.cat([heads(values), v], 2)
    y = (attn.q_norm(q) @ k.transpose(-2, -1) / 8**.5).softmax(-1) @ v
    y = attn.proj(attn.norm(y.transpose(1, 2).flatten(2)))
    assert (y - seen['y']).abs().max() < 1e-5


def test_masks_pass_the_block_and_not_the_prompts(image):
    stock, peft = peft_of('tokens', 'LoRA:rank=2')
    stock.eval(), peft.eval()
    a, b = (
        m.timm_model.forward_features(image, is_causal=True)
        for m in (stock, peft))
    assert torch.equal(a, b)
    assert not torch.equal(a, stock.timm_model.forward_features(image))
    _, peft = peft_of('tokens', 'VPTDeep:num_tokens=2')
    with pytest.raises(PEFTError, match='no place in an attention mask'):
        peft.timm_model(image, is_causal=True)


def test_sites_that_a_block_lacks(image):
    with pytest.raises(SiteError, match="'fc1'.*SwiGLU.*fc1_g, fc1_x"):
        peft_of(SPLIT, 'LoRA:rank=2,targets=[fc1]')
    with pytest.raises(SiteError, match="'tokens'.*DiffAttention"):
        peft_of(DIFFERENTIAL, 'VPTDeep:num_tokens=2')
    for variant in (SPLIT, DIFFERENTIAL):
        _, peft = peft_of(
            variant, 'LoRA:rank=2,targets=[q,v,proj,fc2]+Mona:dim=4+'
            'LST:reduction=4+Adapter:dim=4')
        check_gradients(perturb(peft), image)


# --------------------------------------------------------------------- grid
def test_grid_follows_the_image_and_the_copy():
    _, peft = peft_of('any size', 'Mona:dim=4', reg_tokens=2)
    grid = blocks_of(peft)[0].module.peft.grid
    run(peft, torch.randn(1, 3, 37, 28))
    assert grid.hw_shape == (5, 4) and grid.num_extra_tokens == 3
    twin = copy.deepcopy(peft)
    run(twin, torch.randn(1, 3, 16, 64))
    assert grid.hw_shape == (5, 4)
    grids = {
        id(b.module.peft.grid): b.module.peft.grid
        for b in blocks_of(twin)
    }
    assert [g.hw_shape for g in grids.values()] == [(2, 8)]


def test_a_stem_with_a_network():
    """Its patches are those of a feature map."""
    peft = PEFTBackbone(
        BASE['type'],
        'Mona:dim=4',
        allow_random_base=True,
        model_name='vit_tiny_r_s16_p8_224',
        img_size=64,
        embed_dim=16,
        depth=1,
        num_heads=2)
    assert torch.isfinite(run(peft, torch.randn(1, 3, 64, 64))[0]).all()
    assert blocks_of(peft)[0].module.peft.grid.hw_shape == (2, 2)


def test_dropped_patches(image):
    _, peft = peft_of('fewer patches', 'Mona:dim=4')
    with pytest.raises(SiteError, match='needs the whole grid.*11 tokens'):
        peft(image)
    assert peft.eval()(image)[0].shape == (2, 21, 16)


def test_grid_methods_skip_the_last_block_of_a_class_token(image):
    _, peft = peft_of('DeiT, two tokens', 'Mona:dim=4+LoRA:rank=2')
    assert peft.peft.gridless == {'mona': ['timm_model.blocks.2']}
    for variant in ('tokens', 'features', 'no class token'):
        assert peft_of(variant, 'Mona:dim=4')[1].peft.gridless == {}


# ------------------------------------------------------------------ outputs
@pytest.mark.parametrize('variant', VARIANTS)
def test_side_networks_join_each_output_once(variant, image):
    """Against the stock blocks by hand."""
    stock, peft = peft_of(variant, dict(type=Sum))
    stock.eval(), peft.eval()
    (_, *ys), model = stream_of(stock, image), model_in(stock)
    plain = run(stock, image)
    if stock.timm_model is model:
        expected = [model.forward_head(model.norm(ys[-1] + sum(ys)))]
    else:
        extra = model.num_prefix_tokens
        expected = [(ys[i] + sum(ys[:i + 1]))[:, extra:].transpose(
            1, 2).reshape(plain[0].shape)
                    for i in stock.timm_model.out_indices]
    check_joined(stock, peft, image, expected)


def test_features_that_nothing_was_cut_off(image):
    """A net of one's own, with blocks behind the last output."""
    from timm.models._features import FeatureGetterNet
    model = stock_of('tokens').timm_model
    net = FeatureGetterNet(model, [0, 1], prune=False)
    peft = inject(
        copy.deepcopy(net), 'LNTune+LoRA:rank=2', allow_random_base=True)
    assert peft.peft.skipped == ['model.blocks.2']
    loss_of(peft, image).backward()
    for name, parameter in peft.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
    with pytest.raises(SiteError, match='in front of the norm'):
        inject(copy.deepcopy(net), dict(type=Sum))


def test_final_norm():
    _, peft = peft_of('tokens', 'Partial:final_norm=True')
    assert peft.timm_model.norm.weight.requires_grad
    _, peft = peft_of('no class token', 'Partial:final_norm=True')
    assert peft.timm_model.fc_norm.weight.requires_grad
    with pytest.raises(PEFTError, match='no norm behind its last output'):
        peft_of('features', 'Partial:final_norm=True')


def test_parts_of_a_forward(image):
    """What runs the blocks of timm's models is not always a forward."""
    methods = [dict(type='VPTShallow', num_tokens=2), dict(type=Sum)]
    _, peft = peft_of('tokens', methods)
    model = peft.timm_model.eval()
    expected = [o.detach() for o in peft(image)]
    for _ in range(2):
        found = model.forward_head(model.forward_features(image))
        assert torch.equal(found, expected[0])


def test_checkpointing_of_timm(image):
    """Around a block and not inside: fine, unless tokens go through all."""
    grads = []
    for on in (False, True):
        _, peft = peft_of('tokens', 'Mona:dim=4+VPTDeep:num_tokens=2+BitFit')
        peft.timm_model.set_grad_checkpointing(on)
        loss_of(peft, image).backward()
        grads.append([p.grad for p in peft.parameters() if p.requires_grad])
    assert equal(*grads)
    _, peft = peft_of('tokens', 'VPTShallow:num_tokens=2')
    peft.timm_model.set_grad_checkpointing()
    outs = run(peft, image)
    with pytest.raises(PEFTError, match='did not reach timm_model.blocks.2'):
        outs[0].sum().backward()


# --------------------------------------------------- weights, configs, models
def test_weights_that_timm_loads_are_the_base(tmp_path, image):
    """They arrive in the constructor, and init_weights leaves them."""
    path = str(tmp_path / 'vit.pth')
    stock = stock_of('tokens')
    torch.save(stock.timm_model.state_dict(), path)
    build = partial(PEFTBackbone, BASE['type'], 'LoRA:rank=2', **{
        k: v
        for k, v in BASE.items() if k != 'type'
    })
    peft = build(num_classes=0, checkpoint_path=path)
    start = {k: v.clone() for k, v in peft.state_dict().items()}
    peft.init_weights()
    for key, value in peft.state_dict().items():
        assert torch.equal(value, start[key]), key
        if 'peft' not in key:
            assert torch.equal(value, stock.state_dict()[key]), key
    assert equal(run(peft, image), run(stock, image))
    peft = build()
    peft.init_weights()
    with pytest.raises(PEFTError, match='never loaded'):
        run(peft, image)


def config(name, **kwargs):
    return Config(
        dict(
            model=dict(
                type='mmpretrain.ImageClassifier',
                backbone=dict(BASE, model_name=name, **kwargs))))


def test_configs_are_recognised():
    for name in ('vit_tiny_patch16_224', 'vit_base_patch16_224.augreg_in21k',
                 'deit_tiny_distilled_patch16_224', 'vit_giant_patch14_dinov2',
                 'vit_base_patch16_siglip_224'):
        assert list(find_backbones(config(name))) == ['model.backbone'], name
    backbone = check_recognised(config('vit_tiny_patch16_224').model)
    assert len(attached_modules(backbone)) == 3


@pytest.mark.parametrize('name', [
    'resnet18', 'vit_small_patch16_18x2_224', 'beit_base_patch16_224',
    'naflexvit_base_patch16_gap', 'mobilevit_s', 'no_such_model'
])
def test_models_of_no_family(name):
    """Some of them have ViT's blocks, but in another model."""
    assert not find_backbones(config(name))
    with pytest.raises(PEFTError, match=f"'{name}'.*Supported.*TimmViT"):
        add_method(config(name), 'LoRA')
    if name in ('resnet18', 'mobilevit_s'):
        with pytest.raises(SiteError, match=f"of '{name}' has no.*TimmViT"):
            PEFTBackbone(BASE['type'], 'LoRA', model_name=name)


def test_a_bare_model(image):
    """Its head is no part of the backbone."""
    torch.manual_seed(0)
    model = timm.create_model(
        **{
            k: v
            for k, v in BASE.items() if k != 'type'
        }, num_classes=5)
    total = sum(p.numel() for p in model.parameters())
    whole = nn.ModuleDict(dict(encoder=copy.deepcopy(model)))
    for at, owner in (('', model), ('encoder', whole)):
        mmpeft.apply(owner, 'LoRA:rank=2+Mona:dim=4')
        vit = owner.get_submodule(at)
        assert vit.peft.gridless == {'mona': ['blocks.2']}
        trained = {n for n, p in vit.named_parameters() if p.requires_grad}
        assert {n
                for n in trained
                if 'peft' not in n} == {'head.weight', 'head.bias'}
        counts = count_params(owner)
        assert counts['backbone_total'] == total - 5 * 17
        assert counts['backbone_trainable'] == counts['backbone_added']
        assert counts['model_trainable'] == counts['backbone_added'] + 5 * 17
        assert vit(image).shape == (2, 5)


@pytest.mark.parametrize('method,name,trainable,millions', [
    row for row in ROWS
    if row[0].split(':')[0] in ('Full', 'BitFit', 'LNTune', 'Partial', 'LoRA',
                                'Mona', 'SSF', 'FacTTK', 'E3VA', 'LST')
])
def test_counts_of_vit_b(method, name, trainable, millions, monkeypatch):
    """The same as mmpretrain's, and as the table of facts."""
    for init in ('kaiming_uniform_', 'uniform_', 'trunc_normal_', 'normal_'):
        monkeypatch.setattr(nn.init, init, lambda tensor, *a, **k: tensor)
    peft = PEFTBackbone(
        BASE['type'],
        method,
        model_name='vit_base_patch16_224',
        weight_init='skip')
    counts = count_params(peft)
    assert counts['backbone_trainable'] == trainable
    assert counts['backbone_total'] == closed_form('full')
