"""Folders in the layouts of COCO, mmseg and VTAB, for plans without paths."""
import json
import os
import os.path as osp
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List

from mmengine.config import Config

from ..errors import MissingFileError

if TYPE_CHECKING:
    from .plan import Task

__all__ = ['describe', 'kind_of']

# Below these a folder may have its splits: images and labels of mmseg.
IMAGES = ('images', 'img_dir', 'leftImg8bit')
LABELS = ('annotations', 'ann_dir', 'labels', 'gtFine')
PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def kind_of(root: str) -> str:
    """'coco', 'mmseg' or 'lists' (VTAB's), by what is in the folder.

    Raises:
        MissingFileError: If it is none of them.
    """
    folder = Path(root)
    if (folder / 'annotations/instances_train.json').is_file():
        return 'coco'
    if _first(folder, IMAGES, 'train') and _first(folder, LABELS, 'train'):
        return 'mmseg'
    if (folder / 'train800.txt').is_file():
        return 'lists'
    raise MissingFileError(
        f'{root} is no folder that a plan can read: it has neither '
        'annotations/instances_train.json (COCO), nor images/train with '
        'annotations/train (mmseg), nor train800.txt (VTAB); give one with '
        '--data-root.')


def describe(task: 'Task', cfg: Config) -> Dict[str, Any]:
    """Options that make the config of a task read its folder.

    Args:
        task (Task): ``folder=dict(root=...)``, perhaps with ``tune``,
            ``final`` and ``train``, the names of splits; nothing is done for
            a task without one.
        cfg (Config): Of the task, with the pipelines and the model.

    Returns:
        dict: To be merged into the config.
    """
    if not task.folder:
        return {}
    root = task.folder['root']
    kind = kind_of(root)
    split = task.folder.get('final', 'val')
    if kind == 'lists':
        return _lists(root)
    classes = _coco_classes(root) if kind == 'coco' else _seg_classes(root)
    meta = dict(classes=tuple(classes))
    model: Dict[str, Any] = {}
    _set_classes(cfg.model.to_dict(), model, len(classes))
    options: Dict[str, Any] = dict(model=model)
    for loader, name in (('train', 'train'), ('val', split)):
        own = _pipeline_of(cfg, loader)
        dataset = dict(
            _delete_=True,
            data_root=root,
            metainfo=meta,
            test_mode=loader == 'val',
            pipeline=own)
        if kind == 'coco':
            dataset.update(
                type='mmdet.CocoDataset',
                ann_file=f'annotations/instances_{name}.json',
                data_prefix=dict(img=_coco_images(root, name)))
            if loader == 'train':
                dataset['filter_cfg'] = dict(filter_empty_gt=True)
        else:
            images, labels = (
                _first(Path(root), names, name) for names in (IMAGES, LABELS))
            if not images or not labels:
                raise MissingFileError(f'{root} has no images and labels of '
                                       f'the split {name!r}.')
            meta['palette'] = _palette(len(classes))
            dataset.update(
                type='mmseg.BaseSegDataset',
                img_suffix=_suffix(Path(root) / images),
                seg_map_suffix=_suffix(Path(root) / labels),
                data_prefix=dict(img_path=images, seg_map_path=labels))
        options[f'{loader}_dataloader'] = dict(dataset=dataset)
    if kind == 'coco':
        options['val_evaluator'] = dict(
            ann_file=osp.join(root, f'annotations/instances_{split}.json'))
    return options


def _lists(root: str) -> Dict[str, Any]:
    classes = set()
    for name in ('train800.txt', 'val200.txt'):
        for line in (Path(root) / name).read_text().splitlines():
            classes.add(line.split()[-1])
    return dict(
        train_dataloader=dict(dataset=dict(data_root=root)),
        val_dataloader=dict(dataset=dict(data_root=root)),
        model=dict(head=dict(num_classes=len(classes))))


def _pipeline_of(cfg: Config, loader: str) -> List[dict]:
    dataset = cfg[f'{loader}_dataloader'].to_dict()['dataset']
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return (dataset['datasets'][0]
            if 'datasets' in dataset else dataset)['pipeline']


def _set_classes(model: Any, out: Dict[str, Any], count: int) -> None:
    """Every ``num_classes`` below ``model``, as options; in lists, too, such
    as the boxes of a cascade."""
    for key, value in model.items():
        if key == 'num_classes':
            out[key] = count
        elif isinstance(value, dict):
            inner: Dict[str, Any] = {}
            _set_classes(value, inner, count)
            if inner:
                out[key] = inner
        elif isinstance(value, list) and any(
                isinstance(v, dict) and 'num_classes' in v for v in value):
            out[key] = [dict(v, num_classes=count) for v in value]


def _coco_classes(root: str) -> List[str]:
    file = Path(root) / 'annotations/instances_train.json'
    categories = json.loads(file.read_text())['categories']
    return [c['name'] for c in sorted(categories, key=lambda c: c['id'])]


def _coco_images(root: str, split: str) -> str:
    for name in (f'images/{split}', split, f'{split}2017', 'images'):
        if (Path(root) / name).is_dir():
            return name
    raise MissingFileError(f'{root} has no folder {split} or images/{split}.')


def _first(root: Path, names: tuple, split: str) -> str:
    for name in names:
        if (root / name / split).is_dir():
            return f'{name}/{split}'
    return ''


def _suffix(folder: Path) -> str:
    for file in sorted(os.listdir(folder)):
        if file.lower().endswith(PICTURES):
            return osp.splitext(file)[1]
    raise MissingFileError(f'There are no pictures in {folder}.')


def _seg_classes(root: str) -> List[str]:
    file = Path(root) / 'classes.txt'
    if not file.is_file():
        raise MissingFileError(
            f'{file} is missing: one name per line, in the order of the '
            'numbers in the label maps (255 is ignored).')
    return [line.strip() for line in file.read_text().split('\n') if line]


def _palette(count: int) -> List[List[int]]:
    return [[37 * i % 256, 91 * i % 256, 173 * i % 256] for i in range(count)]
