"""Held-out splits, and folders whose kind is read from them."""
import json
from collections import Counter

import cv2
import numpy as np
import pytest
from bench_parts import write_python

import mmpeft  # noqa: F401 (makes the names mmseg::… resolve)
from mmpeft.bench.cell_config import TaskConfigs
from mmpeft.bench.plan import Task
from mmpeft.bench.plan_file import load_plan
from mmpeft.errors import MissingFileError, PEFTError
from mmpeft.preflight import check_files

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


def picture(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros(size, np.uint8))


@pytest.fixture
def coco(tmp_path):
    """Ten images with a thing each, five to validate."""
    root = tmp_path / 'coco'
    for split, count in (('train', 10), ('val', 5)):
        images = [
            dict(id=i, file_name=f'{i}.jpg', width=8, height=8)
            for i in range(count)
        ]
        things = [
            dict(
                id=i,
                image_id=i,
                category_id=1 + i % 2,
                bbox=[0, 0, 4, 4],
                area=16,
                iscrowd=0,
                segmentation=[[0, 0, 4, 0, 4, 4]]) for i in range(count)
        ]
        file = root / f'annotations/instances_{split}.json'
        file.parent.mkdir(parents=True, exist_ok=True)
        categories = [dict(id=1, name='cell'), dict(id=2, name='nucleus')]
        file.write_text(
            json.dumps(
                dict(images=images, annotations=things,
                     categories=categories)))
        for image in images:
            picture(root / 'images' / split / image['file_name'])
    return root


@pytest.fixture
def seg(tmp_path):
    root = tmp_path / 'seg'
    for split, count in (('train', 10), ('val', 5)):
        for i in range(count):
            picture(root / 'img_dir' / split / f'{i}.jpg')
            picture(root / 'ann_dir' / split / f'{i}.png')
    (root / 'classes.txt').write_text('ground\ntumour\nvessel\n')
    return root


def configs_of(root, tmp_path):
    """Of the preset, with weights from nowhere."""
    task = load_plan('specialised', data_root=str(root)).tasks['data']
    return TaskConfigs(task, str(tmp_path / 'out'))


def without_weights(cfg):
    cfg.model.backbone.init_cfg = None
    return cfg


def test_a_coco_folder(coco, tmp_path):
    configs = configs_of(coco, tmp_path)
    final, tune = (
        without_weights(configs.phases[p]) for p in ('final', 'tune'))
    for cfg in (final, tune):
        check_files(cfg, 'train')
        assert cfg.model.roi_head.bbox_head.num_classes == 2
        assert cfg.model.roi_head.mask_head.num_classes == 2
    assert final.val_dataloader.dataset.data_prefix.img == 'images/val'
    assert final.train_dataloader.dataset.metainfo.classes == ('cell',
                                                               'nucleus')
    images = {}
    for split in ('train', 'val'):
        loaded = json.load(open(tune[f'{split}_dataloader'].dataset.ann_file))
        images[split] = {i['id'] for i in loaded['images']}
        assert {a['image_id'] for a in loaded['annotations']} == images[split]
    # The tenth image is held out.
    assert images == dict(train=set(range(9)), val={9})
    assert tune.val_evaluator.ann_file == \
        tune.val_dataloader.dataset.ann_file
    assert tune.val_dataloader.dataset.data_prefix.img == 'images/train'
    assert tune.val_dataloader.dataset.pipeline == \
        final.val_dataloader.dataset.pipeline


def test_an_mmseg_folder(seg, tmp_path):
    from mmengine.registry import DATASETS, init_default_scope
    configs = configs_of(seg, tmp_path)
    init_default_scope('mmseg')
    names = {}
    for phase, cfg in configs.phases.items():
        check_files(without_weights(cfg), 'train')
        assert cfg.model.decode_head.num_classes == 3
        for split in ('train', 'val'):
            dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
            names[phase, split] = {
                dataset.get_data_info(i)['img_path']
                for i in range(len(dataset))
            }
    sizes = {key: len(found) for key, found in names.items()}
    assert sizes == {
        ('final', 'train'): 10,
        ('final', 'val'): 5,
        ('tune', 'train'): 9,
        ('tune', 'val'): 1
    }
    assert names['tune', 'train'] | names['tune', 'val'] == \
        names['final', 'train']


def test_a_vtab_folder(tmp_path, monkeypatch):
    root = tmp_path / 'task'
    root.mkdir()
    for name in ('train800', 'val200', 'train800val200', 'test'):
        (root / f'{name}.txt').write_text(''.join(f'images/{i}.jpg {i % 3}\n'
                                                  for i in range(6)))
    configs = configs_of(root, tmp_path)
    files = Counter()
    for phase, cfg in configs.phases.items():
        check_files(without_weights(cfg), 'train')
        assert cfg.model.head.num_classes == 3
        files.update((phase, cfg[f'{s}_dataloader'].dataset.ann_file)
                     for s in ('train', 'val'))
    assert set(files) == {('final', 'train800val200.txt'),
                          ('final', 'test.txt'), ('tune', 'train800.txt'),
                          ('tune', 'val200.txt')}


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(MissingFileError, match='VTAB'):
        load_plan('specialised', data_root=str(tmp_path))


def test_several_sets_in_one_cannot_be_held_out(tmp_path):
    sets = dict(type='ConcatDataset', datasets=[dict(type='A')])
    config = write_python(
        tmp_path / 'c.py',
        model=dict(),
        train_dataloader=dict(dataset=dict(type='Repeat', dataset=sets)),
        val_dataloader=dict(dataset=dict(type='A')))
    task = Task(
        't', config, 'mIoU', dict(Full='Full'), lrs=(1., 2.), holdout=5)
    with pytest.raises(PEFTError, match='cannot split ConcatDataset'):
        TaskConfigs(task, str(tmp_path))
