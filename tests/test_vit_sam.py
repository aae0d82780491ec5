"""What is particular to ViTSAM."""
import copy

import pytest
import torch
import torch.nn as nn
from conftest import perturb, with_method
from families import (TOGETHER, Sum, builders, check_bare, check_joined,
                      check_layer_decay, check_merged, check_methods,
                      check_recognised, check_skipped, classifier, image_of,
                      near, run, scope_of, stream_of)
from mmengine.registry import MODELS

from mmpeft.backbones import find_family
from mmpeft.counting import count_params
from mmpeft.errors import PEFTError
from mmpeft.injection import inject
from mmpeft.merging import merged_state_dict
from mmpeft.state import attached_modules

pytest.importorskip('mmpretrain')

# The map of an image is 5 x 4, as the padding is; windows do not divide it.
BASE = dict(
    type='mmpretrain.ViTSAM',
    arch=dict(
        embed_dims=16,
        num_layers=3,
        num_heads=2,
        feedforward_channels=64,
        global_attn_indexes=[1]),
    img_size=32,
    patch_size=8,
    window_size=3,
    out_channels=12,
    drop_path_rate=.2)
VARIANTS = {
    'neck': dict(),
    'two outputs': dict(out_indices=[0, 2]),
    'no neck': dict(out_channels=0, out_indices=[0, 2]),
    'not the last': dict(out_indices=[0, 1]),
    'average': dict(out_type='avg_featmap', out_channels=0),
    'no positions': dict(use_rel_pos=False, use_abs_pos=False, qkv_bias=False),
    'three layers': dict(layer_cfgs=dict(num_fcs=3), drop_rate=.1),
    'stem norm': dict(patch_cfg=dict(norm_cfg=dict(type='LN'))),
}


def cfg_of(variant, **kwargs):
    # Stock writes into a list of outputs.
    return copy.deepcopy({**BASE, **VARIANTS[variant], **kwargs})


stock_of, peft_of = builders(cfg_of)
scope = scope_of('mmpretrain')
image = image_of(37, 28)


@pytest.mark.parametrize('variant', VARIANTS)
def test_stock_forward(variant, image):
    check_bare(stock_of(variant), image)


@pytest.mark.parametrize('variant', VARIANTS)
def test_methods(variant, image):
    methods = TOGETHER[:8] + ['SSF', 'LNTune']
    check_methods(*peft_of(variant, '+'.join(methods)), image)


@pytest.mark.parametrize('variant', ['two outputs', 'no positions'])
@pytest.mark.parametrize('norm', [True, False])
def test_prompts_join_windows_and_maps(variant, norm, image):
    """Against the attention of each window written out, with the prompts
    before its tokens, and no relative position for them."""
    stock, peft = peft_of(variant, f'VPTDeep:num_tokens=2,norm={norm}')
    perturb(peft).eval(), stock.eval()
    for block in (0, 1):
        theirs, ours = stock.layers[block], peft.layers[block]
        site = 'tokens' if norm else 'attn_tokens'
        prompts = ours.peft['vpt_deep'][site].prompts.weight
        if norm:
            prompts = theirs.ln1(prompts)
        seen = {}
        handle = ours.attn.register_forward_hook(
            lambda m, args, out: seen.update(x=args[0], y=out))
        run(peft, image)
        handle.remove()
        x, y = seen['x'], seen['y']
        windows = 2 * (4 if block == 0 else 1)
        assert len(x) == windows
        for window in range(windows):
            expected = attention_by_hand(theirs.attn, x[window], prompts)
            assert (expected - y[window]).abs().max() < 1e-5


def attention_by_hand(attn, x, prompts):
    """One window (H, W, C), token by token."""
    height, width, dims = x.shape
    tokens = torch.cat([prompts, x.flatten(0, 1)])
    q, k, v = attn.qkv(tokens).chunk(3, dim=-1)
    out, size = [], dims // attn.num_heads
    for head in range(attn.num_heads):
        part = slice(head * size, head * size + size)
        scores = q[:, part] @ k[:, part].T * size**-.5
        if attn.use_rel_pos:
            p = len(prompts)
            scores[p:, p:] += relative(attn, q[p:, part], height, width)
        out.append(scores.softmax(-1) @ v[:, part])
    out = attn.proj(torch.cat(out, -1))[len(prompts):]
    return out.view(height, width, dims)


