"""Hold out a part of the training set, for choosing learning rates."""
import copy
import hashlib
import json
import os.path as osp
from typing import Any, Dict, List

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from ..errors import PEFTError
from ..whole_file import whole_file

__all__ = ['hold_out']


def hold_out(cfg: Config, every: int, folder: str) -> None:
    """Train without every so many-th sample, and validate on these.

    COCO's annotations are split into two files; of other data sets the
    samples are chosen by number.

    Args:
        cfg (Config): Changed in place.
        every (int): 10 for a tenth.
        folder (str): For the files.

    Raises:
        PEFTError: If the training set is several in one.
    """
    train = _inner(cfg.train_dataloader.dataset)
    val = _inner(cfg.val_dataloader.dataset)
    for key in ('data_root', 'ann_file', 'data_prefix', 'metainfo'):
        if key in train:
            val[key] = copy.deepcopy(train[key])
    if str(train.get('ann_file', '')).endswith('.json'):
        _split_coco(cfg, train, val, every, folder)
        return
    count = _length(train, cfg)
    held = list(range(every - 1, count, every))
    if not held:
        raise PEFTError(f'holdout={every}: there are only {count} training '
                        'samples; give a smaller number.')
    val['indices'] = held
    train['indices'] = sorted(set(range(count)) - set(held))
    if _length(val, cfg) != len(held):
        raise PEFTError('holdout: validation keeps other samples than '
                        'training does, so their numbers differ; give '
                        'tune=dict(...) with the split.')


def _inner(dataset: Dict[str, Any]) -> Dict[str, Any]:
    """The data set that reads files, inside its wrappers."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if 'datasets' in dataset:
        raise PEFTError(f'holdout cannot split {dataset["type"]}; give '
                        'tune=dict(...) with the split.')
    return dataset


def _length(dataset: Dict[str, Any], cfg: Config) -> int:
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return len(DATASETS.build(dict(copy.deepcopy(dataset), pipeline=[])))


def _split_coco(cfg: Config, train: Dict[str, Any], val: Dict[str, Any],
                every: int, folder: str) -> None:
    if str(train['type']).endswith('ShapesDataset'):
        from ..datasets import ensure_shapes
        ensure_shapes(train['data_root'])
    source = osp.join(train.get('data_root') or '', train['ann_file'])
    try:
        with open(source) as file:
            text = file.read()
    except OSError as error:
        raise PEFTError(f'holdout: {error}.') from error
    said = json.loads(text)
    ids = sorted(image['id'] for image in said['images'])
    held = set(ids[every - 1::every])
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    files: List[str] = []
    for kind in ('train', 'val'):
        file = osp.abspath(
            osp.join(folder, f'holdout{every}_{mark}_{kind}.json'))
        files.append(file)
        if osp.isfile(file):
            continue

        def belongs(number: int) -> bool:
            return (number in held) == (kind == 'val')

        with whole_file(file) as temporary, open(temporary, 'w') as out:
            json.dump(
                dict(
                    said,
                    images=[i for i in said['images'] if belongs(i['id'])],
                    annotations=[
                        a for a in said['annotations']
                        if belongs(a['image_id'])
                    ]), out)
    train['ann_file'], val['ann_file'] = files
    evaluators = cfg.val_evaluator
    for evaluator in evaluators if isinstance(evaluators,
                                              list) else [evaluators]:
        if 'ann_file' in evaluator:
            evaluator['ann_file'] = files[1]
