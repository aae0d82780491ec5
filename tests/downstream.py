"""A repository of somebody else's, with mmpeft from a wheel."""
import copy
import json
import os
import os.path as osp
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Two images of the generated data; 'coco' has them under names of COCO.
SPLITS = dict(source_train=1, source_val=1, target_train=2, target_val=1)

#: A Swin that trains in no time.
SWIN = dict(embed_dims=8, depths=[1] * 4, num_heads=[1] * 4, drop_path_rate=0.)
CLASSIFIER_SWIN = dict(
    arch=dict(embed_dims=8, depths=[1] * 4, num_heads=[1] * 4),
    img_size=64,
    pad_small_map=True)
LOADERS = {
    f'{split}_dataloader.{key}': value
    for split in ('train', 'val')
    for key, value in dict(
        batch_size=2, num_workers=0, persistent_workers=False).items()
}
#: What makes a config of a Swin with Mask R-CNN tiny, and so on.
DETECTOR = {
    **{
        f'model.backbone.{k}': v
        for k, v in SWIN.items()
    },
    'model.backbone.convert_weights': False,
    'model.backbone.init_cfg.checkpoint': 'mmdet.pth',
    'model.neck.in_channels': [8, 16, 32, 64],
    'model.neck.out_channels': 8,
    'model.rpn_head.in_channels': 8,
    'model.rpn_head.feat_channels': 8,
    'model.roi_head.bbox_roi_extractor.out_channels': 8,
    'model.roi_head.bbox_head.in_channels': 8,
    'model.roi_head.bbox_head.fc_out_channels': 16,
    'model.roi_head.mask_roi_extractor.out_channels': 8,
    'model.roi_head.mask_head.in_channels': 8,
    'model.roi_head.mask_head.conv_out_channels': 8,
    'model.test_cfg.rcnn.score_thr': 0.,
    'train_cfg.max_epochs': 1,
    **LOADERS,
}
SEGMENTOR = {
    **{
        f'model.backbone.{k}': v
        for k, v in SWIN.items()
    },
    'model.backbone.init_cfg.checkpoint': 'mmseg.pth',
    'model.decode_head.in_channels': [8, 16, 32, 64],
    'model.decode_head.channels': 8,
    'model.auxiliary_head.in_channels': 32,
    'model.auxiliary_head.channels': 8,
    'train_cfg.max_iters': 1,
    'train_cfg.val_interval': 1,
    'default_hooks.checkpoint.interval': 1,
    'train_dataloader.batch_size': 2,
}
_FOLDERS = dict(
    _delete_=True,
    type='CustomDataset',
    data_root='data/folders',
    pipeline=[dict(type='LoadImageFromFile'),
              dict(type='PackInputs')])
CLASSIFIER = {
    'model.backbone.arch':
    dict(_delete_=True, **CLASSIFIER_SWIN['arch']),
    'model.backbone.img_size':
    CLASSIFIER_SWIN['img_size'],
    'model.backbone.pad_small_map':
    True,
    'model.backbone.drop_path_rate':
    0.,
    'model.backbone.init_cfg':
    dict(_delete_=True, type='Pretrained', checkpoint='mmpretrain.pth'),
    'model.head.in_channels':
    64,
    'model.head.num_classes':
    2,
    'model.train_cfg':
    None,
    **{
        f'{split}_dataloader.dataset': _FOLDERS
        for split in ('train', 'val', 'test')
    },
    **LOADERS,
    'val_evaluator.topk':
    1,
    'train_cfg.max_epochs':
    1,
    'optim_wrapper.clip_grad':
    None,
}


def config_text(base, values):
    """A config file with a base, and values by dotted key."""
    nested = {}
    for key, value in values.items():
        *path, last = key.split('.')
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = copy.deepcopy(value)
    lines = [f'{key} = {value!r}' for key, value in nested.items()]
    return '\n'.join([f'_base_ = {base}', *lines, ''])


def options(values, **more):
    """``--cfg-options`` of a command line."""
    text = [f'{k}={v}'.replace(' ', '') for k, v in {**values, **more}.items()]
    return ['--cfg-options', *text]


