"""A few images a class of Tiny ImageNet, as files that a plan can read.

    python benchmarks/real/few_shot.py --data-root DIR --out data/few_shot

The data folder is that of ``README.md``. Every fifth of its 100 classes; the
first ten training images of each are ``train.txt``, the next ten ``tune.txt``
(rates are chosen there), and its validation images ``test.txt``.
One line per image: path and number of the
class, as in the lists of VTAB-1k. The weights of DeiT-tiny are linked beside.
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np

EVERY, SHOTS = 5, 10
PACKED = 'tiny_imagenet_100/tiny_imagenet_100.npz'


def choose(labels: np.ndarray, split: np.ndarray, label: int) -> dict:
    """Name of a list -> the numbers of a class's images in it."""
    train, test = (
        np.flatnonzero((labels == label) & (split == part)) for part in (0, 1))
    return dict(train=train[:SHOTS], tune=train[SHOTS:2 * SHOTS], test=test)


def lay_out(packed: dict, out: Path) -> dict:
    """Write the images as they are encoded, and the lists.

    Args:
        packed (dict): The arrays of the npz.
        out (Path): A folder that is not there yet.

    Returns:
        dict[str, int]: Name of a list -> its number of images.
    """
    labels, offsets = packed['labels'], packed['offsets']
    classes = range(0, int(labels.max()) + 1, EVERY)
    temporary = out.with_name(out.name + '.part')
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / 'images').mkdir(parents=True)
    lists: dict = dict(train=[], tune=[], test=[])
    for number, label in enumerate(classes):
        for name, chosen in choose(labels, packed['split'], label).items():
            for i in chosen:
                path = f'images/{i:05d}.webp'
                (temporary / path).write_bytes(
                    packed['data'][offsets[i]:offsets[i + 1]].tobytes())
                lists[name].append(f'{path} {number}\n')
    for name, lines in lists.items():
        (temporary / f'{name}.txt').write_text(''.join(lines))
    (temporary / 'classes.txt').write_text(''.join(
        f'{_text(packed["names"][label])}\n' for label in classes))
    # At the end, so an interrupted preparation starts again.
    os.replace(temporary, out)
    return {name: len(lines) for name, lines in lists.items()}


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data-root', type=Path, required=True)
    parser.add_argument('--out', type=Path, default=Path('data/few_shot'))
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f'{args.out} is there already.')
    source = args.data_root / PACKED
    if not source.is_file():
        raise SystemExit(f'{source} is not there; see '
                         'benchmarks/real/README.md.')
    weights = args.out.parent / 'deit_tiny'
    if not weights.exists():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        weights.symlink_to((args.data_root / 'deit_tiny').resolve())
    with np.load(source, allow_pickle=False) as npz:
        packed = {key: npz[key] for key in npz.files}
    print(lay_out(packed, args.out))


if __name__ == '__main__':
    main()
