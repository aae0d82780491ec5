"""Other people's repositories and tools, with mmpeft from a wheel.

Everything runs as its user would run it: by commands, in a folder where the
checkout cannot be imported.
"""
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream import (CLASSIFIER, DETECTOR, ROOT, SEGMENTOR, Repository,
                        build_wheel, config_text, options, stock_tool)
from mmengine.config import Config

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
for library in LIBRARIES:
    pytest.importorskip(library)

#: The rate makes one step visible.
VISIBLE = {'optim_wrapper.optimizer.lr': .02, 'param_scheduler': []}
NAMED = '''_base_ = 'mmpeft::mona/mask-rcnn_swin-b_coco.py'
model = dict(backbone=dict(method=dict(dim=4)))
optim_wrapper = dict(optimizer=dict(lr=0.02))
'''
CONFIGS = dict(
    mmdet=("__import__('mmpeft').config_path("
           "'lora/mask-rcnn_swin-b_coco.py')", DETECTOR, {
               'model.backbone.method.rank': 2
           }),
    mmseg=("__import__('mmpeft').config_path("
           "'lora/upernet_swin-nano_shapes.py')", SEGMENTOR, {
               'model.backbone.method.rank': 2
           }),
    mmpretrain=("__import__('mmpeft').config_path('lora/swin-b_cub.py')",
                CLASSIFIER, {
                    'model.backbone.method.rank': 2
                }))


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
    repo = Repository(
        tmp_path_factory.mktemp('downstream'), build_wheel(tmp_path_factory))
    repo.add_data()
    repo.base = repo.add_weights()
    repo.write('configs/named.py', NAMED)
    for library, (base, tiny, more) in CONFIGS.items():
        repo.write(f'configs/{library}.py',
                   config_text(base, {
                       **tiny,
                       **more,
                       **VISIBLE
                   }))
    return repo


def check_trained(folder, base):
    """What a run left: adapters that moved, and a base that did not."""
    path = Path((folder / 'last_checkpoint').read_text())
    state = torch.load(path, weights_only=False)['state_dict']
    moved = [
        v for k, v in state.items() if '.peft.' in k and v.is_floating_point()
    ]
    assert moved and max(v.abs().max() for v in moved) > 1e-3
    kept = [k for k in base if f'backbone.{k}' in state]
    assert len(kept) > 50
    for key in kept:
        assert torch.equal(state[f'backbone.{key}'], base[key]), key
    return path


def test_the_checkout_is_not_seen(repository):
    out = repository.run(
        '-c', 'import mmpeft; print(mmpeft.__file__, '
        'mmpeft.config_path("mona/mask-rcnn_swin-b_coco.py"))')
    for path in out.split():
        assert Path(path).is_relative_to(repository.installed)


def test_our_tool_trains_what_inherits_by_name(repository):
    """``_base_ = 'mmpeft::...'``, two lines changed."""
    repository.run(repository.mim / 'tools' / 'train.py', 'configs/named.py',
                   *options(DETECTOR, param_scheduler=[]))
    folder = repository.folder / 'work_dirs' / 'named'
    check_trained(folder, repository.base['mmdet'])
    cfg = Config.fromfile(folder / 'named.py')
    assert cfg.optim_wrapper.optimizer.lr == .02
    assert cfg.model.backbone.method == dict(type='Mona', dim=4)


def test_stock_tool_trains_our_file(repository):
    """The stock train.py of mmdet and a config of ours, as it is."""
    ours = repository.mim / 'configs' / 'mona' / 'mask-rcnn_swin-b_coco.py'
    values = {**DETECTOR, **VISIBLE, 'model.backbone.method.dim': 4}
    repository.run(stock_tool('mmdet'), ours, *options(values))
    check_trained(repository.folder / 'work_dirs' / ours.stem,
                  repository.base['mmdet'])


@pytest.fixture(scope='module')
def trained(repository):
    """Checkpoints of the stock tools, of configs that inherit by path."""

    def train(library):
        repository.run(stock_tool(library), f'configs/{library}.py')
        folder = repository.folder / 'work_dirs' / library
        return check_trained(folder, repository.base[library])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LIBRARIES, pool.map(train, LIBRARIES)))


