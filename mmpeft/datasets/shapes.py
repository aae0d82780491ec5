"""The embedded data: shapes in two domains, generated on first use."""
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Union

import cv2
import numpy as np
from mmengine.registry import DATASETS, METRICS

from ..errors import PEFTError
from .shapes_drawing import DOMAINS, IMAGE_SIZE, draw_scene

# Part of the folder's name, so a changed generator never meets old files.
VERSION = 1
SPLITS = dict(
    source_train=400, source_val=60, target_train=150, target_val=100)
SEED = 2024


def _run_lengths(mask: np.ndarray) -> List[int]:
    """COCO's uncompressed run lengths: column-major, zeros first."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    bounds = np.concatenate([[0], edges, [mask.size]])
    lengths = np.diff(bounds).tolist()
    return lengths[:-1] if lengths[-1] == 0 else lengths


def _annotation(label: int, mask: np.ndarray) -> Dict[str, Any]:
    """COCO's record of one visible mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return dict(
        category_id=int(label) + 1,
        bbox=[x, y, int(columns[-1]) + 1 - x,
              int(rows[-1]) + 1 - y],
        area=int(mask.sum()),
        iscrowd=0,
        segmentation=dict(size=list(mask.shape), counts=_run_lengths(mask)))


def _write_split(folder: Path, split: str, count: int) -> str:
    """Writes images, label maps and COCO annotations of one split.

    Returns:
        str: sha256 over the pixels, the label maps and the annotations.
    """
    domain = DOMAINS[split.split('_')[0]]
    # One stream per split: changing the size of one leaves the others alone.
    rng = np.random.RandomState(SEED + list(SPLITS).index(split))
    digest = hashlib.sha256()
    coco = dict(
        images=[],
        annotations=[],
        categories=[
            dict(id=i + 1, name=name) for i, name in enumerate(domain.classes)
        ])
    for kind in ('images', 'labels'):
        (folder / kind / split).mkdir(parents=True)
    for index in range(count):
        image, objects = draw_scene(rng, domain)
        labels = np.zeros(image.shape[:2], dtype=np.uint8)
        for label, mask in objects:
            labels[mask] = label + 1  # 0 is the background
            coco['annotations'].append(
                dict(
                    id=len(coco['annotations']) + 1,
                    image_id=index,
                    **_annotation(label, mask)))
        name = f'{index:04d}.png'
        coco['images'].append(
            dict(
                id=index, file_name=name, height=IMAGE_SIZE, width=IMAGE_SIZE))
        for kind, array in (('images', image), ('labels', labels)):
            digest.update(array.tobytes())
            if not cv2.imwrite(str(folder / kind / split / name), array):
                raise OSError(f'cannot write {folder / kind / split / name}')
    text = json.dumps(coco)
    digest.update(text.encode())
    (folder / f'{split}.json').write_text(text)
    return digest.hexdigest()


def ensure_shapes(root: Union[str, Path] = 'data/shapes_v1',
                  splits: Dict[str, int] = SPLITS) -> Path:
    """Generates the embedded data if it is not there, in a few seconds.

    Written beside ``root`` and renamed at the end, so that an interrupted
    run leaves nothing half-done and several processes may start together.

    Args:
        root (str or Path): The folder. Holds ``images/<split>``,
            ``labels/<split>``, ``<split>.json`` (COCO) and ``digests.json``
            (sha256 per split). Defaults to ``data/shapes_v1``.
        splits (dict[str, int]): Images per split.

    Returns:
        Path: ``root``.

    Raises:
        PEFTError: If ``root`` exists and holds something else.
    """
    root = Path(root)
    if (root / 'digests.json').is_file():
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise PEFTError(f'{root} exists and does not hold the generated '
                        'shapes; move it away or choose another data_root.')
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
    try:
        digests = {
            split: _write_split(work, split, count)
            for split, count in splits.items()
        }
        (work / 'digests.json').write_text(json.dumps(digests, indent=2))
        work.chmod(0o755)  # mkdtemp's 0700 would shut out other users
        try:
            os.rename(work, root)
        except OSError:
            # Another process was first: its files are the same.
            if not (root / 'digests.json').is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def ShapesDataset(stock: str, data_root: str, **kwargs) -> Any:
    """Builds a stock dataset on the embedded data, generating it if absent.

    A function, as ``PEFTBackbone`` is: what it returns is the stock object.
    In a config: ``type='mmpeft.datasets.ShapesDataset'``.

    Args:
        stock (str): Scoped name of the dataset, such as
            ``'mmdet.CocoDataset'`` or ``'mmseg.BaseSegDataset'``.
        data_root (str): Passed to :func:`ensure_shapes` and to ``stock``.
        **kwargs: The arguments of ``stock``.
    """
    ensure_shapes(data_root)
    return DATASETS.build(dict(type=stock, data_root=data_root, **kwargs))


def ShapesMetric(stock: str, data_root: str, ann_file: str, **kwargs) -> Any:
    """Builds a stock metric whose annotations are generated if absent.

    A metric may be built, and looked at before a run, before any dataset.

    Args:
        stock (str): Scoped name of the metric, such as ``'mmdet.CocoMetric'``.
        data_root (str): Passed to :func:`ensure_shapes`.
        ann_file (str): Below ``data_root``.
        **kwargs: The other arguments of ``stock``.
    """
    ann_file = str(ensure_shapes(data_root) / ann_file)
    return METRICS.build(dict(type=stock, ann_file=ann_file, **kwargs))
