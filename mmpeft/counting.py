"""What trains, counted from the built model; nothing is tabled."""
import math
from typing import Any, Dict, Optional

import torch.nn as nn

from .backbones.base import find_family

__all__ = ['count_params', 'ppt_factor', 'part_counts', 'backbone_path']


def ppt_factor(trainable: int) -> float:
    """``exp(-log10(P / 1e7 + 1))``, the weight of the PPT metric.

    From `Parameter-Efficient Fine-Tuning for Pre-Trained Vision Models: A
    Survey and Benchmark <https://arxiv.org/abs/2402.02242>`_; ``P`` counts
    the trainable parameters of the backbone, without the head.
    """
    return math.exp(-math.log10(trainable / 1e7 + 1))


def backbone_path(model: nn.Module) -> Optional[str]:
    """Path of the supported backbone, else of ``backbone``, else None."""
    found = find_family(model)
    if found:
        return found[0][0]
    return 'backbone' if hasattr(model, 'backbone') else None


def count_params(model: nn.Module,
                 metric: Optional[float] = None) -> Dict[str, Any]:
    """Parameters of a model, as in ``tools/count_params.py``.

    Args:
        model (nn.Module): Any model.
        metric (float, optional): A score, to be weighted into PPT.

    Returns:
        dict: ``backbone_total`` (stock parameters), ``backbone_trainable``,
        ``backbone_added`` (attached parameters), ``model_total``,
        ``model_trainable``, ``by_stage`` (trainable parameters of the
        backbone by stage, the rest under ``other``), ``ppt_factor`` and
        ``ppt``.
    """
    path = backbone_path(model)
    backbone = model.get_submodule(path) if path is not None else nn.Module()
    blocks = [b for _, b in find_family(backbone) or ()]
    stages = {b.stage_path: b.stage for b in blocks}
    stock = added = trainable = 0
    by_stage = {str(s): 0 for s in sorted(set(stages.values()))}
    alone = tuple(
        f'{p}.'
        for p in blocks[0].family.left_alone(backbone)) if blocks else ()
    for name, parameter in backbone.named_parameters():
        if name.startswith(alone):
            continue
        count = parameter.numel()
        if '.peft.' in f'.{name}':
            added += count
        else:
            stock += count
        if parameter.requires_grad:
            trainable += count
            stage = next(
                (str(s)
                 for p, s in stages.items() if name.startswith(p + '.')),
                'other')
            by_stage[stage] = by_stage.get(stage, 0) + count
    factor = ppt_factor(trainable)
    return dict(
        backbone_total=stock,
        backbone_trainable=trainable,
        backbone_added=added,
        model_total=_numel(model),
        model_trainable=_numel(model, trainable=True),
        by_stage=by_stage,
        ppt_factor=factor,
        ppt=None if metric is None else metric * factor)


def part_counts(model: nn.Module) -> Dict[str, Dict[str, int]]:
    """Total and trainable parameters of each part of a model.

    The backbone is split into its stock part and each attached method; other
    parts are the children of the model.
    """
    path = backbone_path(model)
    parts: Dict[str, Dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = name.split('.')[0]
        if path is not None and (path == '' or name.startswith(path + '.')):
            inner = f'.{name}'.split('.peft.')
            part = path or 'model'
            if len(inner) > 1:
                part = f'{part} [{inner[1].split(".")[0]}]'
        count = parts.setdefault(part, dict(total=0, trainable=0))
        count['total'] += parameter.numel()
        count['trainable'] += parameter.numel() * parameter.requires_grad
    return parts


def _numel(model: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters()
               if p.requires_grad or not trainable)
