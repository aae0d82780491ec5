"""Look for data and weights before a model is built.

A run whose annotation file is missing would fail minutes later with a
traceback from deep inside a data set. :func:`check_files` finds out at once
and says what is missing, where it looked and how to get it. It reports only
what a stock data set would surely fail on; everything it does not know it
leaves to the Runner.
"""
import os
import os.path as osp
import socket
from http.client import HTTPException
from typing import Any, Iterator, Optional, Tuple
from urllib.parse import urlparse

import torch
from mmengine.logging import print_log
from mmengine.registry import DATASETS, METRICS, Registry

from .errors import MissingFileError
from .safe_pickle import check_pickle

__all__ = ['check_files', 'weights_in']

# Data sets of these packages resolve paths as mmengine's BaseDataset does.
STOCK_PACKAGES = ('mmengine', 'mmdet', 'mmseg', 'mmpretrain')
# What a subclass may redefine to read other files, or to make its own.
READS = ('__init__', '_join_prefix', 'full_init', 'load_data_list')

_SEG_DOCS = ('https://mmsegmentation.readthedocs.io/en/latest/user_guides/'
             '2_dataset_prepare.html')
_VOC = 'get VOC 2007 and 2012 at http://host.robots.ox.ac.uk/pascal/VOC/'
HOW_TO_GET = {
    'CocoDataset':
    'get COCO 2017 with `mim download mmdet --dataset coco2017 --dest {root}`',
    'VOCDataset':
    _VOC,
    'ADE20KDataset':
    f'get ADE20K (ADEChallengeData2016) as {_SEG_DOCS}#ade20k says',
    'PascalContextDataset':
    f'get VOC 2010 and its context labels as {_SEG_DOCS}#pascal-context says',
    'CityscapesDataset':
    f'get Cityscapes with its label files as {_SEG_DOCS}#cityscapes says',
    'CUB':
    'get CUB-200-2011 at '
    'https://www.vision.caltech.edu/datasets/cub_200_2011/',
}
# Weights that a command of this project makes.
HOW_TO_MAKE = {'swin-nano_source.pth': 'make them with `make demo`, or '}
HOW_TO_GET['PascalContextDataset59'] = HOW_TO_GET['PascalContextDataset']


def check_files(cfg: Any, mode: Optional[str] = None) -> None:
    """Raise if a file that a run needs is missing, or may run code.

    Pre-trained weights named by a URL are downloaded to torch's cache, by one
    process per machine.

    Args:
        cfg (mmengine.Config | dict): The final config of the run.
        mode (str, optional): ``'train'`` looks at the data of training and
            validation, ``load_from`` and every ``init_cfg`` of the model;
            ``'test'`` at the data of testing and ``load_from``. None means
            'test' for a config with test data and no training data, else
            'train'. Defaults to None.

    Raises:
        MissingFileError: Says what is missing, where it was looked for and
            how to get it.
        PEFTError: If a file of weights holds more than data.
    """
    if mode is None:
        only_test = cfg.get(
            'test_dataloader') and not cfg.get('train_dataloader')
        mode = 'test' if only_test else 'train'
    if mode not in ('train', 'test'):
        raise ValueError(f"mode must be 'train' or 'test', got {mode!r}.")
    scope = cfg.get('default_scope') or 'mmengine'
    for split in ('train', 'val') if mode == 'train' else ('test', ):
        for key in (f'{split}_dataloader', f'{split}_evaluator'):
            if cfg.get(key):
                _check_data(cfg[key], key, scope)
    weights = [('load_from', cfg.get('load_from'))]
    if mode == 'train':
        weights += weights_in(cfg.get('model'), 'model')
    # All local files first: a download may take minutes.
    for key, path in sorted(weights, key=lambda w: _is_remote(w[1])):
        # A DeepSpeed checkpoint is a folder.
        if not (cfg.get('strategy') and osp.isdir(str(path))):
            _check_weights(key, path)


def _check_data(cfg: Any, where: str, scope: str) -> None:
    """Walk through loaders, wrappers and lists down to what reads files."""
    if isinstance(cfg, (list, tuple)):
        for i, item in enumerate(cfg):
            _check_data(item, f'{where}.{i}', scope)
    if not isinstance(cfg, dict):
        return
    scope = cfg.get('_scope_', scope)
    inner = [k for k in ('dataset', 'datasets', 'metrics') if cfg.get(k)]
    for key in inner:
        _check_data(cfg[key], f'{where}.{key}', scope)
    if inner or _any_remote(cfg):
        return
    if '_evaluator' in where:
        if _stock_class(cfg, METRICS, scope):
            _require(
                cfg.get('ann_file'), 'annotation file', f'{where}.ann_file',
                'it belongs to the data set')
        return
    cls = _stock_class(cfg, DATASETS, scope)
    if cls is None or _makes_its_own(cls, cfg):
        return
    _check_dataset(cfg, where, _how_to_get(cls, cfg))


def _check_dataset(cfg: dict, where: str, how: str) -> None:
    root = cfg.get('data_root') or ''
    needed = [(cfg.get('ann_file'), 'annotation file', 'ann_file')]
    prefixes = cfg.get('data_prefix')
    if isinstance(prefixes, dict):
        # Label maps of a test set may be absent if nothing loads them.
        labels = any('Annotations' in str(t.get('type'))
                     for t in cfg.get('pipeline', ()))
        needed += [(prefix, 'folder', f'data_prefix.{key}')
                   for key, prefix in prefixes.items()
                   if labels or not key.startswith('seg')]
    else:
        needed.append((prefixes, 'folder', 'data_prefix'))
    # Only pictures may come from a remote store while labels are local.
    if _any_remote(*cfg.get('pipeline', ())):
        needed = needed[:1]
    needed = [n for n in needed if isinstance(n[0], str) and n[0]]
    if isinstance(root, str) and root and (not needed
                                           or any(not osp.isabs(n[0])
                                                  for n in needed)):
        _require(root, 'data root', f'{where}.data_root', how)
    for path, kind, key in needed:
        if isinstance(root, str) and not _is_remote(path):
            path = osp.join(root, path)
        _require(path, kind, f'{where}.{key}', how)


