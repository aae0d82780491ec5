"""Methods that look at data before training, and choose by it."""
from typing import List, Optional

import torch
from torch import Tensor

from ..errors import PEFTError
from ..sites import Site, TokenLayout
from .base import PEFTModule

__all__ = ['Calibrated']


class Calibrated(PEFTModule):
    """A module that chooses from data, once, what it will change.

    The choice is the buffer ``index``, which is in every checkpoint and delta;
    -1 says that it is yet to be made. Until then the module leaves ``y`` as it
    is, and training is an error. :func:`mmpeft.calibrate` makes the choices of
    a model; in a run the ``CalibrateHook`` calls it.

    Subclasses collect in :meth:`see`, or ask for gradients of stock weights
    by ``needs_gradients``, give what is summed over all ranks in
    :meth:`total`, and choose by it in :meth:`chosen`.

    Args:
        site (Site): Where it is attached; gives the widths.
    """

    hooks = (dict(type='mmpeft.CalibrateHook'), )
    #: Whether it chooses by the gradient of the loss in its stock layer.
    needs_gradients: bool = False
    index: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._ready = False

    def forget(self) -> None:
        """The choice is yet to be made."""
        self.index.fill_(-1)
        self._ready = False

    @property
    def num_candidates(self) -> int:
        """What it chooses from; above every entry of ``index``."""
        raise NotImplementedError

    @property
    def is_calibrated(self) -> bool:
        """Whether there is a choice.

        Read from the buffer and then remembered: files, other ranks and
        averages over time write buffers without a word.

        Raises:
            PEFTError: If the buffer holds no choice that could be made.
        """
        if not self._ready:
            low, high = (int(v) for v in self.index.aminmax())
            if low < -1 or high >= self.num_candidates or low < 0 <= high:
                raise PEFTError(
                    f'The choice of {self.title} holds numbers from {low} to '
                    f'{high}, not from 0 to {self.num_candidates - 1}: the '
                    'file it came from is damaged.')
            self._ready = low >= 0
        return self._ready

    @property
    def title(self) -> str:
        """Class and place, for a message."""
        return (f'{type(self).__name__} at {self.site.name} of '
                f'{self.site.block or "its block"}')

    def ready(self) -> bool:
        """Whether to compute; if not, ``y`` stays as it is.

        Raises:
            PEFTError: In training without a choice.
        """
        if self.is_calibrated:
            return True
        if self.training:
            raise PEFTError(
                f'{self.title} has to look at data before it trains, and has '
                "not: give the config custom_hooks=[dict(type='mmpeft."
                "CalibrateHook')], or call mmpeft.calibrate(model, batches).")
        return False

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False

    def see(self, y: Tensor, layout: TokenLayout,
            labels: Optional[Tensor]) -> None:
        """Look at what passes its site.

        Args:
            y (Tensor): (B, ..., C).
            layout (TokenLayout): How the tokens are arranged, of the stream
                where the site itself has none.
            labels (Tensor, optional): Classes, as
                :func:`mmpeft.label_maps.label_maps` has them; None if all
                belong to one.
        """

    def total(self, num_classes: int) -> Tensor:
        """What was seen, the sum of which over all ranks decides.

        Args:
            num_classes (int): One more than the largest label on any rank.
        """
        raise NotImplementedError

    def chosen(self, total: Tensor) -> Tensor:
        """The choice, shaped like ``index``."""
        raise NotImplementedError

    @torch.no_grad()
    def settle_on(self, index: Tensor) -> None:
        """Take over a choice, and let go of what was seen."""
        self.index.copy_(index)
        self._ready = False

    @staticmethod
    def largest(scores: Tensor, count: int) -> Tensor:
        """Numbers of the ``count`` largest entries of each row, ascending.

        Of equal ones the first, so that all ranks agree and there are never
        fewer.
        """
        order = torch.sort(scores, dim=-1, descending=True, stable=True)
        return order.indices[..., :count].sort(dim=-1).values

    def stock_weights(self) -> List[torch.nn.Parameter]:
        """Those whose gradients it ``needs_gradients`` of."""
        return [self.stock_layer.weight] if self.needs_gradients else []
