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
from conftest import calibrate
from mmengine import registry
from mmengine.config import Config, utils
from mmengine.registry import MODELS
from narrow import narrow

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
    'upernet_vit-b_pascal-context': (6e-5, .1, (2, 5, 8, 11)),
    'vit-b_cub': (1e-3, .1, None),
    'vit-b_vtab': (1e-3, .1, None),
    'swin-b_cub': (1e-3, .1, None),
}
SWINS = [t for t in RECIPES if 'swin' in t and t != 'swin-b_cub']
READERS = {'neck', 'head', 'decode_head', 'auxiliary_head'}
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
    assert backbone.stock == ('mmpretrain.VisionTransformer' if 'vit' in task
                              else f'{cfg.default_scope}.SwinTransformer')
    assert backbone.method.type == FOLDERS[method]
    full = load('full', task)
    full.model.backbone.method = backbone.method
    if getattr(METHODS.get(FOLDERS[method]), 'replaces_outputs', False):
        # Other maps need other necks and heads, which check_readers looks at.
        full.model.update({k: cfg.model[k] for k in READERS & {*cfg.model}})
    hooks = METHODS.get(FOLDERS[method]).hooks
    # Their arguments may be a method's own.
    found, expected = ([h['type'] for h in c]
                       for c in (cfg.pop('custom_hooks', []),
                                 [*full.pop('custom_hooks', []), *hooks]))
    assert found == expected
    assert cfg.to_dict() == full.to_dict()


@pytest.mark.parametrize('task', TASKS)
def test_every_type_resolves(task):
    cfg = load('full', task)
    assert cfg.custom_imports.imports == ['mmpeft']
    for name in ('report', 'checkpoint'):
        hook = cfg.default_hooks[f'peft_{name}']
        assert hook.type == f'mmpeft.PEFT{name.title()}Hook'
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
    backbone = cfg.model.backbone
    assert backbone.drop_path_rate == drop_path
    assert backbone.get('out_indices') == outputs


@pytest.mark.parametrize('task', SWINS)
def test_recipe_of_swin(task):
    cfg = load('full', task)
    undecayed = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert set(undecayed) == {
        'absolute_pos_embed', 'relative_position_bias_table', 'norm'
    }
    backbone = cfg.model.backbone
    assert backbone.window_size == 7
    width = dict(b=128, l=192)[task.split('swin-')[1][0]]
    assert backbone.embed_dims == width
    assert list(backbone.num_heads) == [width // 32 * 2**i for i in range(4)]
    assert '22k' in backbone.init_cfg.checkpoint
    # mmdet reads files of the original repository, mmseg its own.
    original = 'SwinTransformer/storage' in backbone.init_cfg.checkpoint
    assert original == bool(backbone.get('convert_weights'))
    first = cfg.model.get('neck') or cfg.model.decode_head
    assert list(first.in_channels) == [width * 2**i for i in RECIPES[task][2]]


def test_norms_of_vit_are_not_decayed():
    from mmengine.optim import DefaultOptimWrapperConstructor
    cfg = narrow(load('full', 'upernet_vit-b_pascal-context'))
    model = torch.nn.ModuleDict(
        dict(backbone=MODELS.build(cfg.model.backbone)))
    wrapper = cfg.optim_wrapper
    build = DefaultOptimWrapperConstructor(wrapper,
                                           wrapper.pop('paramwise_cfg'))
    optimizer = build(model).optimizer
    decayed = {
        id(g['params'][0])
        for g in optimizer.param_groups if g['weight_decay']
    }
    names = {n for n, p in model.named_parameters() if id(p) not in decayed}
    assert names == {
        n
        for n, _ in model.named_parameters()
        if '.ln' in n or 'pos_embed' in n or 'cls_token' in n
    }


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
    counts = {}  # of backbones that differ in more than their weights
    for task, row in rows.items():
        cfg = load(method, task).model.backbone
        key = str({k: v for k, v in cfg.items() if k != 'init_cfg'})
        if key not in counts:
            with torch.device('meta'):
                counts[key] = mmpeft.count_params(MODELS.build(cfg))
        count = counts[key]
        trainable = count['backbone_trainable']
        percent = 100 * trainable / count['backbone_total']
        assert row['Trainable (M)'] == f'{trainable / 1e6:.3f}', task
        assert row['Of backbone'] == f'{percent:.2f}%', task


@pytest.mark.parametrize('method, task', PAIRS)
def test_backbone_forward(method, task):
    cfg = narrow(load(method, task))
    backbone = MODELS.build(cfg.model.backbone)
    calibrate(backbone, (1, 3, 64, 96))
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    if method == 'hst':
        expected = [(1, w, 16 // 2**i, 24 // 2**i)
                    for i, w in enumerate((32, 48, 64, 72))]
    elif method == 'vit_adapter':
        expected = [(1, 16, 16 // 2**i, 24 // 2**i) for i in range(4)]
    elif task in ('vit-b_cub', 'vit-b_vtab'):
        expected = [(1, 16)]
    elif 'vit' in task:
        expected = [(1, 16, 4, 6)] * 4
    elif task == 'swin-b_cub':
        expected = [(1, 128, 2, 3)]
    else:
        expected = [(1, 16 * 2**i, 16 // 2**i, 24 // 2**i)
                    for i in cfg.model.backbone.get('out_indices', range(4))]
    assert [tuple(m.shape) for m in maps] == expected


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