def _require(path: Optional[str], kind: str, key: str, how: str) -> None:
    if not isinstance(path, str) or not path or _is_remote(path):
        return
    if not osp.exists(path) and not osp.exists(osp.expanduser(path)):
        raise MissingFileError(
            f'The {kind} {path!r} is missing (looked for '
            f'{osp.abspath(path)}); {how}, link your copy there, or set '
            f'{key} with --cfg-options.')


def _stock_class(cfg: dict, registry: Registry, scope: str) -> Optional[type]:
    """The class that ``cfg`` builds, if it reads files as stock classes do."""
    cls = cfg.get('type')
    if isinstance(cls, str):
        try:
            with registry.switch_scope_and_registry(scope) as scoped:
                cls = scoped.get(cls)
        # Whatever is wrong with it, the Runner will say.
        except Exception:
            return None
    if not isinstance(cls, type):
        return None
    for name in READS:
        owner = next((c for c in cls.__mro__ if name in vars(c)), object)
        package = owner.__module__.partition('.')[0]
        if package not in STOCK_PACKAGES + ('builtins', ):
            return None
    return cls


def _makes_its_own(cls: type, cfg: dict) -> bool:
    """Data sets such as CIFAR10 download what is missing, by default."""
    for base in cls.__mro__:
        init = vars(base).get('__init__')
        code = getattr(init, '__code__', None)
        if code and 'download' in code.co_varnames[:code.co_argcount]:
            return cfg.get('download', True)
    return False


def _how_to_get(cls: type, cfg: dict) -> str:
    how = HOW_TO_GET.get(cls.__name__)
    own_classes = cfg.get('metainfo') is not None
    own_file = (
        cls.__name__ == 'CocoDataset'
        and '2017' not in str(cfg.get('ann_file')))
    if how is None or own_classes or own_file:
        return f'it belongs to the {cls.__name__} of this config'
    return how.format(root=osp.normpath(cfg.get('data_root') or 'data/coco'))


def _any_remote(*cfgs: Any) -> bool:
    """Whether files come through another backend than the local disk."""
    for cfg in cfgs:
        for key in ('backend_args', 'file_client_args'):
            args = cfg.get(key) if isinstance(cfg, dict) else None
            if args and args.get('backend', 'local') not in ('local', 'disk'):
                return True
    return False


def _is_remote(path: Any) -> bool:
    return isinstance(path, str) and '://' in path


def weights_in(cfg: Any, where: str) -> Iterator[Tuple[str, str]]:
    """Every file of weights that building or initialising ``cfg`` reads."""
    if isinstance(cfg, (list, tuple)):
        for i, item in enumerate(cfg):
            yield from weights_in(item, f'{where}.{i}')
    if not isinstance(cfg, dict):
        return
    for key, value in cfg.items():
        at = f'{where}.{key}'
        if key in ('pretrained', 'checkpoint_path') and isinstance(value, str):
            # Elsewhere the word may name a tag, not a file.
            if value.endswith(('.pth', '.pt', '.ckpt')):
                yield at, value
        elif key == 'checkpoint' and str(
                cfg.get('type')).endswith('Pretrained'):
            yield at, value
        else:
            yield from weights_in(value, at)


def _check_weights(key: str, path: Optional[str]) -> None:
    if not isinstance(path, str) or not path:
        return
    if path.startswith(('http://', 'https://')):
        file = download(key, path)
        if osp.exists(file):  # not yet, for all ranks but one
            check_pickle(file)
    # Other schemes (torchvision://, s3://) are mmengine's business.
    elif _is_remote(path):
        return
    elif osp.exists(osp.expanduser(path)):
        if not path.endswith('.safetensors'):
            check_pickle(osp.expanduser(path))
    else:
        raise MissingFileError(
            f'The weights {path!r} are missing (looked for '
            f'{osp.abspath(path)}); {HOW_TO_MAKE.get(osp.basename(path), "")}'
            f'set {key} to a file or URL that exists, with --cfg-options '
            f'{key}=/path/to/weights.pth.')


def download(key: str, url: str) -> str:
    """Fill torch's cache, where mmengine looks first.

    Returns:
        str: The file there.

    Raises:
        MissingFileError: If it cannot be had.
    """
    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    file = osp.join(folder, osp.basename(urlparse(url).path))
    if osp.exists(file) or _local_rank() != 0:
        return file
    print_log(f'Downloading {url} to {file}', logger='current')
    timeout = socket.getdefaulttimeout()
    # A firewall that drops packets would keep us waiting without a word.
    socket.setdefaulttimeout(30)
    try:
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, file)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        raise MissingFileError(
            f'The weights {url} could not be downloaded ({error}); put that '
            f'file into {folder}, or point to a copy with --cfg-options '
            f'{key}=/path/to/{osp.basename(file)}.') from error
    finally:
        socket.setdefaulttimeout(timeout)
    return file


def _local_rank() -> int:
    """Rank on this machine: every machine has its own cache."""
    for name in ('LOCAL_RANK', 'SLURM_LOCALID', 'RANK'):
        if name in os.environ:
            return int(os.environ[name])
    return 0