def run(*args, cwd, env=None):
    """Run a Python program; its output, which a failure shows."""
    done = subprocess.run([sys.executable, *map(str, args)],
                          cwd=cwd,
                          env=env,
                          text=True,
                          timeout=1200,
                          stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def build_wheel(tmp_path_factory):
    """A wheel, built by way of the source archive; once per session.

    It is built in a copy, from what setuptools has: no network, and nothing
    appears in the checkout.
    """
    folder = tmp_path_factory.getbasetemp() / 'wheel'
    if not folder.is_dir():
        source = folder / 'source'
        for name in ('mmpeft', 'configs', 'tools', 'requirements'):
            shutil.copytree(
                ROOT / name,
                source / name,
                ignore=shutil.ignore_patterns('__pycache__', '.mim'))
        for name in ('setup.py', 'setup.cfg', 'MANIFEST.in', 'README.md',
                     'LICENSE', 'NOTICE', 'CITATION.cff', 'model-index.yml'):
            shutil.copy(ROOT / name, source / name)
        run('setup.py', '-q', 'sdist', cwd=source)
        archive, = (source / 'dist').glob('*.tar.gz')
        run('-m',
            'pip',
            'wheel',
            '-q',
            '--no-deps',
            '--no-build-isolation',
            '--no-index',
            '-w',
            folder,
            archive,
            cwd=folder)
    path, = folder.glob('*.whl')
    return path


class Repository:
    """A folder with configs and data, where mmpeft is what a wheel has.

    Args:
        folder (Path): An empty folder.
        wheel (Path): What to install, beside it.
    """

    def __init__(self, folder, wheel):
        self.folder = folder / 'repository'
        self.installed = folder / 'installed'
        (self.folder / 'configs').mkdir(parents=True)
        run('-m',
            'pip',
            'install',
            '-q',
            '--no-deps',
            '--no-index',
            '--target',
            self.installed,
            wheel,
            cwd=folder)
        self.mim = self.installed / 'mmpeft' / '.mim'

    def environ(self, *path):
        """Variables under which nothing of the checkout can be imported."""
        return dict(
            os.environ,
            OMP_NUM_THREADS='1',
            CUDA_VISIBLE_DEVICES='',
            PYTHONPATH=os.pathsep.join(map(str, [*path, self.installed])))

    def run(self, *args, path=()):
        """Run a Python program in the repository."""
        return run(*args, cwd=self.folder, env=self.environ(*path))

    def write(self, name, text):
        """Write a file of the repository."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)
        return name

    def add_data(self):
        """The generated data, also as COCO and as folders of classes."""
        from mmpeft.datasets import ensure_shapes
        data = self.folder / 'data'
        shapes = ensure_shapes(data / 'shapes_v1', SPLITS)
        (data / 'coco' / 'annotations').mkdir(parents=True)
        from mmdet.datasets import CocoDataset
        names = CocoDataset.METAINFO['classes']
        for split in ('train', 'val'):
            images = shapes / 'images' / f'target_{split}'
            shutil.copytree(images, data / 'coco' / f'{split}2017')
            for i, image in enumerate(sorted(images.iterdir())):
                folder = data / 'folders' / names[i]
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, folder / f'{split}.png')
            text = (shapes / f'target_{split}.json').read_text()
            annotations = json.loads(text)
            annotations['categories'] = [
                dict(id=i + 1, name=name) for i, name in enumerate(names)
            ]
            path = data / 'coco/annotations' / f'instances_{split}2017.json'
            path.write_text(json.dumps(annotations))

    def add_weights(self):
        """Weights of the tiny backbone; a state dict by library."""
        import torch
        from mmengine.registry import MODELS
        torch.manual_seed(0)
        states = {}
        for library, cfg in (('mmdet', SWIN), ('mmpretrain', CLASSIFIER_SWIN)):
            stock = MODELS.build(
                dict(type=f'{library}.SwinTransformer', **cfg))
            states[library] = stock.state_dict()
        states['mmseg'] = states['mmdet']
        for library, state in states.items():
            # mmdet wants them as in a checkpoint of a whole model.
            prefix = 'backbone.' if library == 'mmdet' else ''
            torch.save({
                prefix + k: v
                for k, v in state.items()
            }, self.folder / f'{library}.pth')
        return states


def stock_tool(library, name='train.py'):
    """A command line tool that another library was installed with."""
    import importlib
    folder = osp.dirname(importlib.import_module(library).__file__)
    return osp.join(folder, '.mim', 'tools', name)
