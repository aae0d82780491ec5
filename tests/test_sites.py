"""Every site of every family, with modules that only look or only add."""
import copy

import pytest
import torch
import torch.nn as nn
from conftest import build_pair, family_of, peft_cfg
from kinds import KINDS
from mmengine.registry import MODELS

from mmpeft.backbones import find_family
from mmpeft.errors import PEFTError
from mmpeft.injection import eject
from mmpeft.methods.base import PEFTModule
from mmpeft.methods.side import SideNetwork
from mmpeft.sites import (INPUT_SITES, MODULE_SITES, PART_SITES, SITES,
                          STREAM_SITES, TOKEN_SITES)

MAP_SITES = MODULE_SITES + INPUT_SITES + STREAM_SITES


class Look(PEFTModule):
    """Changes nothing and keeps what it saw."""

    sites = MAP_SITES
    parts = PART_SITES
    no_merge = None

    def __init__(self, site, at=MAP_SITES):
        super().__init__(site)
        self.seen = None

    @classmethod
    def sites_for(cls, at=MAP_SITES):
        return tuple(s for s in at if s not in PART_SITES)

    def reset_parameters(self):
        pass

    def forward(self, x, y, layout):
        self.seen = (x, y, layout)
        return y


class Add(Look):
    """Adds a number to what passes."""

    def __init__(self, site, at=MAP_SITES):
        super().__init__(site, at)
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x, y, layout):
        # Not the same in all channels, which a norm would take away.
        return y + self.shift * torch.linspace(-1, 1, y.shape[-1])


class Prompt(PEFTModule):
    """Tokens, or keys and values, that may be none."""

    no_merge = 'it adds tokens'

    def __init__(self, site, at='tokens', num=2, carries=False):
        super().__init__(site)
        self.carries = carries
        self.own = nn.Parameter(torch.randn(1, num, site.in_dims))

    @classmethod
    def sites_for(cls, at='tokens', **kwargs):
        return (at, )

    def reset_parameters(self):
        pass

    def forward(self, x, y, layout):
        if self.site.name == 'attn_kv':
            return tuple(torch.cat([t, self.own], 1) for t in y)
        if self.carries and y.shape[1]:
            return y
        return torch.cat([y, self.own.expand(len(x), -1, -1)], 1)


class Count(SideNetwork):
    """Writes down what it is given."""

    taps = ('attn_branch', 'ffn_branch')

    def __init__(self, trunk):
        super().__init__(trunk)
        self.weight = nn.Parameter(torch.zeros(()))
        self.log = []

    def reset_parameters(self):
        pass

    def start(self, x, layout):
        self.log = ['start']
        return x.new_zeros(x.shape)

    def step(self, u, block, x, y, taps, layout):
        assert not (x.requires_grad or y.requires_grad)
        assert u.shape == x.shape == y.shape
        assert set(taps) == set(self.taps)
        self.log.append(block.path)
        return u + taps['attn_branch'] + taps['ffn_branch']

    def next_stage(self, u, stage, downsample, layout):
        self.log.append(f'stage {stage}')
        return downsample(u)

    def output(self, u, x, stage, layout):
        self.log.append(f'output {stage}')
        return x + self.weight * u


class Around(Count):
    """Changes what enters each block, and what leaves it."""

    taps = ()
    detaches = False
    joins_outputs = False
    enters = True
    writes = True

    def start(self, x, layout):
        self.log = []
        return 0

    def enter(self, u, block, x, layout):
        self.log.append((block.path, u))
        return x + self.shift(x)

    def step(self, u, block, x, y, taps, layout):
        return u + 1

    def next_stage(self, u, stage, downsample, layout):
        # Ahead of what enters the first block there.
        return 100 * stage

    def write(self, u, block, y, layout):
        return y - 2 * self.shift(y)

    def shift(self, x):
        return self.weight * torch.linspace(-1, 1, x.shape[-1])


def offered(kind, sites=MAP_SITES):
    """Those of some sites that the family has."""
    there = family_of(kind).offered()
    return tuple(s for s in sites if s in there)


def both(kind, cls, **kwargs):
    stock, _ = build_pair(kind, 'Frozen')
    peft = MODELS.build(peft_cfg(kind, dict(type=cls, **kwargs)))
    peft.load_state_dict(stock.state_dict(), strict=False)
    return stock, peft


def run(backbone, image):
    torch.manual_seed(4)
    return backbone(image)


def test_looking_changes_nothing(kind, image):
    """In training mode, with drop-path, with and without checkpoints."""
    stock, peft = both(kind, Look, at=offered(kind))
    for with_cp in (False, True):
        for _, block in find_family(peft):
            block.module.with_cp = with_cp
        for a, b in zip(run(stock, image), run(peft, image)):
            assert torch.equal(a, b)