#: One process that knows the libraries makes a fresh one for each prediction.
#: A detector of random weights finds boxes whose scores differ by less than
#: rounding: which are kept, and in which order, says nothing. What its network
#: computes before boxes are chosen is compared instead, on boxes of ours.
PREDICT = '''
import importlib.util, json, os, sys
import mmdet.apis, mmpretrain.apis, mmseg.apis
import numpy as np
import torch

def detector(config, weights):
    from mmdet.apis import DetInferencer, inference_detector, init_detector
    model = init_detector(config, weights, device='cpu')
    found = inference_detector(model, image).pred_instances
    again = DetInferencer(config, weights, device='cpu')(image)
    assert np.allclose(again['predictions'][0]['scores'], found.scores)
    with torch.no_grad():
        pixels = model.data_preprocessor(
            dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)]))['inputs']
        maps = model.extract_feat(pixels)
        scores, deltas = model.rpn_head(maps)
        boxes = torch.tensor([[0., 0, 0, 64, 64], [0, 8, 4, 40, 60],
                              [0, 30, 30, 50, 44]])
        head = model.roi_head
        classes = head._bbox_forward(maps, boxes)
        raw = dict(
            **{f'maps.{i}': map_ for i, map_ in enumerate(maps)},
            **{f'rpn_scores.{i}': map_ for i, map_ in enumerate(scores)},
            **{f'rpn_deltas.{i}': map_ for i, map_ in enumerate(deltas)},
            classes=classes['cls_score'], boxes=classes['bbox_pred'],
            masks=head._mask_forward(maps, boxes)['mask_preds'])
    return np.hstack([found.bboxes, found.scores[:, None]]), raw

def segmentor(config, weights):
    from mmseg.apis import MMSegInferencer
    inferencer = MMSegInferencer(config, weights, device='cpu')
    logits = inferencer(image, return_datasamples=True).seg_logits.data.numpy()
    return logits, dict(logits=logits)

def classifier(config, weights):
    from mmpretrain import ImageClassificationInferencer
    inferencer = ImageClassificationInferencer(
        config, pretrained=weights, device='cpu')
    scores = inferencer(image)[0]['pred_scores']
    return scores, dict(scores=scores)

image = np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)
predict = dict(mmdet=detector, mmseg=segmentor, mmpretrain=classifier)
side = os.environ['PYTHONPATH'].split(os.pathsep)
for library, config, weights, out, stock in json.loads(sys.argv[1]):
    if os.fork() == 0:
        assert 'mmpeft' not in sys.modules
        if stock:
            sys.path[:] = [p for p in sys.path if p not in side]
            assert importlib.util.find_spec('mmpeft') is None
        found, raw = predict[library](config, weights)
        np.savez(out, found=found, **raw)
        sys.exit('mmpeft' in sys.modules) if stock else sys.exit()
    assert os.wait()[1] == 0, (library, stock)
'''
MERGE = '''
import runpy, sys
tool, *libraries = sys.argv[1:]
for library in libraries:
    folder = f'work_dirs/{library}/'
    sys.argv[1:] = [f'configs/{library}.py', open(
        folder + 'last_checkpoint').read(), folder + 'merged.pth']
    runpy.run_path(tool, run_name='__main__')
'''


@pytest.fixture(scope='module')
def predictions(repository, trained):
    """By library, of our checkpoint and of a merged one in a stock config."""
    repository.run('-c', MERGE, repository.mim / 'tools' / 'merge_peft.py',
                   *LIBRARIES)
    jobs = []
    for library, checkpoint in trained.items():
        folder = repository.folder / 'work_dirs' / library
        ours = f'configs/{library}.py'
        stock = write_stock_config(folder, library)
        for config, weights, out in ((ours, checkpoint, 'ours.npz'),
                                     (stock, folder / 'merged.pth',
                                      'stock.npz')):
            jobs.append((library, str(config), str(weights), str(folder / out),
                         out == 'stock.npz'))
    repository.run('-c', PREDICT, json.dumps(jobs))
    return {
        library: [
            dict(np.load(repository.folder / 'work_dirs' / library / name))
            for name in ('ours.npz', 'stock.npz')
        ]
        for library in LIBRARIES
    }


def write_stock_config(folder, library):
    """The config without anything of ours, as a stock user has it."""
    cfg = Config.fromfile(
        folder / f'{library}.py', import_custom_modules=False).to_dict()
    backbone = cfg['model']['backbone']
    backbone['type'] = backbone.pop('stock')
    del backbone['method'], cfg['custom_imports']
    for name in ('peft_report', 'peft_checkpoint'):
        cfg['default_hooks'].pop(name, None)
    for key in ('dataloader', 'evaluator', 'cfg'):
        cfg[f'train_{key}'] = cfg[f'val_{key}'] = None
    if library == 'mmseg':  # the generated data is ours
        dataset = cfg['test_dataloader']['dataset']
        cfg['test_dataloader']['dataset'] = dict(
            type='BaseSegDataset', pipeline=dataset['pipeline'])
        del cfg['target']
    assert 'mmpeft' not in Config(cfg).pretty_text
    Config(cfg).dump(folder / 'stock.py')
    return folder / 'stock.py'


