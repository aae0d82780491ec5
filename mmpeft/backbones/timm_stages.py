"""Side networks join outputs of the stages of a timm model."""
from typing import Any, Dict

import torch.nn as nn
from torch import Tensor

from ..stream import Stream
from .timm_models import GETTERS, is_a

__all__ = ['JoinedStages', 'join_norm']


def joined(stream: Stream, stage: int, x: Tensor) -> Tensor:
    """A map (B, H, W, C) with what joins the output of a stage."""
    return stream.output(x.flatten(1, 2), stage).unflatten(1, x.shape[1:3])


def join_norm(norm: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of the norm of an output."""
    return (joined(*norm._peft_output, args[0]), *args[1:])


class JoinedStages:
    """Outputs of stages without a norm, with side networks joined.

    The stream goes on as it is, so what an output will be is kept at the end
    of its stage, and given in its place when all are collected.

    Args:
        stream (Stream): What travels beside the tokens.
        places (dict[int, int]): By stage, the place of its output in the
            result.
    """

    def __init__(self, stream: Stream, places: Dict[int, int]) -> None:
        self.stream = stream
        self.places = places
        self.kept: Dict[int, Tensor] = {}

    def begin(self, net: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the net: forget what an error left."""
        self.kept = {}

    def keep(self, stage: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of a stage, which the side networks are at."""
        number = self.stream.stage
        self.kept[self.places[number]] = joined(self.stream, number, output)

    def give(self, net: nn.Module, args: tuple, outputs: Any) -> Any:
        """Forward hook of the net that collects the outputs."""
        keys = [*outputs] if isinstance(outputs, dict) else range(len(outputs))
        for place, x in self.kept.items():
            # A getter turns maps to channels first.
            outputs[keys[place]] = x.permute(0, 3, 1, 2).contiguous() \
                if is_a(net, GETTERS) else x
        self.kept = {}
        return outputs
