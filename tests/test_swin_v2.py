"""What is particular to Swin V2."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import perturb
from families import (TOGETHER, Sum, blocks_of, builders, check_bare,
                      check_joined, check_methods, check_recognised,
                      check_skipped, classifier, image_of, near, run, scope_of,
                      stream_of)

from mmpeft.counting import count_params
from mmpeft.errors import MergeError
from mmpeft.merging import merge, merged_state_dict
from mmpeft.state import attached_modules, load_whole

pytest.importorskip('mmpretrain')

ARCH = dict(
    embed_dims=8,
    depths=[2, 2, 1],
    num_heads=[1, 2, 2],
    extra_norm_every_n_blocks=0)
BASE = dict(
    type='mmpretrain.SwinTransformerV2',
    arch=ARCH,
    img_size=32,
    window_size=4,
    pad_small_map=True,
    out_indices=(0, 2),
    drop_path_rate=.2,
    pretrained_window_sizes=[0, 0, 0])
NO_BIAS = dict(attn_cfgs=dict(qkv_bias=False))
VARIANTS = {
    'three stages':
    dict(),
    'not the last':
    dict(out_indices=(0, 1)),
    'extra norms':
    dict(arch=dict(ARCH, extra_norm_every_n_blocks=2)),
    'windows':
    dict(window_size=[5, 3, 2], pretrained_window_sizes=[8, 8, 4]),
    'checkpoints':
    dict(with_cp=True, use_abs_pos_embed=True),
    'no bias':
    dict(stage_cfgs=dict(block_cfgs=NO_BIAS)),
    # This takes the place of the stock settings of the patch merging.
    'merging':
    dict(
        norm_cfg=None,
        stage_cfgs=dict(downsample_cfg=dict(kernel_size=3, padding='same'))),
}


def cfg_of(variant, **kwargs):
    return copy.deepcopy({**BASE, **VARIANTS[variant], **kwargs})


stock_of, peft_of = builders(cfg_of)
scope = scope_of('mmpretrain')
image = image_of(44, 36)


@pytest.mark.parametrize('variant', VARIANTS)
def test_stock_forward(variant, image):
    """With the same gradients for all it has, the MLP of the positions and
    the scales too."""
    check_bare(stock_of(variant), image.requires_grad_())


@pytest.mark.parametrize('variant', VARIANTS)
def test_methods(variant, image):
    methods = [*TOGETHER[:8], 'SSF', 'BitFit']
    stock, peft = peft_of(variant, '+'.join(methods))
    check_methods(stock, peft, image)
    assert not any('_attention' in vars(m) for m in peft.modules())


# ------------------------------------------------------------ the attention
def attention_by_hand(attn, x, prompts, mask=0):
    """One window (N, C) with prompts (p, C), head by head."""
    count, size = len(prompts), x.shape[1] // attn.num_heads
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    tokens = F.linear(torch.cat([prompts, x]), attn.qkv.weight, bias)
    q, k, v = tokens.unflatten(-1, (3, attn.num_heads, size)).unbind(1)
    table = 16 * attn.cpb_mlp(attn.relative_coords_table).sigmoid()
    table = table.flatten(0, 2)[attn.relative_position_index]
    out = []
    for head in range(attn.num_heads):
        cosine = F.cosine_similarity(
            q[:, None, head], k[None, :, head], dim=-1)
        scores = cosine * attn.logit_scale[head].clamp(max=4.6052).exp()
        # A prompt is as far as an MLP of no opinion says: 16 sigmoid(0).
        scores[:, :count] += 8
        scores[:count, count:] += 8
        scores[count:, count:] += table[..., head] + mask
        out.append(scores.softmax(-1) @ v[:, head])
    out = attn.proj(torch.cat(out, dim=-1))
    return out[count:], out[:count]


@pytest.mark.parametrize('norm', [True, False])
def test_prompts_join_windows(norm, image):
    """No norm is ahead of the attention, so both ways are the same."""
    stock, peft = peft_of('windows', f'VPTDeep:num_tokens=2,norm={norm}')
    perturb(peft).eval(), stock.eval()
    site = 'tokens' if norm else 'attn_tokens'
    for path in ('stages.0.blocks.0', 'stages.0.blocks.1',
                 'stages.1.blocks.1'):
        ours = peft.get_submodule(path)
        seen = {}
        handle = ours.attn.w_msa.register_forward_hook(
            lambda m, args, kwargs, out: seen.update(
                x=args[0], y=out, mask=kwargs['mask']),
            with_kwargs=True)
        run(peft, image)
        handle.remove()
        prompts = ours.peft['vpt_deep'][site].prompts.weight
        theirs = stock.get_submodule(path).attn.w_msa
        masks = seen['mask']
        assert (masks is None) == path.endswith('0')
        for i, window in enumerate(seen['x']):
            mask = 0 if masks is None else masks[i % len(masks)]
            expected, _ = attention_by_hand(theirs, window, prompts, mask)
            assert (expected - seen['y'][i]).abs().max() < 1e-5


def test_prompts_that_go_on():
    """Through a block whose map is one window, and both its norms."""
    method = 'VPTShallow:num_tokens=3'
    stock, peft = peft_of(
        'extra norms',
        method,
        arch=dict(
            embed_dims=8,
            depths=[2],
            num_heads=[2],
            extra_norm_every_n_blocks=2),
        out_indices=(0, ),
        pretrained_window_sizes=[0])
    perturb(peft).eval(), stock.eval()
    # Two blocks of a 4 x 4 map: one window, and four parts of a shifted one.
    image = torch.randn(1, 3, 16, 16)
    (x, *_), *_ = stream_of(stock, image)
    blocks, tokens = stock.stages[0].blocks, peft.peft.vpt_shallow.weight
    tokens = tokens.reshape(3, 8)
    for block in blocks:
        mask, order = 0, torch.arange(16)
        if block.attn.shift_size:
            grid = order.view(4, 4).roll((-2, -2), (0, 1))
            order = grid.flatten()
            part = torch.zeros(4, 4)
            part[:2, 2:], part[2:, :2], part[2:, 2:] = 1, 2, 3
            part = part.flatten()
            mask = -100. * (part[:, None] != part[None])
        window, seen = attention_by_hand(block.attn.w_msa, x[order], tokens,
                                         mask)
        y = torch.empty_like(x)
        y[order] = window
        both = [x + block.norm1(y), tokens + block.norm1(seen)]
        both = [t + block.norm2(block.ffn.layers(t)) for t in both]
        x, tokens = ((block.norm3(t)
                      for t in both) if block.extra_norm else both)
    expected = stock.norm0(x).T.view(1, 8, 4, 4)
    assert near(run(peft, image), [expected])


@pytest.mark.parametrize('variant', VARIANTS)
def test_tokens_pass_the_patch_merging(variant):
    """As a map of nothing else does."""
    stock = stock_of(variant)
    family = blocks_of(stock)[0].family
    tokens = torch.randn(2, 1, 8)
    merging = family.mergings(stock)[1]
    side = 3 if variant == 'merging' else 2
    expected = merging(tokens.expand(-1, side**2, -1), (side, side))[0]
    assert near([family.merge_tokens(merging, tokens)], [expected])


# ---------------------------------------------------------- what stock has
@pytest.mark.parametrize('variant', VARIANTS)
def test_side_networks_join_each_output(variant, image):
    stock, peft = peft_of(variant, dict(type=Sum))
    stock.eval(), peft.eval()
    blocks, ys, sums = blocks_of(stock), [], {}
    for block in blocks:
        block.module.register_forward_hook(lambda m, args, y: ys.append(
            (y, args[1])))
    shapes = [o.shape for o in run(stock, image)]
    mergings, u, hw = blocks[0].family.mergings(stock), 0, None
    for i, block in enumerate(blocks):
        if i and block.stage > blocks[i - 1].stage:
            u = mergings[block.stage](u, hw)[0]
        y, hw = ys[i]
        u = u + y
        sums[block.stage] = y + u
    expected = [
        getattr(stock, f'norm{i}')(sums[i]).transpose(1, 2).reshape(shape)
        for i, shape in zip(stock.out_indices, shapes)
    ]
    check_joined(stock, peft, image, expected)


def test_stages_behind_the_last_output(image):
    """The patch merging is the first module of its stage."""
    for method in ('Mona:dim=4', 'BitFit', 'SSF', 'LST:reduction=4'):
        _, peft = peft_of('not the last', method)
        check_skipped(peft, image, ['stages.2.blocks.0'], ('stages.2.', ))
        if method == 'SSF':
            assert 'peft' in peft.stages[1].downsample.norm._modules


def test_parts():
    _, peft = peft_of('three stages', 'SSF')
    parts = {m.site.block for m in attached_modules(peft)}
    assert {p
            for p in parts if 'blocks' not in p} == {
                'patch_embed.projection', 'patch_embed.norm',
                'stages.1.downsample.norm', 'stages.2.downsample.norm',
                'norm0', 'norm2'
            }


def test_selections():
    """Biases and norms by what they are: two parts of one bias, the bias of
    the MLP of positions, extra norms; no scale of a head."""
    _, peft = peft_of('extra norms', 'BitFit')
    trained = {n for n, p in peft.named_parameters() if p.requires_grad}
    block = 'stages.0.blocks.1.'
    assert {n[len(block):]
            for n in trained if n.startswith(block)} == {
                'attn.w_msa.q_bias', 'attn.w_msa.v_bias',
                'attn.w_msa.proj.bias', 'attn.w_msa.cpb_mlp.0.bias',
                'ffn.layers.0.0.bias', 'ffn.layers.1.bias', 'norm1.bias',
                'norm2.bias', 'norm3.bias'
            }
    _, peft = peft_of('extra norms', 'LNTune')
    trained = {n for n, p in peft.named_parameters() if p.requires_grad}
    assert {n[len(block):]
            for n in trained if n.startswith(block)} == {
                f'norm{i}.{leaf}'
                for i in (1, 2, 3)
                for leaf in ('weight', 'bias')
            }


def test_merge(image):
    """What shifts keys cannot be folded, as a shift turns a cosine."""
    method = 'LoRA:rank=2,targets=[q,k,v,proj,fc1,fc2]+IA3+DoRA:rank=2'
    stock, peft = peft_of('extra norms', method)
    expected = run(perturb(peft).eval(), image)
    load_whole(stock, merged_state_dict(peft))
    stock.eval()
    assert near(run(stock, image), expected)
    assert near(run(merge(peft), image), expected)
    _, peft = peft_of('three stages', 'SSF')
    with pytest.raises(MergeError, match='qkv has no bias of the keys'):
        merge(peft)
    assert len(attached_modules(peft)) == 5 * 6 + 6
    _, peft = peft_of('no bias', 'RepAdapter:dim=4')
    with pytest.raises(MergeError, match='qkv has no bias in the stock'):
        merge(perturb(peft))


def test_configs_are_recognised():
    backbone = check_recognised(classifier(cfg_of('three stages')))
    # q and v of five blocks.
    dims = 2 * 8 + 2 * 16 + 32
    assert count_params(backbone)['backbone_added'] == 2 * 2 * 2 * dims


def test_checkpoint_of_another_size(image):
    """Stock resizes absolute positions and makes relative ones anew; what it
    then misses are no weights."""
    state = stock_of('checkpoints', img_size=64, window_size=6).state_dict()
    _, peft = peft_of('checkpoints', 'LoRA:rank=2')
    peft.peft.base_checked = False
    peft.peft.allow_random_base = False
    missing = peft.load_state_dict(state, strict=False).missing_keys
    assert {m.rpartition('.')[2]
            for m in missing if '.peft.' not in m
            } == {'relative_position_index', 'relative_coords_table'}
    run(peft, image)
    assert peft.peft.base_checked
    with pytest.raises(RuntimeError, match='missing keys .*q_bias'):
        stock = stock_of('three stages')
        load_whole(stock, {
            k: v
            for k, v in stock.state_dict().items() if 'q_bias' not in k
        })
