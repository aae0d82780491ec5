"""Every file of configs/_base_ trains with any method, given by --method."""
import functools
import glob
import os.path as osp
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import utils
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from narrow import narrow

from mmpeft.config import add_method, load_config
from mmpeft.errors import MissingFileError, PEFTError
from mmpeft.preflight import check_files

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
mmpretrain = pytest.importorskip('mmpretrain')

ROOT = Path(__file__).resolve().parents[1]
BASES = sorted(p.stem for p in (ROOT / 'configs/_base_').glob('*.py'))
# What configs/README.md names, for which there is no file of ours.
STOCK = [
    f'mmseg::mask2former/mask2former_swin-{size}-in22k-384x384-pre_8xb2-160k_'
    'ade20k-640x640.py' for size in 'bl'
]
# mmengine reads all metafiles of a library for every inherited config.
read_once = functools.lru_cache(maxsize=None)(utils.load)


def load(name):
    if '::' not in name:
        name = str(ROOT / f'configs/_base_/{name}.py')
    with mock.patch.object(utils, 'load', read_once):
        return load_config(name)


def detection_batch(model, num_classes):
    from mmdet.testing import demo_mm_inputs
    return demo_mm_inputs(
        2, [[3, 64, 64]] * 2, num_classes=num_classes, with_mask=True)


def segmentation_batch(model, num_classes):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    samples = []
    for _ in range(2):
        labels = torch.randint(num_classes, (1, 32, 32))
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        sample.set_metainfo(dict(img_shape=(32, 32)))
        samples.append(sample)
    return dict(
        inputs=list(torch.randint(255, (2, 3, 32, 32))), data_samples=samples)


def classification_batch(model, num_classes):
    from mmpretrain.structures import DataSample
    return dict(
        inputs=torch.randint(255, (2, 3, 64, 64)),
        data_samples=[
            DataSample().set_gt_label(i % num_classes) for i in range(2)
        ])


BATCHES = dict(
    mmdet=(detection_batch, 4),
    mmseg=(segmentation_batch, 6),
    mmpretrain=(classification_batch, 2))


