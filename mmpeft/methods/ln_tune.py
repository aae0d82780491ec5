import torch.nn as nn

from ..registry import METHODS
from .base import MONA_RECIPE, Selector

__all__ = ['LNTune']


@METHODS.register_module()
class LNTune(Selector):
    """Train weight and bias of every LayerNorm, output norms included.

    `Strong Baselines for Parameter Efficient Few-Shot Fine-tuning
    <https://arxiv.org/abs/2304.01917>`_ (2023). Chosen by the type of the
    module, not by the substring ``norm``.
    """

    recipe_lr = MONA_RECIPE

    def selects(self, module: nn.Module, leaf: str) -> bool:
        return isinstance(module, nn.LayerNorm)
