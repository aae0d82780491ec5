import json
import multiprocessing
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmpeft.datasets import ShapesDataset, ShapesMetric, ensure_shapes
from mmpeft.datasets.shapes import SPLITS
from mmpeft.datasets.shapes_drawing import DOMAINS, draw_scene, draw_shape

SMALL = dict(source_train=3, source_val=2, target_train=3, target_val=2)
# Of the sizes above. If these change, the data changed: every table of the
# demo is void, and VERSION has to go up.
DIGESTS = dict(
    source_train=
    '9710b8321f0075ace8e375603e662cef61c4f363ae5a3f186cdca3a154b1e0c6',
    source_val=
    '9287eb186107c3c37b2fa9606da7b96d0da331486aaabb0ad432bb8ad1453b75',
    target_train=
    'bec392a36d5652ad8d6388f893dd35a646bb765fb87aadd1315850349d8a440f',
    target_val=
    '5c256cf1fc06506738da30c8e674d83a7924e5396412c1aea5c2c3122e2e7d38')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return ensure_shapes(tmp_path_factory.mktemp('data') / 'shapes', SMALL)


def test_pixels_and_annotations_are_always_the_same(root):
    assert json.loads((root / 'digests.json').read_text()) == DIGESTS


def test_full_size_is_balanced():
    assert set(SPLITS) == set(SMALL)
    shared = set(DOMAINS['source'].classes) & set(DOMAINS['target'].classes)
    assert not shared  # the target's classes are new


@pytest.mark.parametrize('split', SMALL)
def test_annotations_label_maps_and_images_agree(root, split):
    mask_api = pytest.importorskip('pycocotools.mask')
    coco = json.loads((root / f'{split}.json').read_text())
    assert len(coco['images']) == SMALL[split]
    assert [c['name'] for c in coco['categories']
            ] == list(DOMAINS[split.split('_')[0]].classes)
    for record in coco['images']:
        image = cv2.imread(str(root / 'images' / split / record['file_name']))
        assert image.shape == (record['height'], record['width'], 3)
        labels = cv2.imread(
            str(root / 'labels' / split / record['file_name']),
            cv2.IMREAD_UNCHANGED)
        seen = np.zeros_like(labels)
        for annotation in coco['annotations']:
            if annotation['image_id'] != record['id']:
                continue
            rle = annotation['segmentation']
            mask = mask_api.decode(mask_api.frPyObjects(rle, *rle['size']))
            assert mask.sum() == annotation['area']
            ys, xs = mask.nonzero()
            x, y, w, h = annotation['bbox']
            assert (x, y) == (xs.min(), ys.min())
            assert (x + w, y + h) == (xs.max() + 1, ys.max() + 1)
            assert not seen[mask > 0].any()
            seen[mask > 0] = annotation['category_id']
        assert (seen == labels).mean() > .99  # slivers are not annotated


@pytest.mark.parametrize('name',
                         [n for d in DOMAINS.values() for n in d.classes])
def test_every_shape_fits_its_radius_and_turns(name):
    upright = draw_shape(name, (64, 64), 30, 0.)
    turned = draw_shape(name, (64, 64), 30, np.pi)
    y, x = upright.nonzero()
    assert ((x - 64)**2 + (y - 64)**2).max() <= 31**2
    assert upright.sum() > 400
    # An edge may fall on the centres of a row of pixels.
    assert abs(turned.sum() / upright.sum() - 1) < .06
    assert (upright[1:, 1:] == turned[:0:-1, :0:-1]).mean() > .98


@pytest.mark.parametrize('domain', DOMAINS)
def test_scenes_keep_neighbours_apart(domain):
    rng = np.random.RandomState(0)
    for _ in range(20):
        image, objects = draw_scene(rng, DOMAINS[domain])
        assert image.dtype == np.uint8 and image.shape == (128, 128, 3)
        assert sum(mask.astype(int) for _, mask in objects).max() <= 1


def test_nothing_is_written_twice(root):
    before = (root / 'digests.json').stat().st_mtime_ns
    ensure_shapes(root, SMALL)
    assert (root / 'digests.json').stat().st_mtime_ns == before


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='does not hold the generated'):
        ensure_shapes(tmp_path, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('mmpeft.datasets.shapes.cv2.imwrite', fail)
    with pytest.raises(KeyboardInterrupt):
        ensure_shapes(tmp_path / 'shapes', SMALL)
    assert not list(tmp_path.iterdir())


def test_processes_that_start_together(tmp_path):
    context = multiprocessing.get_context('fork')
    ranks = [
        context.Process(
            target=ensure_shapes, args=(tmp_path / 'shapes', SMALL))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ['shapes']
    digests = json.loads((tmp_path / 'shapes' / 'digests.json').read_text())
    assert digests == DIGESTS


def test_stock_dataset_and_metric_are_what_is_built(root):
    mmdet = pytest.importorskip('mmdet.datasets')
    metrics = pytest.importorskip('mmdet.evaluation')
    dataset = ShapesDataset(
        stock='mmdet.CocoDataset',
        data_root=str(root),
        ann_file='target_val.json',
        data_prefix=dict(img='images/target_val/'),
        metainfo=dict(classes=DOMAINS['target'].classes),
        test_mode=True)
    assert type(dataset) is mmdet.CocoDataset and len(dataset) == 2
    assert Path(dataset[0]['img_path']).is_file()
    metric = ShapesMetric('mmdet.CocoMetric', str(root), 'target_val.json')
    assert type(metric) is metrics.CocoMetric


def test_the_semantic_twin_is_built(root):
    mmseg = pytest.importorskip('mmseg.datasets')
    dataset = ShapesDataset(
        stock='mmseg.BaseSegDataset',
        data_root=str(root),
        img_suffix='.png',
        data_prefix=dict(
            img_path='images/target_val', seg_map_path='labels/target_val'),
        metainfo=dict(classes=('background', *DOMAINS['target'].classes)))
    assert type(dataset) is mmseg.BaseSegDataset and len(dataset) == 2
    assert Path(dataset[0]['seg_map_path']).is_file()
