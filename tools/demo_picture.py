"""The demo's picture: predictions beside the ground truth."""
import contextlib
import io
from pathlib import Path
from typing import Dict, List, Tuple

import cv2
import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, told apart by everybody.
COLOURS = ('#E69F00', '#56B4E9', '#F0E442', '#CC79A7', '#009E73')
ROWS = 4
SCORE = 0.3


def ground_truth(annotations: str, count: int) -> Tuple[List[Dict], List]:
    """Objects of the first images as predictions, and the classes."""
    from pycocotools.coco import COCO
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(annotations)
    truth = []
    for image_id in sorted(coco.imgs)[:count]:
        objects = coco.imgToAnns[image_id]
        truth.append(
            dict(
                masks=[coco.annToMask(o) for o in objects],
                labels=[o['category_id'] - 1 for o in objects],
                scores=[1.] * len(objects)))
    return truth, [coco.cats[i]['name'] for i in sorted(coco.cats)]


def best_objects(found: Dict) -> List[Tuple[np.ndarray, int]]:
    """Masks and labels above ``SCORE``; of two that share half, the better.

    Detectors may name one object twice; two colours over each other would
    look like a third.
    """
    kept: List[Tuple[np.ndarray, int]] = []
    for i in np.argsort(-np.asarray(found['scores']), kind='stable'):
        mask = np.asarray(found['masks'][i], bool)
        if found['scores'][i] < SCORE or not mask.any():
            continue
        if all((mask & other).sum() <= .5 * min(mask.sum(), other.sum())
               for other, _ in kept):
            kept.append((mask, int(found['labels'][i])))
    return kept


def draw(truth: List[Dict], columns: List[Tuple[str, List[Dict]]],
         files: List[Path], classes: List[str], out: Path) -> None:
    """Predictions beside the ground truth, one column per method."""
    columns = [('Ground truth', truth), *columns]
    width, height = len(columns) + 1, len(files)
    figure, axes = plt.subplots(
        height, width, figsize=(2.4 * width, 2.4 * height + .9), squeeze=False)
    axes[0][0].set_title('Image', fontsize=12)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, file in enumerate(files):
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        axes[row][0].imshow(image, interpolation='nearest')
        for axis, (title, found) in zip(axes[row][1:], columns):
            # Grey, so that the colours of the classes stand out.
            shown = np.repeat(image.mean(2, keepdims=True), 3, 2) / 255
            shown = .35 + .6 * shown
            objects = best_objects(found[row])
            for mask, label in objects:
                colour = np.array(to_rgb(COLOURS[label]))
                shown[mask] = .25 * shown[mask] + .75 * colour
            axis.imshow(shown, interpolation='nearest')
            for mask, _ in objects:
                axis.contour(mask, [.5], colors='black', linewidths=.9)
            if row == 0:
                axis.set_title(title, fontsize=12)
    figure.legend(
        handles=[
            Patch(facecolor=c, edgecolor='black', label=name)
            for c, name in zip(COLOURS, classes)
        ],
        loc='lower center',
        ncol=len(classes),
        frameon=False,
        fontsize=12)
    figure.tight_layout(rect=(0, .45 / figure.get_figheight(), 1, 1), pad=.4)
    figure.savefig(out, dpi=110)
    plt.close(figure)