def relative(attn, q, height, width):
    """q times the embedding of the distance in rows and in columns."""

    def table(embedding, size):
        count = 2 * size - 1
        if len(embedding) == count:
            return embedding
        return nn.functional.interpolate(
            embedding.T[None], size=count, mode='linear')[0].T

    rows = table(attn.rel_pos_h, height)
    columns = table(attn.rel_pos_w, width)
    places = [(i, j) for i in range(height) for j in range(width)]
    return torch.stack([
        torch.stack([
            q[n] @ (rows[i - k + height - 1] + columns[j - m + width - 1])
            for k, m in places
        ]) for n, (i, j) in enumerate(places)
    ])


@pytest.mark.parametrize('variant', VARIANTS)
def test_side_networks_join_before_the_neck(variant, image):
    """Against the stock blocks and neck, by hand."""
    stock, peft = peft_of(variant, dict(type=Sum))
    stock.eval(), peft.eval()
    (_, *ys), expected = stream_of(stock, image), []
    for i in stock.out_indices:
        out = (ys[i] + sum(ys[:i + 1])).permute(0, 3, 1, 2)
        if stock.out_channels:
            out = stock.channel_reduction(out)
        expected.append(stock._format_output(out))
    check_joined(stock, peft, image, expected)


def test_blocks_behind_the_last_output(image):
    for method in ('Mona:dim=4', 'BitFit', 'SSF', 'LST:reduction=4',
                   'Partial'):
        _, peft = peft_of('not the last', method)
        check_skipped(peft, image, ['layers.2'], ('layers.2.', ))


def test_the_neck(image):
    """Its last norm is that of all outputs, and merges like any other."""
    for variant, norms in (('neck', {'channel_reduction.3'}), ('no neck',
                                                               set())):
        stock, peft = peft_of(variant, 'SSF')
        parts = {m.site.block: m.site for m in attached_modules(peft)}
        assert {p
                for p in parts if not p.startswith('layers.')
                } == {'patch_embed.projection'} | norms
        if norms:
            assert parts['channel_reduction.3'].out_dims == 12
        check_merged(stock, peft, image)
    _, peft = peft_of('neck', 'Partial:final_norm=True')
    assert peft.channel_reduction[3].weight.requires_grad
    assert not peft.channel_reduction[1].weight.requires_grad
    with pytest.raises(PEFTError, match='out_channels=0 leaves out its neck'):
        peft_of('no neck', 'Partial:final_norm=True')
    _, peft = peft_of('neck', 'LNTune')
    assert peft.channel_reduction[1].weight.requires_grad


def test_layer_decay():
    import mmpretrain.engine.optimizers  # noqa: F401
    method = 'Mona:dim=4+SSF+LST:reduction=4+VPTShallow:num_tokens=2'
    check_layer_decay(
        MODELS.build(classifier(with_method(cfg_of('average'), method))),
        constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=.5))


class Wrapped(nn.Module):
    """A model that keeps it at a path of its own."""

    def __init__(self, encoder):
        super().__init__()
        self.image_encoder = nn.ModuleDict({'vit': MODELS.build(encoder)})


def test_where_it_is_found(image):
    check_recognised(classifier(cfg_of('average')))

    model = Wrapped(cfg_of('neck'))
    host = 'image_encoder.vit'
    assert {h for h, _ in find_family(model)} == {host}
    stock = copy.deepcopy(model)
    inject(model.get_submodule(host), 'LoRA:rank=2', allow_random_base=True)
    perturb(model)
    assert count_params(model)['backbone_added'] == 3 * 2 * 4 * 16
    stock.load_state_dict(merged_state_dict(model), strict=True)
    model.eval(), stock.eval()
    assert near(
        run(stock.get_submodule(host), image),
        run(model.get_submodule(host), image))

    class Other(type(stock.get_submodule(host))):
        pass

    backbone = Other(**{
        k: v
        for k, v in cfg_of('neck').items() if k != 'type'
    })
    inject(backbone, 'Mona:dim=4', allow_random_base=True)
    assert len(attached_modules(backbone)) == 6


def test_checkpoint_of_another_size(image):
    """Stock resizes both kinds of position while it loads."""
    _, peft = peft_of('neck', 'DoRA:rank=2')
    peft.peft.base_checked = False
    peft.peft.allow_random_base = False
    state = stock_of('neck', img_size=48, window_size=5).state_dict()
    for key in ('pos_embed', 'layers.0.attn.rel_pos_h',
                'layers.1.attn.rel_pos_w'):
        assert state[key].shape != peft.state_dict()[key].shape
    peft.load_state_dict(state, strict=False)
    run(peft, image)
    assert peft.peft.base_checked
    # Stock takes a state dict inside its load hook, before there are weights
    # to start from.
    lengths = peft.layers[0].attn.qkv.weight.norm(dim=1)
    magnitude = peft.layers[0].peft['dora']['qkv'].magnitude
    assert torch.allclose(magnitude, torch.cat([lengths[:16], lengths[32:]]))
