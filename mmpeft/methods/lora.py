from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import MONA_RECIPE
from .low_rank import LowRank

__all__ = ['LoRA']


@METHODS.register_module()
class LoRA(LowRank):
    """Low-rank update of a frozen linear layer.

    `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_ (ICLR 2022)::

        y <- y + scale * B A x,    scale = alpha / rank

    Starts at the identity (``B = 0``) and merges exactly. Each of q, k and v
    has factors of its own. The dense code released with Mona sets
    ``alpha=1`` at rank 64, a scale of 1/64, which cripples it; here ``alpha``
    follows the rank.

    ``init='pissa'`` is `PiSSA: Principal Singular Values and Singular Vectors
    Adaptation <https://arxiv.org/abs/2404.02948>`_ (NeurIPS 2024): A and B
    start as the leading singular triplets of the loaded rows,
    ``scale * B A = U S V``. The paper moves them out of the frozen weight;
    here that weight stays the checkpoint's and the forward subtracts them::

        y <- y + scale * (B A x - B0 A0 x)

    ``A0`` and ``B0`` are buffers, so that the update applies to the original
    weight. While ``A = A0`` and ``B = B0`` both terms are computed alike, and
    the start is the frozen model bit for bit (with ``drop_rate=0``: only
    ``B A x`` sees the dropout, as in the paper).

    `LoRA+ <https://arxiv.org/abs/2402.12354>`_ (ICML 2024), a higher rate for
    B than for A, is a setting of mmengine's optimizer constructor. It takes
    the longest key that is part of a name, so a longer one such as
    ``'backbone'`` must not be set beside it::

        optim_wrapper = dict(paramwise_cfg=dict(
            custom_keys={'.lora_B': dict(lr_mult=16)}))

    Args:
        site (Site): Where it is attached; gives the widths.
        rank (int): Rank of the update. Defaults to 64.
        alpha (float, optional): Numerator of the scale; None means ``rank``,
            a scale of 1. Defaults to None.
        targets (Sequence[str]): Any of q, k, v, proj, fc1, fc2.
            Defaults to ``('q', 'v')``.
        rslora (bool): Scale by ``alpha / sqrt(rank)`` (`rsLoRA
            <https://arxiv.org/abs/2312.03732>`_). Defaults to False.
        drop_rate (float): Dropout probability on the input of A, in [0, 1).
            Defaults to 0.
        init (str): ``'lora'``, or ``'pissa'`` as above. Defaults to
            ``'lora'``.

    Raises:
        PEFTError: For an unknown target, a rank outside [1, width], an
            ``alpha`` that is not above 0 or an unknown ``init``.
    """

    key = 'lora'
    recipe_lr = MONA_RECIPE

    def __init__(self,
                 site: Site,
                 rank: int = 64,
                 alpha: Optional[float] = None,
                 targets: Sequence[str] = ('q', 'v'),
                 rslora: bool = False,
                 drop_rate: float = 0.,
                 init: str = 'lora') -> None:
        super().__init__(site, rank, alpha, targets, rslora, drop_rate)
        if init not in ('lora', 'pissa'):
            raise PEFTError(f"LoRA: unknown init {init!r}; use 'lora' or "
                            "'pissa'.")
        self.needs_layer = init == 'pissa'
        if self.needs_layer:
            for name in ('lora_A', 'lora_B'):
                factor = getattr(self, name).detach()
                self.register_buffer(f'{name}0', torch.zeros_like(factor))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.needs_layer:
            self.lora_A0.copy_(self.lora_A.detach())
            self.lora_B0.copy_(self.lora_B.detach())

    @property
    def initial(self) -> Optional[Tuple[Tensor, Tensor]]:
        return (self.lora_A0, self.lora_B0) if self.needs_layer else None

    def start_from_layer(self) -> None:
        """PiSSA: take the leading singular triplets of the rows."""
        downs, ups = [], []
        for start, stop in self.rows:
            # Half precision has no decomposition.
            rows = self.layer.weight.detach()[start:stop].float()
            u, s, vh = torch.linalg.svd(rows, full_matrices=False)
            # A pair of singular vectors is known up to a common sign.
            largest = u.abs().argmax(0, keepdim=True)
            sign = torch.where(u.gather(0, largest) < 0, -1., 1.).to(u)
            root = (s[:self.rank] / self.scale).sqrt()
            ups.append((u * sign)[:, :self.rank] * root)
            downs.append((vh * sign.t())[:self.rank] * root[:, None])
        for name, parts in (('lora_A', downs), ('lora_B', ups)):
            getattr(self, name).data.copy_(torch.cat(parts))
            getattr(self, f'{name}0').copy_(getattr(self, name).detach())

    def behind(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        updates = self.project(self.dropout(x), self.lora_A, self.lora_B)
        if self.needs_layer:
            # Not one product of rank 2r: only like ones cancel exactly.
            initial = self.project(x, *self.initial)
            updates = [now - then for now, then in zip(updates, initial)]
        if self.scale != 1:
            updates = [self.scale * update for update in updates]
        return self.add(y, updates)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        weight = self.fold(weight, self.lora_A, self.lora_B, self.scale)
        if self.needs_layer:
            weight = self.fold(weight, self.lora_A0, self.lora_B0, -self.scale)
        return weight, bias