def test_what_sites_see(kind, image):
    facts, sites = KINDS[kind], offered(kind)
    _, peft = both(kind, Look, at=sites)
    outs = run(peft, image)
    for _, block in find_family(peft):
        modules = block.module.peft['look']
        assert set(modules) == set(sites)
        seen = {s: m.seen for s, m in modules.items()}
        dims = block.family.embed_dims(block.module)
        for site in sites:
            x, y, _ = seen[site]
            spot = modules[site].site
            assert spot.embed_dims == spot.in_dims == x.shape[-1], site
            assert spot.out_dims == y.shape[-1], site
            assert (spot.index, spot.block) == (block.index, block.path)
            assert (spot.stem_dims, spot.patch_size) == (16, facts.patch_size)
            assert spot.drop_path == pytest.approx(.2 * block.index / 3)
            if site in STREAM_SITES:
                layout = seen[site][2]
                height, width = layout.hw_shape
                assert layout.num_extra_tokens == facts.extra
                size = facts.extra + height * width
                assert x.shape == y.shape == (2, size, dims)
            if site in INPUT_SITES or 'shortcut' in site:
                assert x is y
        for name in {'qkv', 'proj', 'fc1', 'fc2'} & set(seen):
            assert torch.equal(seen[name][0], seen[f'{name}_input'][1])
        for branch, norm in (('attn', 'norm1'), ('ffn', 'norm2')):
            stream = seen[f'{branch}_shortcut'][0]
            x, y, _ = seen[f'{branch}_parallel']
            if facts.post_norm:
                assert torch.equal(x, stream)
                assert torch.equal(y, seen[norm][1])
            else:
                assert torch.equal(x, seen[norm][1])
            for what in ('branch', 'add', 'residual'):
                assert torch.equal(seen[f'{branch}_{what}'][0], stream)
            total = stream + seen[f'{branch}_add'][1]
            assert torch.equal(seen[f'{branch}_residual'][1], total)
        assert torch.equal(seen['ffn_shortcut'][0], seen['attn_residual'][1])
    if 'out_norm' not in facts.no_parts:
        norm = peft.get_submodule(facts.out_norms[-1])
        y = norm.peft['look']['out_norm'].seen[1]
        assert torch.equal(outs[1].flatten(2).transpose(1, 2),
                           y.flatten(1, -2)[:, facts.extra:])
    conv = peft.get_submodule(facts.stem).peft['look']['patch_embed']
    assert conv.seen[1].shape == (2, *facts.grid, 16)
    assert conv.site.out_dims == 16


@pytest.mark.parametrize('site', MAP_SITES + PART_SITES)
def test_the_result_takes_its_place(kind, image, site):
    if site in KINDS[kind].no_parts or not offered(kind, (site, )):
        return
    stock, peft = both(kind, Add, at=(site, ), layers=None)
    stock.eval(), peft.eval()
    before = run(stock, image)
    modules = [m for m in peft.modules() if isinstance(m, Add)]
    mine = [m for m in modules if m.site.name == site]
    assert mine
    for module in modules:
        module.shift.data.fill_(.5 if module in mine else 0)
    # The last output comes after all of them.
    assert (run(peft, image)[-1] - before[-1]).abs().max() > 1e-4


def test_parts_follow_layers_and_outputs(kind):
    last_stage = list(find_family(build_pair(kind, 'Frozen')[0]))[-1][1].stage
    facts, sites = KINDS[kind], offered(kind)
    _, peft = both(kind, Look, at=sites, layers=f'stage:{last_stage}')
    for path in facts.out_norms[-1:]:
        assert not hasattr(peft.get_submodule(path), 'peft')
    _, peft = both(kind, Look, at=sites)
    found = {
        m.site.name: m.site.block
        for m in peft.modules()
        if isinstance(m, Look) and m.site.name in PART_SITES
    }
    assert set(found) == set(PART_SITES) - set(facts.no_parts)
    eject(peft)
    assert not any('peft' in k for k in peft.state_dict())
    assert not any('peft' in n for n, _ in peft.named_modules())


@pytest.mark.parametrize('site', TOKEN_SITES)
def test_no_tokens_is_stock_attention(kind, image, site):
    """The family's own attention, with nothing that joins it."""
    if not offered(kind, (site, )):
        return
    stock, peft = both(kind, Prompt, at=site, num=0)
    for a, b in zip(run(stock, image), run(peft, image)):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


@pytest.mark.parametrize('carries', [False, True])
@pytest.mark.parametrize('site', TOKEN_SITES)
def test_samples_do_not_mix(kind, image, site, carries):
    if carries and site != 'tokens' or not offered(kind, (site, )):
        return
    _, peft = both(kind, Prompt, at=site, carries=carries)
    peft.eval()
    other = image.clone()
    other[1] += 1
    for a, b, alone in zip(
            run(peft, image), run(peft, other), run(peft, image[:1])):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])
        assert torch.allclose(a[:1], alone, atol=1e-5)
    twin = copy.deepcopy(peft)
    for a, b in zip(run(peft, image), run(twin, image)):
        assert torch.equal(a, b)
    assert peft.peft.stream is None or peft.peft.stream.tokens is None


def test_tokens_that_go_on_stand_alone(kind):
    if not offered(kind, ('tokens', )):
        return
    with pytest.raises(PEFTError, match='Prompt and Prompt cannot stand'):
        MODELS.build(
            peft_cfg(kind, [
                dict(type=Prompt, carries=True),
                dict(type=Prompt, name='second')
            ]))


