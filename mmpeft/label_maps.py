"""What stands for the class of a token, in any task."""
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

__all__ = ['label_maps']

#: What mmseg and mmdet put where a pixel has no class.
IGNORED = 255


def label_maps(samples: Optional[Sequence[Any]],
               size: Tuple[int, int]) -> Optional[Tensor]:
    """Classes of a batch, from the data samples of OpenMMLab.

    - an image with a label (mmpretrain): that label; of several the first;
    - pixels with labels (mmseg, panoptic): these, 255 being none;
    - boxes (mmdet): pixels of a box have its label plus 1, where boxes
      overlap that of the smallest; all others of the image are 0.

    Args:
        samples (Sequence, optional): Data samples behind the preprocessor.
        size (tuple[int, int]): Height and width of the batch, with padding.

    Returns:
        Tensor, optional: (B, ) or (B, H, W), -1 where there is no class. None
        if the samples hold none of this.
    """
    found: List[Tensor] = []
    for sample in samples or ():
        if 'gt_label' in sample:
            label = sample.gt_label
            found.append(
                label.flatten()[0] if len(label) else label.new_tensor(-1))
        elif 'gt_sem_seg' in sample:
            found.append(_pixels(sample.gt_sem_seg.data, size))
        elif 'gt_instances' in sample and 'bboxes' in sample.gt_instances:
            found.append(_boxes(sample, size))
    if not found or len(found) != len(samples):
        return None
    return torch.stack([f.long() for f in found])


def _pixels(data: Tensor, size: Tuple[int, int]) -> Tensor:
    """(1, H, W) -> (H, W) of the batch"""
    labels = data.new_full(size, -1, dtype=torch.long)
    data = data.squeeze(0)[:size[0], :size[1]].long()
    labels[:data.shape[0], :data.shape[1]] = data.masked_fill(
        data == IGNORED, -1)
    return labels


def _boxes(sample: Any, size: Tuple[int, int]) -> Tensor:
    boxes = sample.gt_instances.bboxes
    if hasattr(boxes, 'convert_to'):
        boxes = boxes.convert_to('hbox').tensor
    height, width = sample.metainfo.get('img_shape', size)[:2]
    labels = boxes.new_full(size, -1, dtype=torch.long)
    labels[:height, :width] = 0
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for i in areas.argsort(descending=True, stable=True).tolist():
        left, top, right, bottom = (
            max(round(v), 0) for v in boxes[i].tolist())
        labels[top:bottom, left:right] = sample.gt_instances.labels[i] + 1
    return labels