@pytest.mark.parametrize('name', BASES + STOCK)
def test_base_trains(name):
    cfg, at = add_method(load(name), 'Mona:dim=4')
    assert at == 'model.backbone'
    init_default_scope(cfg.default_scope)
    # As the Runner does where there is one process, and for mmpretrain.
    model_cfg = narrow(cfg).model
    if 'data_preprocessor' in cfg:
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = revert_sync_batchnorm(MODELS.build(model_cfg)).train()
    make, num_classes = BATCHES[cfg.default_scope]
    batch = model.data_preprocessor(make(model, num_classes), True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert torch.isfinite(loss)
    trained = {
        n: p.grad
        for n, p in model.named_parameters()
        if n.startswith('backbone.') and p.requires_grad
    }
    assert trained and all('.peft.' in n for n in trained)
    assert all(g is not None for g in trained.values())


@pytest.mark.parametrize('name', BASES)
def test_schedule_ends_with_the_training(name):
    cfg = load(name)
    assert cfg.custom_imports.imports == ['mmpeft']
    schedule, loop = cfg.param_scheduler, cfg.train_cfg
    last = schedule[-1] if isinstance(schedule, list) else schedule
    length = loop.get('max_iters') or loop.max_epochs
    assert last.get('end', length) == length
    assert 'lr' in cfg.optim_wrapper.optimizer


# Weights ------------------------------------------------------------------


def stock_model_of(url):
    """The config that mmpretrain ships for a file of weights."""
    file = osp.basename(url)
    root = osp.join(osp.dirname(mmpretrain.__file__), '.mim')
    for path in glob.glob(osp.join(root, 'configs/*/metafile.yml')):
        if file in Path(path).read_text():
            models = yaml.safe_load(Path(path).read_text())['Models']
            found, = (
                m for m in models if str(m.get('Weights')).endswith(file))
            return osp.join(root, found['Config'])
    found, = (
        p for p in glob.glob(osp.join(root, 'configs/*/*.py'))
        if file in Path(p).read_text())
    return found


def shapes(cfg):
    with torch.device('meta'):
        return {
            k: tuple(v.shape)
            for k, v in MODELS.build(cfg).state_dict().items()
        }


def backbones():
    table = load('parts/vit_backbones').vit
    yield from table.items()
    yield 'swin-b', load('parts/classifier_swin-b').model.backbone


@pytest.mark.parametrize('name, ours', list(backbones()))
def test_backbone_is_the_one_of_the_weights(name, ours, monkeypatch):
    """Every weight of the stock model that the file is from has its place."""
    # The stock constructors read the values of this one.
    monkeypatch.setattr(torch, 'linspace',
                        functools.partial(torch.linspace, device='cpu'))
    url = ours.init_cfg.checkpoint
    init_default_scope('mmpretrain')
    stock = load_config(stock_model_of(url)).model
    assert shapes({**ours, 'method': 'Frozen'}) == shapes(stock.backbone)


# Data ---------------------------------------------------------------------


def test_pascal_context_59_ignores_the_background(tmp_path, monkeypatch):
    import mmcv
    monkeypatch.chdir(tmp_path)
    cfg = load('upernet_vit-b_pascal-context-59')
    assert cfg.model.decode_head.num_classes == 59
    assert cfg.model.auxiliary_head.num_classes == 59
    for key in ('train', 'val', 'test'):
        dataset = cfg[f'{key}_dataloader'].dataset
        assert dataset.type == 'PascalContextDataset59'
    root = Path(dataset.data_root)
    labels = np.arange(60, dtype=np.uint8).reshape(6, 10)
    mmcv.imwrite(labels, str(root / 'SegmentationClassContext/a.png'))
    mmcv.imwrite(
        np.zeros((6, 10, 3), np.uint8), str(root / 'JPEGImages/a.jpg'))
    (root / dataset.ann_file).parent.mkdir(parents=True)
    (root / dataset.ann_file).write_text('a\n')
    init_default_scope('mmseg')
    item = DATASETS.build(dataset)[0]['data_samples'].gt_sem_seg.data
    assert sorted(item.unique().tolist()) == [*range(59), 255]


def test_vtab_reads_a_task(tmp_path, monkeypatch):
    import mmcv
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('VTAB_TASK', 'svhn')
    cfg = load('vit-b_vtab')
    assert cfg.model.head.num_classes == 10
    root = Path(cfg.train_dataloader.dataset.data_root)
    assert root == Path('data/vtab-1k/svhn')
    mmcv.imwrite(np.zeros((20, 30, 3), np.uint8), str(root / 'images/a b.jpg'))
    (root / 'train800val200.txt').write_text('images/a b.jpg 7\n')
    init_default_scope('mmpretrain')
    item = DATASETS.build(cfg.train_dataloader.dataset)[0]
    assert item['inputs'].shape == (3, 224, 224)
    assert item['data_samples'].gt_label.item() == 7
    monkeypatch.setenv('VTAB_TASK', 'mnist')
    with pytest.raises(PEFTError, match="KeyError: 'mnist'"):
        load('vit-b_vtab')


@pytest.mark.parametrize('name, how', [
    ('upernet_swin-b_cityscapes', '2_dataset_prepare.html#cityscapes'),
    ('upernet_vit-b_pascal-context-59', '#pascal-context'),
    ('vit-b_cub', 'https://www.vision.caltech.edu/datasets/cub_200_2011/'),
    ('swin-b_vtab', 'data/vtab-1k/cifar'),
])
def test_missing_data_says_how_to_get_it(name, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('VTAB_TASK', raising=False)
    with pytest.raises(MissingFileError, match=how):
        check_files(load(name))


def test_base_without_a_method_is_refused():
    cfg = load('vit-b_cub')
    with pytest.raises(PEFTError, match='method'):
        MODELS.build(cfg.model.backbone)