def test_side_network(kind, image):
    stock, peft = both(kind, Count)
    network = peft.peft.count
    for a, b in zip(run(stock, image), run(peft, image)):
        assert torch.equal(a, b)
    paths = [b.path for _, b in find_family(stock)]
    dims = KINDS[kind].dims
    last = max(dims)
    assert network.log == [
        'start', *paths[:2], 'output 0', *([f'stage {last}'] if last else []),
        *paths[2:], f'output {last}'
    ]
    assert peft.peft.stream.states == {} and peft.peft.stream.stage is None
    assert [b.path for b in network.trunk.blocks] == paths
    assert network.trunk.stage_dims == dims
    network.weight.data.fill_(.1)
    outs = run(peft, image)
    for a, b in zip(outs, run(stock, image)):
        assert not torch.equal(a, b)
    sum(o.sum() for o in outs).backward()
    assert {n
            for n, p in peft.named_parameters()
            if p.grad is not None} == {'peft.count.weight'}
    twin = copy.deepcopy(peft)
    assert twin.peft.stream.networks['count'] is twin.peft.count
    assert twin.peft.count is not network
    for a, b in zip(outs, run(twin, image)):
        assert torch.equal(a, b)


def test_side_network_and_checkpointing(kind, image):
    """Beside a method that is recomputed in backward."""
    methods = [dict(type=Count), dict(type='LNTune')]
    build_pair(kind, 'Frozen')
    peft = MODELS.build(peft_cfg(kind, methods, allow_random_base=True))
    peft.peft.count.weight.data.fill_(.1)
    grads = []
    for with_cp in (False, True):
        for _, block in find_family(peft):
            block.module.with_cp = with_cp
        peft.zero_grad()
        sum((o**2).mean() for o in run(peft, image)).backward()
        grads.append([p.grad for p in peft.parameters() if p.requires_grad])
        assert all(g is not None for g in grads[-1])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_side_network_enters_and_writes(kind, image):
    """What its blocks get and pass on, against hooks of the stock blocks."""
    stock, peft = both(kind, Around)
    network = peft.peft.around
    network.weight.data.fill_(.1)
    places = [b.path for b in network.trunk.blocks]
    for path in places:
        block = stock.get_submodule(path)
        block.register_forward_pre_hook(
            lambda _, args: (args[0] + network.shift(args[0]), *args[1:]))
        block.register_forward_hook(
            lambda _, args, y: y - 2 * network.shift(y))
    stock.eval(), peft.eval()
    outs = peft(image)
    for a, b in zip(outs, stock(image)):
        torch.testing.assert_close(a, b)
    assert [path for path, _ in network.log] == places
    stages = len(network.trunk.stage_dims)
    assert [u for _, u in network.log
            ] == ([0, 1, 100, 101] if stages == 2 else [0, 1, 2, 3])
    sum(o.sum() for o in outs).backward()
    assert network.weight.grad != 0


def test_side_network_ends_at_the_last_output():
    pytest.importorskip('mmdet')
    cfg = peft_cfg('mmdet', dict(type=Count), out_indices=(0, ))
    network = MODELS.build(cfg).peft.count
    assert {b.stage for b in network.trunk.blocks} == {0}
    cfg = peft_cfg('mmdet', dict(type=Count, layers='stage:0'))
    cfg['out_indices'] = (1, )
    with pytest.raises(PEFTError, match=r'none of the stages .*\[0\]'):
        MODELS.build(cfg)


def test_outputs_behind_the_patch_merging_are_refused():
    pytest.importorskip('mmpretrain')
    cfg = peft_cfg('mmpretrain', dict(type=Count), out_after_downsample=True)
    with pytest.raises(PEFTError, match='out_after_downsample=True takes'):
        MODELS.build(cfg)


def test_an_error_leaves_no_state(kind, image):
    _, peft = both(kind, Count)
    with pytest.raises(Exception):
        peft(torch.zeros(1, 1, 8, 8))
    assert peft.peft.stream.states == {}


def test_every_site_is_in_the_table():
    import os.path as osp
    root = osp.dirname(osp.dirname(osp.abspath(__file__)))
    text = open(osp.join(root, 'docs', 'en', 'sites.md')).read()
    assert all(f'`{site}`' in text for site in (*SITES, 'stage_out'))


def test_methods_and_families_do_not_know_each_other():
    import re
    from pathlib import Path

    import mmpeft
    from mmpeft.registry import METHODS
    package = Path(mmpeft.__file__).parent
    METHODS.import_from_location()
    # Three of the names are words as well.
    names = '|'.join({*METHODS.module_dict} - {'Full', 'Frozen', 'Partial'})
    for file in (package / 'methods').glob('*.py'):
        imports = re.findall(r'^\s*(?:from|import) (\S+)', file.read_text(),
                             re.M)
        assert not any(
            re.search(r'backbones|mmdet|mmseg|mmpretrain|mmcv|timm', name)
            for name in imports), file
    for file in (package / 'backbones').glob('*.py'):
        assert not re.search(rf'\b({names})\b', file.read_text()), file
