"""The supervised contrastive loss, by whose gradient GPS chooses."""
from typing import Any, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .errors import PEFTError
from .label_maps import label_maps

__all__ = ['contrastive_loss', 'supervised_contrast']


def supervised_contrast(features: Tensor,
                        labels: Tensor,
                        temperature: float = .07) -> Tensor:
    """`Supervised Contrastive Learning <https://arxiv.org/abs/2004.11362>`_
    (NeurIPS 2020), with the sum over positives outside the logarithm.

    Args:
        features (Tensor): (N, C), of any length.
        labels (Tensor): (N, ). Each must occur twice.
        temperature (float): Of the softmax. Defaults to 0.07, as released.
    """
    features = F.normalize(features, dim=1)
    logits = features @ features.t() / temperature
    alone = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_prob = logits.masked_fill(alone, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~alone
    total = log_prob.masked_fill(~positive, 0).sum(1)
    return -(total / positive.sum(1)).mean()


def contrastive_loss(model: nn.Module, views: Sequence[Any]) -> Tensor:
    """That of the features of a classifier.

    Args:
        model (nn.Module): A classifier of OpenMMLab.
        views (Sequence): Batches of the same images, augmented differently.

    Raises:
        PEFTError: If an image has no label.
    """
    features, labels = [], []
    for view in views:
        data = model.data_preprocessor(view, True)
        found = label_maps(data['data_samples'], data['inputs'].shape[-2:])
        if found is None or found.ndim != 1 or (found < 0).any():
            raise PEFTError("loss='contrastive' needs the label of each "
                            'image, as in classification; use the default '
                            "loss='task'.")
        feature = model.extract_feat(data['inputs'])
        if isinstance(feature, (list, tuple)):
            feature = feature[-1]
        # A map without a neck: (B, C, H, W) -> (B, C)
        features.append(
            feature.flatten(2).mean(2) if feature.ndim > 2 else feature)
        labels.append(found)
    return supervised_contrast(torch.cat(features), torch.cat(labels))
