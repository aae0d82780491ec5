"""Two kinds of method: modules that are attached, and selections.

The third kind, a network beside the backbone, is in ``side.py``.
"""
import math
from typing import (Any, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple,
                    Union)

import torch.nn as nn
from torch import Tensor

from ..errors import PEFTError
from ..sites import Site, TokenLayout

#: Of all methods but one in the dense comparison released with Mona.
MONA_RECIPE = dict(mmdet=1e-4, mmseg=6e-5)

__all__ = [
    'LeadingModule', 'MONA_RECIPE', 'Method', 'PEFTModule', 'Selector',
    'check_positive', 'check_rate', 'check_width'
]


class LinearWeights(NamedTuple):
    """Weight (out_dims, in_dims) and bias of a linear layer."""

    weight: Tensor
    bias: Optional[Tensor]


class Method:
    """What both kinds have in common."""

    #: Default name in parameter keys; None means the snake-case type.
    key: Optional[str] = None
    #: Learning rate of the method's published dense recipe, by the
    #: ``default_scope`` of the config; logged beside the config's own. Empty
    #: where none is known.
    recipe_lr: Dict[str, float] = {}
    #: Where these rates are from.
    recipe_source: str = 'released configs of Mona, AdamW'
    #: Hooks that training with it needs; ``--method`` adds them.
    hooks: Tuple[dict, ...] = ()


