"""Every shipped config loads, builds and is what its README says."""
import contextlib
import copy
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine import registry
from mmengine.config import Config, utils
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

import mmpeft
from mmpeft.engine.listing import list_methods
from mmpeft.registry import METHODS

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location(
    'check_metafile', ROOT / '.dev_scripts/check_metafile.py')
checker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checker)

# Folders and their methods, by the name that a method has in keys.
FOLDERS = {row['name']: row['method'] for row in list_methods()}
TASKS = sorted(p.stem for p in (ROOT / 'configs/full').glob('*.py'))
PUBLISHED = [t for t in TASKS if checker.DEMO not in t]
PAIRS = [(f, t) for f in FOLDERS for t in TASKS
         if (ROOT / f'configs/{f}/{t}.py').is_file()]
# Learning rate, drop-path and outputs of the recipes.
RECIPES = {
    'mask-rcnn_swin-b_coco': (1e-4, .2, (0, 1, 2, 3)),
    'cascade-mask-rcnn_swin-b_3x_coco': (1e-4, .3, (0, 1, 2, 3)),
    'retinanet_swin-l_voc0712': (1e-4, .2, (1, 2, 3)),
    'upernet_swin-l_ade20k': (6e-5, .3, (0, 1, 2, 3)),
    'upernet_swin-b_pascal-context': (6e-5, .3, (0, 1, 2, 3)),
}
# Not looked up in a registry: mmcv.ops finds them by name.
UNREGISTERED = ('nms', 'RoIAlign')

# mmengine reads all metafiles of a library for every inherited config.
read_once = functools.lru_cache(maxsize=None)(utils.load)


@functools.lru_cache(maxsize=None)
def loaded(method, task):
    with mock.patch.object(utils, 'load', read_once):
        return Config.fromfile(mmpeft.config_path(f'{method}/{task}.py'))


def load(method, task):
    return copy.deepcopy(loaded(method, task))


def shrunken(cfg):
    """The same config with a backbone for a test."""
    backbone = cfg.model.backbone
    outputs = backbone.get('out_indices', (0, 1, 2, 3))
    backbone.update(
        embed_dims=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        out_indices=outputs,
        init_cfg=None,
        allow_random_base=True)
    for argument in ('dim', 'rank', 'num_tokens', 'adaptformer_dim'):
        if argument in backbone.method:
            backbone.method[argument] = 4
    widths = [16 * 2**i for i in outputs]
    if 'neck' in cfg.model:
        cfg.model.neck.in_channels = widths
        _fewer_boxes(cfg.model.train_cfg)
        return cfg
    for name in ('decode_head', 'auxiliary_head'):
        head = cfg.model.get(name)
        if head is not None:
            index = head.in_index
            head.in_channels = [widths[i] for i in index] if isinstance(
                index, (list, tuple)) else widths[index]
            head.channels = 16
    return cfg


def _fewer_boxes(train_cfg):
    if 'rcnn' in train_cfg:
        train_cfg.rpn_proposal.max_per_img = 16
        stages = train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 8


def types(value, path=''):
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        if isinstance(value.get('type'), str):
            yield path, value['type']
        for key, child in value.items():
            yield from types(child, f'{path}.{key}')


def test_folders():
    assert sorted(FOLDERS) == [f.name for f in checker.method_folders(ROOT)]
    assert sorted(PUBLISHED) == sorted(RECIPES)


@pytest.mark.parametrize('method, task', PAIRS)
def test_methods_are_compared_on_equal_terms(method, task):
    cfg = load(method, task)
    backbone = cfg.model.backbone
    assert backbone.type == 'mmpeft.PEFTBackbone'
    assert backbone.stock == f'{cfg.default_scope}.SwinTransformer'
    assert backbone.method.type == FOLDERS[method]
    full = load('full', task)
    full.model.backbone.method = backbone.method
    hooks = METHODS.get(FOLDERS[method]).hooks
    assert cfg.pop('custom_hooks',
                   []) == full.pop('custom_hooks', []) + list(hooks)
    assert cfg.to_dict() == full.to_dict()


@pytest.mark.parametrize('task', TASKS)
def test_every_type_resolves(task):
    cfg = load('full', task)
    assert cfg.custom_imports.imports == ['mmpeft']
    assert cfg.default_hooks.peft_report.type == 'mmpeft.PEFTReportHook'
    registries = [
        r for r in vars(registry).values() if isinstance(r, registry.Registry)
    ]
    with contextlib.ExitStack() as stack:
        registries = [
            stack.enter_context(
                r.switch_scope_and_registry(cfg.default_scope))
            for r in registries
        ]
        for path, name in types(cfg.to_dict()):
            if name not in UNREGISTERED and not path.endswith('.method'):
                assert any(r.get(name) for r in registries), f'{path}: {name}'
    for name in FOLDERS.values():
        assert METHODS.get(name) is not None


