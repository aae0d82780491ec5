"""What is particular to EVA-02."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import perturb
from families import (TOGETHER, Sum, builders, check_bare, check_joined,
                      check_merged, check_methods, check_recognised,
                      classifier, image_of, run, scope_of, stream_of)

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.state import attached_modules

pytest.importorskip('mmpretrain')

ARCH = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=48)
BASE = dict(
    type='mmpretrain.ViTEVA02',
    arch=ARCH,
    img_size=32,
    patch_size=8,
    out_type='featmap',
    drop_path_rate=.2)
VARIANTS = {
    '': dict(),
    'sub-norm': dict(sub_ln=True, out_indices=[0, 2], drop_rate=.1),
    'average': dict(out_type='avg_featmap', final_norm=False, qkv_bias=False),
    'class token': dict(out_type='cls_token', attn_drop_rate=.1),
    'no class token': dict(with_cls_token=False, proj_drop_rate=.1),
}


def cfg_of(variant, **kwargs):
    return {**BASE, **copy.deepcopy(VARIANTS[variant]), **kwargs}


stock_of, peft_of = builders(cfg_of)
scope = scope_of('mmpretrain')
image = image_of(37, 28)


@pytest.mark.parametrize('variant', VARIANTS)
def test_stock_forward(variant, image):
    """Dropout included."""
    check_bare(stock_of(variant), image)


@pytest.mark.parametrize('variant', VARIANTS)
def test_methods(variant, image):
    # Enough class tokens for each hidden unit to be above zero for some.
    image = torch.cat([image, -image, 2 * image.flip(1)])
    check_methods(*peft_of(variant, '+'.join(TOGETHER)), image)


# ---------------------------------------------------------------- prompts
def attend(attn, x, joined, keys, values, hw):
    """The attention written out: [joined, class, patches] and a prefix."""
    q, k, v = F.linear(
        torch.cat([joined, x], 1), attn.qkv.weight,
        attn.qkv.bias).chunk(3, -1)
    k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    # What the patches are rotated by, with ones and zeros where nothing is.
    size = hw[0] * hw[1]
    eye = torch.eye(8).expand(1, 1, 8, 8)
    turn = torch.cat([
        attn.rope(eye[:, :, i:i + 1].expand(1, 1, size, 8), hw)
        for i in range(8)
    ])[:, 0].permute(1, 2, 0)

    def rotate(t):
        grid = torch.einsum('nij,bhnj->bhni', turn, t[:, :, -size:])
        return torch.cat([t[:, :, :-size], grid], 2)

    y = (rotate(q) @ rotate(k).transpose(-2, -1) / 8**.5).softmax(-1) @ v
    y = F.linear(
        y.transpose(1, 2).flatten(2), attn.proj.weight, attn.proj.bias)
    return y[:, joined.shape[1]:]


@pytest.mark.parametrize('variant', ['', 'no class token'])
@pytest.mark.parametrize('method', [
    'VPTDeep:num_tokens=3', 'VPTDeep:num_tokens=3,norm=False',
    'PrefixTuning:num_tokens=3,init_std=1.'
])
def test_what_joins_is_not_rotated(variant, method, image):
    _, peft = peft_of(variant, method)
    perturb(peft)
    block, seen = peft.layers[0], {}
    block.attn.register_forward_hook(
        lambda m, args, y: seen.update(x=args[0], y=y))
    peft.eval()
    run(peft, image)
    empty = torch.zeros(2, 0, 16)
    joined, prefix = empty, (empty, empty)
    if 'Prefix' in method:
        prefix = [
            t.expand(2, -1, -1)
            for t in block.peft['prefix_tuning']['attn_kv'].prefix()
        ]
    else:
        site = 'attn_tokens' if 'norm' in method else 'tokens'
        joined = block.peft['vpt_deep'][site].prompts.weight
        joined = joined.expand(2, -1, -1)
        joined = joined if 'norm' in method else block.norm1(joined)
    y = attend(block.attn, seen['x'], joined, *prefix, (5, 4))
    assert (y - seen['y']).abs().max() < 1e-5


def test_prompts_that_go_on(image):
    """One sequence, [prompts, class, patches], through all of the block."""
    _, peft = peft_of('', 'VPTShallow:num_tokens=3')
    peft.eval()
    block, seen = peft.layers[0], {}
    block.register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y))
    entered = []
    peft.layers[1].norm1.register_forward_hook(
        lambda m, args, y: entered.append(args[0]))
    out = run(peft, image)
    prompts = peft.peft.vpt_shallow.weight.expand(2, -1, -1)
    x = torch.cat([prompts, seen['x']], 1)
    empty = torch.zeros(2, 0, 16)
    normed = block.norm1(x)
    x = x + attend(block.attn, normed, empty, empty, empty, (5, 4))
    x = x + block.mlp(block.norm2(x))
    assert (seen['y'] - x[:, 3:]).abs().max() < 1e-5
    tokens = next(t for t in entered if t.shape[1] == 3)
    assert (tokens - x[:, :3]).abs().max() < 1e-5
    assert torch.isfinite(out[0]).all()


# ------------------------------------------------------- grid and outputs
def test_grid(image):
    _, peft = peft_of('class token', 'Mona:dim=4')
    assert peft.peft.gridless == {'mona': ['layers.2']}
    for variant, extra in (('', 1), ('no class token', 0)):
        _, peft = peft_of(variant, 'Mona:dim=4')
        assert peft.peft.gridless == {}
        layouts = []
        peft.layers[1].peft['mona']['attn_residual'].register_forward_hook(
            lambda m, args, y: layouts.append(args[2]))
        run(peft, image), run(peft, torch.randn(1, 3, 16, 64))
        assert [t.hw_shape for t in layouts] == [(5, 4), (2, 8)]
        assert [t.num_extra_tokens for t in layouts] == [extra] * 2


@pytest.mark.parametrize('variant', VARIANTS)
def test_side_networks_join_each_output_once(variant, image):
    stock, peft = peft_of(variant, dict(type=Sum))
    stock.eval(), peft.eval()
    (_, *ys), expected = stream_of(stock, image), []
    for i in sorted(stock.out_indices):
        out = ys[i] + sum(ys[:i + 1])
        if i == len(ys) - 1 and stock.final_norm:
            out = stock.ln1(out)
        expected.append(stock._format_output(out, (5, 4)))
    check_joined(stock, peft, image, expected)


def test_swiglu_layers(image):
    _, peft = peft_of('sub-norm', 'LoRA:rank=2,targets=[fc1,fc2]')
    sites = {m.site.name: m.site for m in attached_modules(peft)}
    assert sites['fc1'].out_dims == 96 and sites['fc2'].in_dims == 48
    with pytest.raises(PEFTError, match='FacT'):
        peft_of('', 'FacTTT:rank=2', arch=dict(ARCH, feedforward_channels=42))


def test_merge(image):
    """Keys are rotated, so that their bias matters, and is there to merge
    into; or there is none at all."""
    stock, peft = peft_of('sub-norm', 'SSF+RepAdapter:dim=4')
    check_merged(stock, peft, image)
    _, peft = peft_of('average', 'SSF')
    with pytest.raises(MergeError, match='qkv has no bias in the stock'):
        merged_state_dict(peft)


# ------------------------------------------------- the rest of the stock API
def test_layer_decay_and_configs():
    backbone = check_recognised(
        classifier(cfg_of('class token')), 'Mona:dim=4+SSF')
    for name, _ in backbone.named_parameters():
        depth, layers = backbone.get_layer_depth(name)
        if name.startswith('layers.'):
            assert depth == int(name.split('.')[1]) + 1
        elif name.startswith('patch_embed.'):
            assert depth == 0


def test_checkpoint_of_another_size(image):
    """Stock resizes the positions while it loads; those of the rotation are
    made anew for each image."""
    _, peft = peft_of('', 'LoRA:rank=2')
    peft.peft.base_checked = False
    state = stock_of('', img_size=48).state_dict()
    state = {k: v for k, v in state.items() if 'rope' not in k}
    peft.load_state_dict(state, strict=False)
    run(peft, image)
    assert peft.peft.base_checked