@pytest.mark.parametrize('library', LIBRARIES)
def test_stock_tools_train_what_inherits_by_path(repository, trained, library):
    cfg = Config.fromfile(trained[library].parent / f'{library}.py')
    assert cfg.default_scope == library
    assert cfg.optim_wrapper.optimizer.lr == .02
    assert cfg.model.backbone.method.rank == 2


@pytest.mark.parametrize('library', LIBRARIES)
def test_inferencers_read_our_checkpoint(predictions, library):
    """Nothing but the config tells them of mmpeft."""
    shape = dict(mmdet=(100, 5), mmseg=(6, 64, 64), mmpretrain=(2, ))
    for outputs in predictions[library]:  # the merged file is read as well
        found = outputs['found']
        assert found.shape == shape[library]
        assert np.isfinite(found).all() and found.std() > 1e-4


@pytest.mark.parametrize('library', LIBRARIES)
def test_merged_files_need_no_mmpeft(predictions, library):
    """The network computes what it did; see PREDICT for a detector."""
    ours, stock = predictions[library]
    assert ours.keys() == stock.keys()
    for name in ours.keys() - {'found'}:
        np.testing.assert_allclose(
            stock[name], ours[name], rtol=1e-4, atol=1e-5, err_msg=name)


NEW_STYLE = dict(
    base='''
from mmengine.dataset import DefaultSampler
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop
from mmseg.datasets import (BaseSegDataset, LoadAnnotations, PackSegInputs)
from mmcv.transforms import LoadImageFromFile
from mmseg.models import CrossEntropyLoss, EncoderDecoder, FCNHead
from mmseg.models import SegDataPreProcessor
from mmseg.models.backbones import SwinTransformer
from torch.optim import SGD
default_scope = 'mmseg'
model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, size=(128, 128)),
    backbone=dict(
        type=SwinTransformer, embed_dims=8, depths=[1] * 4,
        num_heads=[1] * 4,
        init_cfg=dict(type='Pretrained', checkpoint='mmseg.pth')),
    decode_head=dict(
        type=FCNHead, in_channels=64, channels=8, num_convs=1, num_classes=6,
        loss_decode=dict(type=CrossEntropyLoss)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler),
    dataset=dict(
        type=BaseSegDataset, data_root='data/shapes_v1', img_suffix='.png',
        metainfo=dict(classes=tuple('abcdef')),
        data_prefix=dict(
            img_path='images/target_train',
            seg_map_path='labels/target_train'),
        pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations),
                  dict(type=PackSegInputs)]))
train_cfg = dict(type=IterBasedTrainLoop, max_iters=1)
optim_wrapper = dict(
    type=OptimWrapper, optimizer=dict(type=SGD, lr=.01))
work_dir = 'work_dirs/new'
''',
    mine='''
from mmengine.config import read_base
from mmseg.models.backbones import SwinTransformer
from mmpeft import PEFTBackbone
from mmpeft.methods import Mona
with read_base():
    from .base import *
model.backbone.update(
    type=PEFTBackbone, stock=SwinTransformer, method=dict(type=Mona, dim=4))
''')
NOTEBOOK = '''
import mmpeft, torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
assert Config.fromfile('configs/named.py').model.backbone.method.dim == 4
cfg = Config.fromfile('configs/new/mine.py')
state = Runner.from_cfg(cfg).train().state_dict()
cfg.dump('dumped.py')
again = MODELS.build(Config.fromfile('dumped.py').model)
again.load_state_dict(state)
assert sum('.peft.mona.' in key for key in state) > 50
for key, value in torch.load('mmseg.pth').items():
    assert torch.equal(state['backbone.' + key], value)
'''


def test_new_style_config_with_objects(repository):
    """``read_base()``, dumped and read again; and in a notebook a config
    that inherits by name."""
    for name, text in NEW_STYLE.items():
        repository.write(f'configs/new/{name}.py', text)
    repository.run('-c', NOTEBOOK)


def test_bases_are_known_to_stock_tools():
    """On the maintained stack ``mmseg::`` is only after mmpeft came in."""
    seen = 0
    for path in (ROOT / 'configs').rglob('*.py'):
        base = re.search(r'^_base_ = .*?(?=^\S|\Z)', path.read_text(),
                         re.M | re.S)
        if base and 'mmseg::' in base[0]:
            seen += 1
            assert "__import__('mmpeft')" in base[0], path
    assert seen > 2
