"""Predictions of a detector on a split of the embedded data.

    python tools/demo_predict.py CONFIG CHECKPOINT ANNOTATIONS IMAGES OUT

Loads the checkpoint ``strict=True`` and imports no mmpeft: run on a stock
config, it shows that a merged checkpoint needs none.
"""
import argparse
import json
import pickle
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader


def build(model_cfg: dict, checkpoint: str) -> torch.nn.Module:
    """Builds a detector and loads every one of its weights, or raises."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')
    model = MODELS.build(model_cfg)
    weights = CheckpointLoader.load_checkpoint(
        checkpoint, map_location='cpu', logger='silent')
    model.load_state_dict(weights.get('state_dict', weights), strict=True)
    model.eval()
    return model


@torch.no_grad()
def predict(model: torch.nn.Module, files: Sequence[Path]) -> List[Dict]:
    """Detections per image: ``boxes``, ``scores``, ``labels``, ``masks``."""
    from mmdet.structures import DetDataSample
    results = []
    for file in files:
        image = cv2.imread(str(file))
        size = image.shape[:2]
        sample = DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1, 1)))
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
        found = model.test_step(dict(inputs=[pixels], data_samples=[sample]))
        found = found[0].pred_instances.cpu().numpy()
        results.append(
            dict(
                boxes=found.bboxes,
                scores=found.scores,
                labels=found.labels,
                masks=found.masks))
    return results


def coco_map(results: List[Dict], annotations: str) -> Dict[str, float]:
    """COCO mAP of boxes and masks, as ``mmdet.CocoMetric`` computes it."""
    from pycocotools import mask as mask_api
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    truth = COCO(annotations)
    detections: List[Dict[str, Any]] = []
    for image_id, found in zip(sorted(truth.imgs), results):
        for i, (x0, y0, x1, y1) in enumerate(found['boxes'].tolist()):
            detections.append(
                dict(
                    image_id=image_id,
                    category_id=int(found['labels'][i]) + 1,
                    score=float(found['scores'][i]),
                    bbox=[x0, y0, x1 - x0, y1 - y0],
                    segmentation=mask_api.encode(
                        np.asfortranarray(found['masks'][i], np.uint8))))
    scores = {}
    for metric in ('bbox', 'segm'):
        scores[metric] = 0.
        if detections:
            # Without a box, COCO sorts masks by their own size.
            dropped = 'segmentation' if metric == 'bbox' else 'bbox'
            copies = [{
                k: v
                for k, v in d.items() if k != dropped
            } for d in detections]
            evaluation = COCOeval(truth, truth.loadRes(copies), metric)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[metric] = float(evaluation.stats[0])
    return scores


def image_files(annotations: str,
                images: str,
                count: Optional[int] = None) -> List[Path]:
    """The images of a split, in the order of their ids."""
    records = json.loads(Path(annotations).read_text())['images']
    records = sorted(records, key=lambda record: record['id'])[:count]
    return [Path(images) / record['file_name'] for record in records]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ('config', 'checkpoint', 'annotations', 'images', 'out'):
        parser.add_argument(name)
    args = parser.parse_args()
    model = build(Config.fromfile(args.config).model, args.checkpoint)
    results = predict(model, image_files(args.annotations, args.images))
    scores = coco_map(results, args.annotations)
    if 'mmpeft' in sys.modules:
        raise RuntimeError('mmpeft was imported: this is no stock model.')
    with open(args.out, 'wb') as file:
        pickle.dump(dict(results=results, scores=scores), file)


if __name__ == '__main__':
    main()
