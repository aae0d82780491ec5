"""The look at data, and what stands for a class in it."""
import pytest
import torch
import torch.nn as nn
from conftest import build_pair, stock_cfg, with_method
from kinds import KINDS
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

import mmpeft
from mmpeft.calibration import uncalibrated
from mmpeft.errors import PEFTError
from mmpeft.label_maps import label_maps
from mmpeft.methods import GPS, SCT

METHODS = 'SCT:num_channels=4+GPS'


def loss_of(model, batch):
    return sum((o**3).mean() for o in model(batch))


def backbone(method=METHODS, **kwargs):
    pytest.importorskip('mmseg')
    cfg = with_method(
        stock_cfg('mmseg', **kwargs), method, allow_random_base=True)
    torch.manual_seed(0)
    return MODELS.build(cfg)


def choices(model):
    return {
        k: v
        for k, v in model.state_dict().items()
        if k.endswith('index') and '.peft.' in k
    }


def image():
    torch.manual_seed(2)
    return torch.randn(2, 3, *KINDS['mmseg'].sizes[0])


def test_labels_of_images():
    structures = pytest.importorskip('mmpretrain.structures')
    samples = [
        structures.DataSample().set_gt_label(label)
        for label in (3, [5, 2], torch.tensor([], dtype=torch.long))
    ]
    assert label_maps(samples, (8, 8)).tolist() == [3, 5, -1]


def test_labels_of_pixels():
    structures = pytest.importorskip('mmseg.structures')
    data = torch.tensor([[[0, 1, 255], [2, 2, 2]]])
    sample = structures.SegDataSample(gt_sem_seg=PixelData(data=data))
    found = label_maps([sample], (3, 4))
    assert found.tolist() == [[[0, 1, -1, -1], [2, 2, 2, -1], [-1] * 4]]


def test_labels_of_boxes():
    """The smallest box decides; what is no image has no class."""
    structures = pytest.importorskip('mmdet.structures')
    from mmdet.structures.bbox import HorizontalBoxes
    boxes = torch.tensor([[1., 0., 3., 2.], [0., 0., 4., 4.]])
    samples = []
    for kind in (boxes, HorizontalBoxes(boxes)):
        sample = structures.DetDataSample(metainfo=dict(img_shape=(4, 5)))
        sample.gt_instances = InstanceData(
            bboxes=kind, labels=torch.tensor([7, 0]))
        samples.append(sample)
    found = label_maps(samples, (5, 6))
    assert found[0].tolist() == [[1, 8, 8, 1, 0, -1], [1, 8, 8, 1, 0, -1],
                                 [1, 1, 1, 1, 0, -1], [1, 1, 1, 1, 0, -1],
                                 [-1] * 6]
    assert torch.equal(*found)


def test_no_labels():
    assert label_maps(None, (4, 4)) is None
    pytest.importorskip('mmdet')
    from mmdet.structures import DetDataSample
    assert label_maps([DetDataSample()], (4, 4)) is None


@pytest.mark.parametrize(
    'method',
    ['SCT:num_channels=4', 'SCT:num_channels=4,target=mlp', 'GPS', METHODS])
@pytest.mark.parametrize('with_cp', [False, True])
def test_the_model_is_as_it_was(method, with_cp):
    """But for the choices, also with checkpoints, which run blocks again."""
    model = nn.Sequential(
        backbone(method, with_cp=with_cp, drop_path_rate=.5)).train()
    model.norm = nn.BatchNorm2d(32)
    model[0].eval()
    model.norm.weight.grad = torch.ones(32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    seen, batches = [], [image(), image()]
    state = torch.get_rng_state()

    def loss(model, batch):
        out = model.norm(model[0](batch)[1])
        seen.append((model.norm.training, torch.is_grad_enabled()))
        return (out**3).mean()

    mmpeft.calibrate(model, batches, loss)
    # Nobody waits for a loss that has no use.
    assert seen == ([(False, True)] * 2 if 'GPS' in method else [])
    assert model.training and not model[0].training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(model.norm.weight.grad, torch.ones(32))
    assert all(p.grad is None for p in model[0].parameters())
    assert torch.equal(torch.get_rng_state(), state)
    found = choices(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in found), key
    # The next one finds nothing to do, and so looks at nothing.
    mmpeft.calibrate(model, iter(lambda: 1 / 0, None), loss)
    again = nn.Sequential(backbone(method))
    again.norm = model.norm
    mmpeft.calibrate(again, batches, loss)
    other = choices(again)
    assert all(torch.equal(found[k], other[k]) for k in found)


def test_random_numbers_go_on():
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), np.random.rand(), random.random()

    def loss(model, batch):
        draw()
        return loss_of(model, batch)

    model, batch = backbone(), image()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = draw()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    mmpeft.calibrate(model, [batch], loss)
    assert draw() == expected


