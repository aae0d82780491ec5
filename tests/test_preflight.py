"""Missing data and weights are one sentence, before a model is built."""
import os.path as osp

import pytest
import torch
from mmengine.config import Config

from mmpeft.errors import MissingFileError, PEFTError
from mmpeft.preflight import check_files

URL = 'https://example.invalid/weights/swin.pth'


@pytest.fixture
def coco(tmp_path):
    """A COCO-format train and validation set, complete but empty."""
    pytest.importorskip('mmdet')
    for folder in ('annotations', 'train2017', 'val2017'):
        (tmp_path / folder).mkdir()
    loaders = {}
    for split in ('train', 'val'):
        name = f'annotations/instances_{split}2017.json'
        (tmp_path / name).write_text('{}')
        loaders[f'{split}_dataloader'] = dict(
            dataset=dict(
                type='CocoDataset',
                data_root=str(tmp_path),
                ann_file=name,
                data_prefix=dict(img=f'{split}2017/'),
                pipeline=[]))
    return Config(
        dict(
            default_scope='mmdet',
            val_evaluator=dict(
                type='CocoMetric',
                ann_file=str(tmp_path / 'annotations/instances_val2017.json')),
            **loaders))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty weight cache and a counted, fake download."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    for name in ('LOCAL_RANK', 'SLURM_LOCALID', 'RANK'):
        monkeypatch.delenv(name, raising=False)
    calls = []

    def download(url, file, *args, **kwargs):
        calls.append((url, file))
        torch.save(dict(state_dict={}), file)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    return calls


def missing(cfg, mode=None):
    """The message, which must be one line."""
    with pytest.raises(MissingFileError) as error:
        check_files(cfg, mode)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_complete_data_passes(coco):
    check_files(coco)


def test_error_is_for_users(coco):
    coco.train_dataloader.dataset.data_root = '/nowhere'
    with pytest.raises(PEFTError):
        check_files(coco)
    with pytest.raises(FileNotFoundError):
        check_files(coco)


