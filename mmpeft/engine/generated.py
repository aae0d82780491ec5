"""Images and labels made of random numbers, for models of the libraries."""
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData

from ..config import nodes
from ..errors import PEFTError

__all__ = ['generate']

#: Objects in an image of a detector.
OBJECTS = 8


def generate(cfg: Config, batch_size: int,
             size: Tuple[int, int]) -> Dict[str, List]:
    """What the data loader of a config would give, before its collation.

    The same numbers at every call. Labels are classes that every head of the
    model has.

    Args:
        cfg (Config): With a detector, segmentor or classifier as ``model``.
        batch_size (int): Images.
        size (tuple[int, int]): Height and width of the images.

    Returns:
        dict: ``inputs`` and ``data_samples``, for the data preprocessor.

    Raises:
        PEFTError: If the config is of another library.
    """
    makers = dict(mmdet=_objects, mmseg=_classes_of_pixels, mmpretrain=_class)
    scope = cfg.get('default_scope')
    if scope not in makers:
        raise PEFTError(f'Labels are made for models of {", ".join(makers)}, '
                        f'not of {scope}; measure the backbone with '
                        '--backbone-only.')
    generator = torch.Generator().manual_seed(0)
    make, head = makers[scope], _Head.of(cfg)
    images, samples = [], []
    for _ in range(batch_size):
        images.append(
            torch.randint(
                256, (3, *size), generator=generator, dtype=torch.uint8))
        samples.append(make(head, size, generator))
    return dict(inputs=images, data_samples=samples)


class _Head(NamedTuple):
    """What a model is told about an image.

    Attributes:
        classes (int): That every head has.
        stuff (tuple[int, int]): The first class of a map of classes, and the
            one behind the last.
        masks (bool): Whether it takes the masks of objects.
    """

    classes: int
    stuff: Tuple[int, int]
    masks: bool

    @classmethod
    def of(cls, cfg: Config) -> '_Head':
        parts = [node for _, node in nodes(cfg.model, 'model')]

        def known(key: str) -> List[int]:
            return [p[key] for p in parts if isinstance(p.get(key), int)]

        classes = min(known('num_classes'), default=2)
        # Those of a panoptic head come behind the classes of objects.
        things, stuff = (
            max(known(f'num_{key}_classes'), default=0)
            for key in ('things', 'stuff'))
        loader = cfg.get('train_dataloader')
        pipeline = [node for _, node in nodes(loader, '')]
        masks = not pipeline or any(
            n.get('with_mask', 'Panoptic' in str(n['type'])) for n in pipeline)
        return cls(classes, (things, things + stuff) if stuff else
                   (0, classes), masks)


def _meta(size: Tuple[int, int]) -> Dict[str, Any]:
    return dict(
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1., 1.),
        flip=False,
        flip_direction=None,
        img_id=0,
        img_path='',
        # of CornerNet and CenterNet
        border=(0, size[0], 0, size[1]))


def _objects(head: _Head, size: Tuple[int, int],
             generator: torch.Generator) -> Any:
    """Boxes a quarter to three quarters of the image wide, their masks, and a
    map of classes."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    height, width = size
    scale = torch.tensor([width, height, width, height])
    corner, extent = torch.rand(2, OBJECTS, 2, generator=generator)
    corner, extent = corner / 4, .25 + extent / 2
    boxes = (torch.cat([corner, corner + extent], 1) * scale).round()
    labels = torch.randint(head.classes, (OBJECTS, ), generator=generator)
    sample = DetDataSample(metainfo=_meta(size))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    # RTMDet would take what has masks for another model of its family.
    if head.masks:
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
        for mask, box in zip(masks, boxes.int().tolist()):
            left, top, right, bottom = box
            mask[top:bottom, left:right] = 1
        sample.gt_instances.masks = BitmapMasks(masks.numpy(), height, width)
    sample.ignored_instances = InstanceData(
        bboxes=boxes.new_zeros(0, 4), labels=labels.new_zeros(0))
    sample.gt_sem_seg = PixelData(sem_seg=_pixels(head, size, generator))
    return sample


def _classes_of_pixels(head: _Head, size: Tuple[int, int],
                       generator: torch.Generator) -> Any:
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=_meta(size))
    sample.gt_sem_seg = PixelData(data=_pixels(head, size, generator))
    return sample


def _pixels(head: _Head, size: Tuple[int, int],
            generator: torch.Generator) -> torch.Tensor:
    """A class for each square of 32 x 32: (1, H, W)."""
    squares = torch.randint(
        *head.stuff, (1, 1, *(-(-s // 32) for s in size)), generator=generator)
    pixels = squares.repeat_interleave(32, 2).repeat_interleave(32, 3)
    return pixels[0, :, :size[0], :size[1]].contiguous()


def _class(head: _Head, size: Tuple[int, int],
           generator: torch.Generator) -> Any:
    from mmpretrain.structures import DataSample
    sample = DataSample(metainfo=_meta(size))
    return sample.set_gt_label(
        int(torch.randint(head.classes, (), generator=generator)))