def test_classes_are_given_by_hand():
    """What has none does not count: an image, or a part of both."""
    batch = image()
    parts = torch.full((2, 60, 44), -1)
    parts[0] = 4
    found = []
    for batches, labels in (([batch[:1]], None), ([batch], [0, -1]),
                            ([batch], parts), ([batch], [0, 1])):
        if isinstance(labels, list):
            labels = torch.tensor(labels)
        model = backbone('SCT:num_channels=4')
        mmpeft.calibrate(model, batches, loss_of,
                         None if labels is None else lambda *args: labels)
        found.append(torch.cat(list(choices(model).values())).tolist())
    assert found[0] == found[1] == found[2] != found[3]


@pytest.mark.parametrize('kwargs,message', [
    (dict(batches=[]), 'given no batch'),
    (dict(batches=[1], loss=None), 'is no model of OpenMMLab.*loss=function'),
])
def test_what_cannot_be(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        mmpeft.calibrate(backbone(), **dict(dict(loss=loss_of), **kwargs))


def test_a_random_base_is_refused_before():
    model = MODELS.build(with_method(stock_cfg('mmseg'), 'SCT:num_channels=4'))
    with pytest.raises(PEFTError, match='frozen weights .* never loaded'):
        mmpeft.calibrate(model, [image()], loss_of)


def test_blocks_and_names():
    """Only what waits looks; two of a kind choose alike."""
    model = backbone([
        dict(type='SCT', num_channels=4, layers=[0, 3]),
        dict(type='SCT', num_channels=4, layers=[3], name='second')
    ])
    waiting = uncalibrated(model)
    assert [m.site.index for m in waiting] == [0, 3, 3]
    waiting[0].settle_on(torch.arange(4))
    mmpeft.calibrate(model, [image()], loss_of)
    assert waiting[0].index.tolist() == [0, 1, 2, 3]
    assert torch.equal(waiting[1].index, waiting[2].index)


def test_a_detector():
    """Boxes are classes, and the loss is that of the task."""
    pytest.importorskip('mmdet')
    from mmdet.testing import demo_mm_inputs
    cfg = Config.fromfile(
        mmpeft.config_path('full/mask-rcnn_swin-nano_shapes.py'))
    init_default_scope('mmdet')
    cfg.model.backbone.update(
        method=METHODS, init_cfg=None, allow_random_base=True)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    batch = demo_mm_inputs(
        2, [[3, 64, 64]] * 2, num_classes=5, num_items=[4, 4], with_mask=True)
    seen = set()
    see = SCT.see

    def look(self, y, layout, labels):
        seen.update(labels.unique().tolist())
        see(self, y, layout, labels)

    SCT.see = look
    try:
        mmpeft.calibrate(model, [batch])
    finally:
        SCT.see = see
    assert {0} < seen <= set(range(6))
    assert not uncalibrated(model)
    index = [m.index for m in model.modules() if isinstance(m, GPS)]
    assert any((i != i[:1]).any() for i in index)


@pytest.mark.parametrize('loss', ['task', 'contrastive'])
def test_a_classifier(loss, tmp_path):
    """In a run, with Mixup, which the look does without."""
    pytest.importorskip('mmpretrain')
    from mmengine.runner import Runner
    from torch.utils.data import Dataset

    class Pictures(Dataset):
        """Noise of four classes."""

        def __len__(self):
            return 12

        def __getitem__(self, index):
            from mmpretrain.structures import DataSample
            sample = DataSample().set_gt_label(index % 4)
            return dict(inputs=torch.randn(3, 48, 48), data_samples=sample)

    backbone_cfg = with_method(stock_cfg('vit'), METHODS)
    backbone_cfg.update(out_type='cls_token', out_indices=-1)
    backbone_cfg.update(allow_random_base=True)
    runner = Runner(
        model=dict(
            type='ImageClassifier',
            data_preprocessor=dict(
                type='ClsDataPreprocessor',
                num_classes=4,
                mean=[0] * 3,
                std=[1] * 3),
            train_cfg=dict(augments=dict(type='Mixup', alpha=1.)),
            backbone=backbone_cfg,
            head=dict(
                type='VisionTransformerClsHead', num_classes=4,
                in_channels=16)),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=4,
            sampler=dict(type='DefaultSampler'),
            collate_fn=dict(type='default_collate'),
            dataset=Pictures()),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
        custom_hooks=[dict(type='mmpeft.CalibrateHook', loss=loss)],
        default_scope='mmpretrain',
        randomness=dict(seed=0),
        experiment_name=f'pictures_{loss}')
    runner.train()
    assert not uncalibrated(runner.model)
    assert runner.model.data_preprocessor.batch_augments is not None


def test_evaluation_without_a_choice_is_the_frozen_model():
    stock, model = build_pair('mmseg', METHODS)
    for module in model.modules():
        if isinstance(module, (SCT, GPS)):
            module.forget()
    batch = image()
    stock.eval(), model.eval()
    for a, b in zip(stock(batch), model(batch)):
        assert torch.equal(a, b)
