"""COCO metrics on two halves of the validation images.

The subset has no third split, so of the validation images (sorted by id) every
other one chooses the learning rate and the rest are reported.
"""

import contextlib
import io
import json
from pathlib import Path

NAMES = ('mAP', 'mAP_50')


def split_images(image_ids) -> dict[str, list]:
    """Sorted ids to ``{'tune': [...], 'final': [...]}``, alternating."""
    ids = sorted(image_ids)
    return dict(tune=ids[0::2], final=ids[1::2])


def evaluate_halves(annotations: Path, prefix: str) -> dict[str, dict]:
    """Metrics of the files that ``CocoMetric(outfile_prefix=...)`` wrote.

    Args:
        annotations (Path): The annotation file.
        prefix (str): ``outfile_prefix`` of the metric.

    Returns:
        dict: 'tune' and 'final' to a dict of metrics in percent.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    metrics = dict(tune={}, final={})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        for kind in ('bbox', 'segm'):
            found = json.loads(Path(f'{prefix}.{kind}.json').read_text())
            # pycocotools cannot load an empty list.
            results = truth.loadRes(found) if found else None
            for half, ids in split_images(truth.getImgIds()).items():
                values = [0., 0.]
                if results is not None:
                    evaluation = COCOeval(truth, results, kind)
                    evaluation.params.imgIds = ids
                    evaluation.evaluate()
                    evaluation.accumulate()
                    evaluation.summarize()
                    values = evaluation.stats[:2]
                for name, value in zip(NAMES, values):
                    metrics[half][f'{kind}_{name}'] = 100 * float(value)
    return metrics
