"""Side networks join outputs that a stock forward cuts out of its stream."""
from typing import List, Sequence

import torch.nn as nn
from torch import Tensor

from ..stream import Stream

__all__ = ['join_maps']


class JoinedMaps:
    """Outputs with side networks joined.

    mmseg's backbones make a map of the stream behind a block inside their
    ``forward``, where no module is called. The joined stream is kept behind
    the block, which the next one does not see, and takes the place of the
    map when the forward is done.

    Args:
        stream (Stream): What travels beside the tokens.
        places (list[int]): The outputs that are joined, by their place in
            the result.
    """

    def __init__(self, stream: Stream, places: Sequence[int]) -> None:
        self.stream = stream
        self.places = list(places)
        self.kept: List[Tensor] = []

    def begin(self, backbone: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the backbone: forget what an error left."""
        self.kept = []

    def keep(self, block: nn.Module, args: tuple, y: Tensor) -> None:
        """Forward hook of a block that is an output."""
        self.kept.append(self.stream.output(y, 0))

    def replace(self, backbone: nn.Module, args: tuple, outs: tuple) -> tuple:
        """Forward hook of the backbone."""
        outs = list(outs)
        for place, x in zip(self.places, self.kept):
            # A map, or one with the class token.
            both = isinstance(outs[place], list)
            shape = (outs[place][0] if both else outs[place]).shape
            grid = x[:, x.shape[1] - shape[2] * shape[3]:]
            grid = grid.transpose(1, 2).reshape(shape).contiguous()
            outs[place] = [grid, x[:, 0]] if both else grid
        self.kept = []
        return tuple(outs)


def join_maps(backbone: nn.Module,
              stream: Stream,
              places: Sequence[int],
              before: int = 0) -> list:
    """Join those outputs that have no norm; returns the handles of the hooks.

    Hooks are bound methods, which follow a deep copy.

    Args:
        backbone (nn.Module): Has ``layers`` and ``out_indices``.
        stream (Stream): What travels beside the tokens.
        places (list[int]): Places in the result of the outputs to join.
        before (int): How many there are in the result of no block.
            Defaults to 0.
    """
    maps = JoinedMaps(stream, places)
    outs = sorted(backbone.out_indices)
    return [
        backbone.register_forward_pre_hook(maps.begin), *[
            backbone.layers[outs[place - before]].register_forward_hook(
                maps.keep) for place in places
        ],
        backbone.register_forward_hook(maps.replace)
    ]
