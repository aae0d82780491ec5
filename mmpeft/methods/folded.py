"""What a method leaves in its place for inference."""
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..errors import PEFTError
from ..sites import TokenLayout

__all__ = ['Folded']

KEEP = ('keep the unfolded model, or a deep copy of it made before '
        'mmpeft.fold().')


class Folded(nn.Module):
    """Stands where an attached module stood, and computes the same.

    Its numbers are products of the module's parameters, so it does not train,
    and no state dict has them: a folded model is no checkpoint.
    """

    #: As of attached modules: why it is in no stock layer.
    no_merge = 'it is folded for inference; merge the unfolded model'
    needs_layer = False

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """As the module did; see :class:`mmpeft.methods.base.PEFTModule`."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> 'Folded':
        """Refuse training mode.

        Raises:
            PEFTError: In training mode.
        """
        if mode:
            raise PEFTError('A folded model does not train; ' + KEEP)
        return super().train(False)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise PEFTError('A folded model has no state dict; ' + KEEP)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        refuse_loading()


def refuse_loading(*args: Any) -> None:
    """Load hook: the tensors of a folded model are in no file.

    Raises:
        PEFTError: Always.
    """
    raise PEFTError('A folded model loads no weights; load them first, and '
                    'fold then.')