def test_missing_root_says_where_and_how(coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    coco.train_dataloader.dataset.data_root = 'data/coco/'
    message = missing(coco)
    assert f'looked for {tmp_path}/data/coco' in message
    assert 'mim download mmdet --dataset coco2017 --dest data/coco' in message
    assert 'train_dataloader.dataset.data_root' in message


def test_missing_annotation_and_images(coco, tmp_path):
    (tmp_path / 'annotations/instances_val2017.json').unlink()
    assert 'val_dataloader.dataset.ann_file' in missing(coco)
    coco.val_dataloader.dataset.ann_file = ''
    assert 'val_evaluator.ann_file' in missing(coco)
    (tmp_path / 'train2017').rmdir()
    assert 'train_dataloader.dataset.data_prefix.img' in missing(coco)


def test_own_data_is_not_told_to_download_coco(coco):
    dataset = coco.train_dataloader.dataset
    dataset.update(ann_file='mine.json', metainfo=dict(classes=('a', )))
    message = missing(coco)
    assert 'mim download' not in message
    assert 'mine.json' in message


def test_only_what_the_mode_uses(coco):
    coco.test_dataloader = dict(
        dataset=dict(coco.val_dataloader.dataset, data_root='/nowhere'))
    check_files(coco)
    assert 'test_dataloader' in missing(coco, 'test')
    coco.train_dataloader.dataset.data_root = '/nowhere'
    coco.test_dataloader = coco.val_dataloader
    check_files(coco, 'test')
    with pytest.raises(ValueError, match='mode'):
        check_files(coco, 'val')


def test_config_without_training_data_is_a_test(coco, hub):
    coco.test_dataloader = coco.val_dataloader
    coco.model = weights(URL).model
    coco.train_dataloader = coco.val_dataloader = None
    check_files(coco)
    assert not hub
    coco.test_dataloader.dataset.data_root = '/nowhere'
    assert 'test_dataloader' in missing(coco)


@pytest.mark.parametrize('wrap', [
    lambda d: dict(type='RepeatDataset', times=2, dataset=d),
    lambda d: dict(type='ConcatDataset', datasets=[d]),
    lambda d: dict(
        type='ClassBalancedDataset',
        oversample_thr=0.1,
        dataset=dict(type='mmengine.ConcatDataset', datasets=[d])),
])
def test_wrapped(coco, wrap):
    dataset = coco.train_dataloader.dataset
    coco.train_dataloader.dataset = wrap(dataset)
    check_files(coco)
    dataset.ann_file = 'gone.json'
    coco.train_dataloader.dataset = wrap(dataset)
    assert 'gone.json' in missing(coco)


def test_no_false_alarm(coco, tmp_path):
    """Remote stores, unknown types and self-made data are left alone."""
    dataset = coco.train_dataloader.dataset
    gone = dict(dataset, data_root='/nowhere')
    for leave in (
            dict(gone, data_root='s3://bucket/coco'),
            dict(gone, backend_args=dict(backend='petrel')),
            dict(gone, type='NotRegisteredAnywhere'),
            dict(type='mmpretrain.CIFAR10', data_root='/nowhere'),
            # An absolute path does not need the root.
            dict(
                gone,
                ann_file=osp.join(dataset.data_root, dataset.ann_file),
                data_prefix=dict(img=str(tmp_path / 'train2017')))):
        coco.train_dataloader.dataset = leave
        check_files(coco)
    # Pictures from a store, labels on disk.
    lmdb = [dict(type='LoadImageFromFile', backend_args=dict(backend='lmdb'))]
    coco.train_dataloader.dataset = dict(
        dataset, data_prefix=dict(img='gone'), pipeline=lmdb)
    check_files(coco)


def test_subclass_that_reads_elsewhere_is_left_alone(coco):
    from mmdet.datasets import CocoDataset

    class Renamed(CocoDataset):
        METAINFO = dict(classes=('a', ))

    class SelfMade(CocoDataset):

        def full_init(self):
            """Generates its files."""

    dataset = coco.train_dataloader.dataset
    dataset.data_root = '/nowhere'
    dataset.type = SelfMade
    check_files(coco)
    dataset.type = Renamed
    assert 'Renamed' in missing(coco)


def test_segmentation_labels(tmp_path):
    pytest.importorskip('mmseg')
    (tmp_path / 'images').mkdir()
    dataset = dict(
        type='ADE20KDataset',
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=[dict(type='LoadAnnotations')])
    cfg = Config(
        dict(default_scope='mmseg', train_dataloader=dict(dataset=dataset)))
    assert 'data_prefix.seg_map_path' in missing(cfg)
    assert '#ade20k' in missing(cfg)
    # A test set without labels, of which nothing loads any.
    cfg.train_dataloader.dataset.pipeline = []
    check_files(cfg)


def weights(checkpoint):
    init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    return Config(dict(model=dict(heads=[dict(init_cfg=init_cfg)])))


def test_local_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = missing(weights('swin.pth'))
    assert f'looked for {tmp_path}/swin.pth' in message
    assert '--cfg-options model.heads.0.init_cfg.checkpoint=' in message
    torch.save(dict(state_dict={}), tmp_path / 'swin.pth')
    check_files(weights('swin.pth'))
    assert 'load_from' in missing(Config(dict(load_from='gone.pth')), 'test')
    assert 'model.pretrained' in missing(
        Config(dict(model=dict(pretrained='gone.pth'))))


def test_weights_that_are_not_ours_to_judge():
    for name in ('torchvision://resnet50', 's3://bucket/swin.pth', None):
        check_files(weights(name))
    # A tag of another library; weights that a test does not read.
    check_files(Config(dict(model=dict(pretrained='openai'))))
    check_files(weights('gone.pth'), 'test')


def test_download_fills_the_cache_once(hub, tmp_path):
    check_files(weights(URL))
    file = str(tmp_path / 'torch/hub/checkpoints/swin.pth')
    assert hub == [(URL, file)]
    check_files(weights(URL))
    assert len(hub) == 1


def test_download_on_one_process_per_machine(hub, monkeypatch):
    monkeypatch.setenv('RANK', '8')
    monkeypatch.setenv('LOCAL_RANK', '1')
    check_files(weights(URL))
    assert not hub
    monkeypatch.setenv('LOCAL_RANK', '0')
    check_files(weights(URL))
    assert len(hub) == 1


def test_failed_download_says_where_to_put_the_file(hub, monkeypatch,
                                                    tmp_path):

    def fail(*args, **kwargs):
        raise OSError('Name or service not known')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    message = missing(weights(URL))
    assert URL in message and 'Name or service not known' in message
    assert str(tmp_path / 'torch/hub/checkpoints') in message
    assert '--cfg-options model.heads.0.init_cfg.checkpoint=' in message


def test_local_files_are_checked_before_a_download(hub):
    cfg = weights(URL)
    cfg.load_from = 'gone.pth'
    assert 'gone.pth' in missing(cfg)
    assert not hub
