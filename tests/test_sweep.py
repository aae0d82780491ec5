"""The sweep of stock configs, on a handful of them."""
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / '.dev_scripts'))

import sweep_run  # noqa: E402
from sweep_find import candidates, transformers  # noqa: E402
from sweep_shrink import shrink  # noqa: E402
from sweep_table import write_table  # noqa: E402

TYPES = transformers()
WORKS = {
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py':
    ('model.backbone', 'mmdet.SwinTransformer'),
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py':
    ('model.backbone', 'mmseg.MixVisionTransformer'),
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py':
    ('model.backbone', 'mmseg.BEiT'),
    'mmpretrain::deit/deit-tiny_4xb256_in1k.py':
    ('model.backbone', 'mmpretrain.VisionTransformer'),
    'mmpretrain::sam/vit-base-p16_sam_headless.py': ('model.backbone',
                                                     'mmpretrain.ViTSAM'),
}
OTHERS = {
    'mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco.py':
    'backbone alone: the model needs a package: ',
    'mmpretrain::mae/benchmarks/vit-base-p16_8xb2048-linear-coslr-90e_in1k.py':
    'refused: frozen_stages=12 ',
    'mmdet::v3det/fcos_swinb_fpn_8x4_sample1e-3_mstrain_v3det_2x.py':
    'stock broken: model: ',
    'mmpretrain::swin_transformer_v2/swinv2-base-w12_8xb128_in21k-192px.py':
    "stock broken: loading: KeyError: 'test_pipeline'",
}


@pytest.fixture(scope='module')
def run():
    return sweep_run.Sweep(TYPES)


@pytest.mark.parametrize('config', WORKS)
def test_works(run, config):
    row = run(config)
    assert (row['at'], row['type']) == WORKS[config]
    assert (row['Mona'], row['LoRA']) == ('works', 'works')


@pytest.mark.parametrize('config', OTHERS)
def test_other_verdicts(run, config):
    row = run(config)
    assert row['Mona'].startswith(OTHERS[config]), row
    assert row['LoRA'].startswith(OTHERS[config]), row


def test_masked_tokens_have_no_grid(run):
    row = run('mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py')
    assert row['type'] == 'mmpretrain.MAEViT'
    assert row['Mona'].startswith('refused: Mona needs the whole grid')
    assert row['LoRA'] == 'works'


def test_no_family(run):
    assert run('mmseg::twins/twins_svt-s_uperhead_8xb2-160k_ade20k-512x512.py'
               ) == dict(type='mmseg.SVT')
    assert run('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py') is None


def test_candidates_follow_bases():
    found = set(candidates('mmseg', {'BEiT'}))
    # The large one changes the base one and names no type.
    assert 'mmseg::beit/beit-large_upernet_8xb1-amp-160k_ade20k-640x640.py' \
        in found
    assert not any('deeplab' in config for config in found)


def test_shrinking_keeps_what_configs_differ_in():
    node = dict(
        type='mmdet.SwinTransformer',
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='nowhere'))
    small, shape = shrink(node, TYPES['mmdet.SwinTransformer'])
    assert small == dict(
        type='mmdet.SwinTransformer',
        embed_dims=8,
        depths=[2, 2, 18, 2],
        num_heads=[1, 2, 4, 8],
        window_size=12,
        out_indices=(1, 2, 3))
    assert shape == (3, 64, 96)
    small, shape = shrink(
        dict(arch='dinov2-giant', patch_size=14, img_size=518),
        TYPES['mmpretrain.VisionTransformer'])
    assert small['arch']['num_layers'] == 40
    assert small['img_size'] == 224 and shape == (3, 224, 224)


class Toy(nn.Module):
    """Three parameters: one that works, and two in question."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.used, self.other = nn.Parameter(torch.ones(3)), nn.Parameter(
            torch.ones(3))
        self.other.requires_grad = case not in ('frozen', 'written')

    def forward(self, x):
        x = x.flatten(1)[:, :3] * self.used
        if self.case == 'zero':
            x = x + 0. * self.other
        if self.case == 'used':
            x = x + self.other
        if self.case == 'written':
            self.other.grad = torch.ones(3)
        return (x, )


@pytest.mark.parametrize('case, wrong', [
    ('used', []),
    ('frozen', []),
    ('zero', ['the gradient of other is zero']),
    ('written', ['other is frozen and has a gradient']),
    ('unused', ['other has no gradient']),
])
def test_gradients_are_checked(case, wrong):
    assert sweep_run.step(Toy(case), (3, 4, 4)) == wrong


def test_page(tmp_path):
    row = dict(at='model.backbone', type='mmseg.BEiT', LoRA='works')
    refused = dict(
        row, Mona='refused: no `grid`', configs=['mmseg::beit/c.py'])
    good = dict(row, Mona='works', configs=['mmseg::beit/a.py'])
    bad = dict(row, Mona='crash: ValueError: 1', configs=['mmseg::beit/b.py'])
    both = dict(good, configs=good['configs'] + bad['configs'])
    results = dict(
        one=dict(
            versions=dict(torch='1'),
            rows=[both, refused],
            unsupported={'mmseg: mmseg.SVT': ['x', 'y']}),
        two=dict(
            versions=dict(torch='2'),
            rows=[good, bad, refused],
            unsupported={}))
    (tmp_path / 'results.json').write_text(json.dumps(results))
    write_table(tmp_path / 'results.json', tmp_path / 'page.md')
    text = (tmp_path / 'page.md').read_text()
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in text.splitlines() if line.startswith('|')]
    for row in [
        ['`beit/a`', 'BEiT', 'works', 'works'],
        ['`beit/b`', 'BEiT', 'works (one), crash [1] (two)', 'works'],
        ['`beit/c`', 'BEiT', 'refused [2]', 'works'],
        ['mmseg', '`mmseg.SVT`', '2 (one), 0 (two)'],
        ['[1]', '`ValueError: 1`'],
        ['[2]', "`no 'grid'`"],
        [
            'mmseg', 'Mona', '2 (one), 1 (two)', '0', '1', '0',
            '0 (one), 1 (two)'
        ],
    ]:
        assert row in rows


def test_shipped_page_is_of_the_shipped_results(tmp_path):
    results = ROOT / 'docs/en/stock_configs.json'
    write_table(results, tmp_path / 'page.md')
    page = (tmp_path / 'page.md').read_text()
    assert page == results.with_suffix('.md').read_text()
    stacks = json.loads(results.read_text())
    assert sorted(stacks) == ['classic', 'maintained']
    for stack in stacks.values():
        assert not any(row[m].startswith('crash') for row in stack['rows']
                       for m in sweep_run.METHODS)
