"""What side networks have in common whose state is a second stream."""
from typing import Any, Callable, Dict, Optional

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..recompute import recipes_for
from ..sites import TokenLayout
from .side import SideNetwork, Trunk, TrunkBlock

__all__ = ['Highway', 'State', 'recompute', 'run']


class State:
    """A stream beside the tokens of the backbone.

    Attributes:
        stream (Tensor): ``u``, (B, N, d).
        x (Tensor): (B, N, d), the tokens, detached.
        joined (Tensor, optional): ``x + u`` where it is an output. The patch
            merging takes the same tensor, so that it is kept once.
    """

    def __init__(self, stream: Tensor, x: Tensor) -> None:
        self.stream = stream
        self.x = x
        self.joined: Optional[Tensor] = None


def recompute(active: bool, function: Callable, *args: Any) -> Any:
    """Call a function; if ``active`` keep only its arguments for backward.

    What it computes inside is small work on wide tensors, so computing it
    again costs little time and saves most of the memory. It must not draw
    random numbers.
    """
    if not active:
        return function(*args)
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False)


def run(network: SideNetwork, function: Callable, *args: Any) -> Any:
    """Call a part of a network that lets its ``with_cp`` open.

    ``True`` keeps the arguments alone and ``False`` all that is inside;
    ``None`` is as the ``memory`` of the backbone: only the arguments if it is
    lean, and if it is fast what cannot be made again without a product.
    """
    if network.with_cp or (network.with_cp is None
                           and network.memory == 'lean'):
        return recompute(True, function, *args)
    memory = 'stock' if network.with_cp is False else network.memory
    with recipes_for(memory, args[0], False):
        return function(*args)


class Highway(SideNetwork):
    """A stream ``u`` that is added to the outputs of the backbone::

        u <- u + update(u, block)                  beside each block
        u <- merging(x + u) - merging(x)           between two stages
        out = norm(x + u)                          at each output

    ``x`` is the token stream of the backbone, ``u`` starts at 0. The frozen
    patch merging has a LayerNorm: alone, ``merging(u)`` would not be 0 at
    ``u = 0``, and its derivative there is ``1 / sqrt(eps)``, about 300, times
    the weights. What is here is the change of the merged stream that ``u``
    causes: 0 at ``u = 0``, and as smooth as the backbone itself.

    Args:
        trunk (Trunk): What it runs beside.
        with_cp (bool, optional): Whether backward computes the updates again;
            see :func:`run`.
    """

    def __init__(self, trunk: Trunk, with_cp: Optional[bool]) -> None:
        super().__init__(trunk)
        self.with_cp = with_cp

    def start(self, x: Tensor, layout: TokenLayout) -> State:
        return State(torch.zeros_like(x), x)

    def update(self, u: Tensor, block: TrunkBlock, y: Tensor,
               taps: Dict[str, Tensor], layout: TokenLayout) -> Tensor:
        """What is added to the stream ``u`` beside a block, (B, N, d)."""
        raise NotImplementedError

    def step(self, u: State, block: TrunkBlock, x: Tensor, y: Tensor,
             taps: Dict[str, Tensor], layout: TokenLayout) -> State:
        update = self.update(u.stream, block, y, taps, layout)
        return State(u.stream + update, y)

    def next_stage(self, u: State, stage: int, downsample: Callable,
                   layout: TokenLayout) -> State:
        joined = u.x + u.stream if u.joined is None else u.joined
        with torch.no_grad():
            plain = downsample(u.x)
        merged = run(self, downsample, joined)
        return State(merged - plain, plain)

    def output(self, u: State, x: Tensor, stage: int,
               layout: TokenLayout) -> Tensor:
        u.x, u.joined = x.detach(), x + u.stream
        return u.joined
