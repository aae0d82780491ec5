"""The two baselines every method is measured between."""
import torch.nn as nn

from ..registry import METHODS
from .base import MONA_RECIPE, Selector

__all__ = ['Full', 'Frozen']


@METHODS.register_module()
class Full(Selector):
    """Full fine-tuning: every parameter of the backbone trains.

    With this method a run equals the stock run without mmpeft bit for bit.
    Parts named in ``PEFTBackbone(freeze=...)`` stay frozen; the released VOC
    recipe freezes ``patch_embed`` that way.
    """

    recipe_lr = MONA_RECIPE

    def selects(self, module: nn.Module, leaf: str) -> bool:
        return True


@METHODS.register_module()
class Frozen(Selector):
    """Linear probing: nothing in the backbone trains, output norms included.

    Drop-path stays active in training, as in the released dense recipes;
    ``PEFTBackbone(eval_frozen=True)`` turns it off.
    """

    recipe_lr = MONA_RECIPE

    def selects(self, module: nn.Module, leaf: str) -> bool:
        return False