class PEFTModule(Method, nn.Module):
    """A small trainable module at one site of one block.

    Subclasses name their sites, take the ``site`` and their own keyword
    arguments, initialise in :meth:`reset_parameters` and compute in
    :meth:`forward`. Their parameters are the only thing that trains.

    Args:
        site (Site): Where it is attached; gives the widths.
    """

    #: Sites in a block it is attached to when the arguments do not change
    #: that.
    sites: Tuple[str, ...] = ()
    #: Sites outside the blocks; it goes to every one the backbone has.
    parts: Tuple[str, ...] = ()
    #: Whether it reads the H x W map and not only single tokens.
    needs_grid: bool = False
    #: With ``needs_grid``: whether it changes class and register tokens, too.
    moves_extra: bool = False
    #: Whether it reads the weight of the stock layer at its site.
    needs_layer: bool = False
    #: Whether its output depends on ``y`` alone, number by number, and draws
    #: no random ones; see :mod:`mmpeft.recipes`.
    elementwise: bool = False
    #: Whether it is a :class:`LeadingModule`.
    leads: bool = False
    #: At ``tokens``: whether these tokens go on to the next block.
    carries: bool = False
    #: At ``tokens``: whether a side network reads what becomes of them.
    asks: bool = False
    #: Why it cannot be folded into a stock layer; None if it can.
    no_merge: Optional[str] = 'it has a non-linearity of its own'

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        # Tuples, so that neither is registered as a child: the keys of the
        # stock layer and of the shared owner stay where they are.
        self._layer: Tuple[nn.Module, ...] = ()
        self._shared: Tuple[nn.Module, ...] = ()

    @classmethod
    def build(cls, site: Site, **kwargs: Any) -> 'PEFTModule':
        """The module for one site; a method of several parts overrides it."""
        return cls(site, **kwargs)

    @classmethod
    def build_shared(cls, sites: Sequence[Site],
                     **kwargs: Any) -> Optional[nn.Module]:
        """What all modules of a backbone share, owned by ``backbone.peft``.

        Args:
            sites (Sequence[Site]): Every site that gets a module.

        Returns:
            nn.Module, optional: Has a ``reset_parameters``. None if nothing
            is shared.
        """
        return None

    @classmethod
    def selector(cls, **kwargs: Any) -> Optional['Selector']:
        """Stock parameters that train besides, in place; None if none do."""
        return None

    def bind_shared(self, owner: nn.Module) -> None:
        """Give the module what it shares with the others."""
        self._shared = (owner, )

    @property
    def shared(self) -> nn.Module:
        """What :meth:`build_shared` returned."""
        return self._shared[0]

    def bind_layer(self, layer: nn.Module) -> None:
        """Give a module that ``needs_layer`` the stock layer at its site."""
        self._layer = (layer, )

    @property
    def stock_layer(self) -> nn.Module:
        """The stock layer at the site."""
        return self._layer[0]

    @property
    def layer(self) -> Union[nn.Module, LinearWeights]:
        """The same with the weight as a matrix, which a 1 x 1 convolution
        does not have."""
        layer = self.stock_layer
        if layer.weight.ndim > 2:
            return LinearWeights(layer.weight.flatten(1), layer.bias)
        return layer

    def start_from_layer(self) -> None:
        """Initialise from the weight of the stock layer.

        Called for a module that ``needs_layer`` whenever base weights
        arrived and its own did not.
        """

    @classmethod
    def sites_for(cls, **kwargs) -> Sequence[str]:
        """Sites that these arguments ask for."""
        return cls.sites

    def reset_parameters(self) -> None:
        """Initialise; called again after the backbone's ``init_weights``."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """Map ``y``, the output of the stock operation on ``x``.

        At the sites of extra tokens ``y`` is what joins the attention so far;
        see :mod:`mmpeft.sites`.

        Args:
            x (Tensor): (..., in_dims), what the stock operation received.
            y (Tensor): (..., out_dims), what it returned.
            layout (TokenLayout): How the tokens are arranged.

        Returns:
            Tensor: (..., out_dims), in the place of ``y``.
        """
        raise NotImplementedError

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        """Weight and bias of the stock layer that does both at once.

        A module at the input of a linear layer is folded into that layer.

        Args:
            weight (Tensor): (out_dims, in_dims), in float32 or float64.
            bias (Tensor, optional): (out_dims, ).
        """
        raise NotImplementedError

    def folded(self) -> Optional[nn.Module]:
        """A :class:`mmpeft.methods.folded.Folded` that computes the same in
        evaluation mode, in fewer steps; None if there is none."""
        return None


class LeadingModule(PEFTModule):
    """One that can stand for a linear layer or norm and for itself.

    Where it :meth:`takes_over` and is the first at its site, it is called with
    the layer instead of the layer's output. It computes one or the other here
    and not in ``forward``, so that hooks on it run either way.
    """

    leads = True

    def forward(self,
                x: Tensor,
                y: Optional[Tensor],
                layout: Optional[TokenLayout],
                layer: Optional[nn.Module] = None) -> Tensor:
        if layer is not None:
            return self.replaced(x, layer)
        return self.behind(x, y, layout)

    def takes_over(self, x: Tensor, layer: nn.Module) -> bool:
        """Whether it is to run the layer, too, for this input.

        Args:
            x (Tensor): (..., in_dims), what the layer received.
            layer (nn.Module): The stock linear layer or norm at the site.
        """
        raise NotImplementedError

    def replaced(self, x: Tensor, layer: nn.Module) -> Tensor:
        """What :meth:`behind` makes of ``layer(x)``, in one go."""
        raise NotImplementedError

    def behind(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """What other modules compute in ``forward``."""
        raise NotImplementedError


class Selector(Method):
    """A choice of stock parameters that train in place."""

    def selects(self, module: nn.Module, leaf: str) -> bool:
        """Whether parameter ``leaf`` of ``module`` itself trains."""
        raise NotImplementedError

    def select(self, backbone: nn.Module, blocks: Sequence,
               restricted: bool) -> Iterator[str]:
        """Names of the parameters that train.

        Args:
            backbone (nn.Module): The stock backbone.
            blocks (Sequence[Block]): The blocks chosen by ``layers``.
            restricted (bool): Whether ``layers`` was given; without it, parts
                outside the blocks belong to the choice too.
        """
        roots = {
            b.path: b.module
            for b in blocks
        } if restricted else {
            '': backbone
        }
        for root, module in roots.items():
            for path, child in module.named_modules(prefix=root):
                for leaf, _ in child.named_parameters(recurse=False):
                    if self.selects(child, leaf):
                        yield f'{path}.{leaf}' if path else leaf


def check_width(owner: str, name: str, value: int, limit: int) -> int:
    """Refuse a width that is not a whole number in [1, limit]."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PEFTError(f'{owner}: {name} must be a whole number of at least '
                        f'1, but got {value!r}.')
    if value > limit:
        raise PEFTError(f'{owner}: {name}={value} is larger than the width '
                        f'{limit} of the layer it is attached to; use at most '
                        f'{limit}, or `overrides` for the narrow stages.')
    return value


def check_positive(owner: str, name: str, value: float) -> float:
    """Refuse a factor or deviation that is not a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise PEFTError(f'{owner}: {name} must be a number above 0, but got '
                        f'{value!r}.')
    return float(value)


def check_rate(owner: str, name: str, value: float) -> float:
    """Refuse a probability outside [0, 1)."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise PEFTError(f'{owner}: {name} must be a number in [0, 1), but got '
                        f'{value!r}.')
    return float(value)
