"""What the study reads: the data folder, resized once into the cache."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np

CAMVID_SPLITS = ('train', 'val', 'test')
BASE_NAME = 'swin_nano_tiny-imagenet-100.pth'
DEIT_NAME = 'deit_tiny_patch16_224_in1k_mmpretrain.pth'


class DataError(ValueError):
    """The data folder lacks something; the message says what and where."""


def need(path: Path, what: str) -> Path:
    """The path, if something is there."""
    if not path.exists():
        raise DataError(f'{what} not found at {path}: give the folder that '
                        'holds it with --data-root (see '
                        'benchmarks/real/README.md)')
    return path


def _finish(temporary: Path, final: Path) -> Path:
    """Rename at the end, so an interrupted preparation starts again."""
    os.replace(temporary, final)
    return final


def _fresh(final: Path) -> Path:
    temporary = final.with_name(final.name + '.part')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def camvid_folder(cache: Path, size: tuple) -> Path:
    """Where CamVid is in the size (width, height)."""
    return cache / 'camvid_{}x{}'.format(*size)


def prepare_camvid(data_root: Path, cache: Path, size: tuple) -> Path:
    """CamVid in a size, images by area averaging, labels by nearest."""
    final = camvid_folder(cache, size)
    if final.exists():
        return final
    source = need(data_root / 'camvid', 'CamVid')
    temporary = _fresh(final)
    for split in CAMVID_SPLITS:
        for kind, how in (('images', cv2.INTER_AREA), ('annotations',
                                                       cv2.INTER_NEAREST)):
            target = temporary / kind / split
            target.mkdir(parents=True)
            for file in sorted(need(source / kind / split, kind).iterdir()):
                picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
                picture = cv2.resize(picture, size, interpolation=how)
                cv2.imwrite(str(target / f'{file.stem}.png'), picture)
    return _finish(temporary, final)


def class_agnostic(annotations: dict) -> dict:
    """COCO annotations with one category, 'object'; nothing else changes."""
    return dict(
        annotations,
        annotations=[
            dict(thing, category_id=1) for thing in annotations['annotations']
        ],
        categories=[dict(id=1, name='object', supercategory='object')])


def prepare_coco(data_root: Path, cache: Path) -> Path:
    """One-category annotation files; the images stay where they are."""
    final = cache / 'coco_mini_object'
    if final.exists():
        return final
    source = need(data_root / 'coco_mini', 'the COCO subset')
    temporary = _fresh(final)
    for split in ('train', 'val'):
        name = f'instances_{split}.json'
        file = need(source / 'annotations' / name, name)
        (temporary / name).write_text(
            json.dumps(class_agnostic(json.loads(file.read_text()))))
    return _finish(temporary, final)


def prepare_tiny_imagenet(data_root: Path, cache: Path) -> Path:
    """The 100 classes unpacked to ``{train,val}/<class>/<n>.webp``."""
    final = cache / 'tiny_imagenet_100'
    if final.exists():
        return final
    name = 'tiny_imagenet_100/tiny_imagenet_100.npz'
    packed = np.load(need(data_root / name, 'Tiny ImageNet'))
    # An npz reads a member anew at every access.
    data, offsets, labels, split, wnids = (
        packed[key] for key in ('data', 'offsets', 'labels', 'split', 'wnids'))
    wnids = [
        name.decode() if isinstance(name, bytes) else str(name)
        for name in wnids
    ]
    temporary = _fresh(final)
    for index, label in enumerate(labels):
        folder = temporary / ('train', 'val')[split[index]] / wnids[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{index:05d}.webp').write_bytes(
            data[offsets[index]:offsets[index + 1]].tobytes())
    return _finish(temporary, final)


def find_base(data_root: Path, cache: Path) -> Path:
    """The pre-trained Swin: one trained here, else the one in the data.

    Returns:
        Path: The checkpoint; it need not exist, when neither does.
    """
    own = cache / BASE_NAME
    ready = data_root / 'nano_swin' / BASE_NAME
    return ready if ready.exists() and not own.exists() else own


def find_deit(data_root: Path) -> Path:
    """The released DeiT-tiny, with the keys of mmpretrain."""
    return data_root / 'deit_tiny' / DEIT_NAME