@pytest.mark.parametrize('task', PUBLISHED)
def test_recipe(task):
    cfg = load('full', task)
    rate, drop_path, outputs = RECIPES[task]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr) == ('AdamW', rate)
    undecayed = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert set(undecayed) == {
        'absolute_pos_embed', 'relative_position_bias_table', 'norm'
    }
    backbone = cfg.model.backbone
    assert backbone.drop_path_rate == drop_path
    assert tuple(backbone.out_indices) == outputs
    assert backbone.window_size == 7
    width = dict(b=128, l=192)[task.split('swin-')[1][0]]
    assert backbone.embed_dims == width
    assert list(backbone.num_heads) == [width // 32 * 2**i for i in range(4)]
    assert '22k' in backbone.init_cfg.checkpoint
    # mmdet reads files of the original repository, mmseg its own.
    original = 'SwinTransformer/storage' in backbone.init_cfg.checkpoint
    assert original == bool(backbone.get('convert_weights'))
    first = cfg.model.get('neck') or cfg.model.decode_head
    assert list(first.in_channels) == [width * 2**i for i in outputs]


@pytest.mark.parametrize('method', FOLDERS)
def test_readme_has_the_counts_of_the_built_backbone(method, monkeypatch):
    """Built at full width on the meta device, which costs no memory."""
    # The stock constructors read the values of this one.
    monkeypatch.setattr(torch, 'linspace',
                        functools.partial(torch.linspace, device='cpu'))
    rows = checker.readme_rows(ROOT / 'configs' / method)
    files = (ROOT / 'configs' / method).glob('*.py')
    assert sorted(rows) == sorted(f.stem for f in files
                                  if checker.DEMO not in f.stem)
    for task, row in rows.items():
        with torch.device('meta'):
            backbone = MODELS.build(load(method, task).model.backbone)
        count = mmpeft.count_params(backbone)
        trainable = count['backbone_trainable']
        percent = 100 * trainable / count['backbone_total']
        assert row['Trainable (M)'] == f'{trainable / 1e6:.3f}', task
        assert row['Of backbone'] == f'{percent:.2f}%', task


@pytest.mark.parametrize('method, task', PAIRS)
def test_backbone_forward(method, task):
    cfg = shrunken(load(method, task))
    outputs = cfg.model.backbone.out_indices
    backbone = MODELS.build(cfg.model.backbone)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps
            ] == [(1, 16 * 2**i, 16 // 2**i, 24 // 2**i) for i in outputs]


@pytest.mark.parametrize('task', TASKS)
def test_whole_model_trains(task):
    cfg = shrunken(load('mona', task))
    init_default_scope(cfg.default_scope)
    # As the Runner does where there is one process.
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs
        batch = demo_mm_inputs(
            2, [[3, 64, 64]] * 2, num_classes=5, with_mask=True)
        batch = model.data_preprocessor(batch, True)
        losses = model(**batch, mode='loss')
        loss, _ = model.parse_losses(losses)
    else:
        # 2 x 2 is the smallest pooled map that BN can normalise.
        maps = model(torch.randn(2, 3, 64, 64), mode='tensor')
        assert maps.shape[1] == cfg.model.decode_head.num_classes
        loss = maps.mean()
    loss.backward()
    grads = [
        p.grad for n, p in model.named_parameters()
        if n.startswith('backbone.') and p.requires_grad
    ]
    assert grads and all(g is not None for g in grads)


@pytest.mark.parametrize('text', [
    "_base_ = '{path}'",
    "_base_ = __import__('mmpeft').config_path('mona/{name}')",
])
def test_stock_tool_reads_a_path(text, tmp_path):
    """A stock tool does not import mmpeft before it reads bases."""
    name = 'upernet_swin-l_ade20k.py'
    child = tmp_path / 'child.py'
    path = ROOT / 'configs/mona' / name
    child.write_text(text.format(path=path, name=name) + '\n')
    code = ('import sys; from mmengine.config import Config; '
            'print(Config.fromfile(sys.argv[1]).model.backbone.type)')
    done = subprocess.run([sys.executable, '-c', code, child],
                          capture_output=True,
                          text=True,
                          cwd=ROOT)
    assert done.stdout.strip().endswith('mmpeft.PEFTBackbone'), done.stderr
