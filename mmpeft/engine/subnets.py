"""The subnets of a NOAH supernet: which widths each block may have."""
import math
from random import Random
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch.nn as nn

from ..errors import PEFTError
from ..methods.noah import Elastic

__all__ = ['Subnet', 'SubnetSpace']

#: For each kind of part, the width in each block that has such a part.
Subnet = Tuple[Tuple[int, ...], ...]


class SubnetSpace:
    """All subnets of a model.

    Of each kind of part the first ``depth`` blocks have a width out of the
    choices, and the others none.

    Args:
        model (nn.Module): With NOAH attached.
        choices (dict[str, Sequence[int]]): Widths by the name of the argument,
            ``num_tokens``, ``rank`` or ``dim``.
        depths (Sequence[int], optional): Numbers of blocks. None means a
            quarter, half, three quarters and all.

    Raises:
        PEFTError: If the model has nothing of NOAH, or a part is narrower
            than a choice.
    """

    def __init__(self,
                 model: nn.Module,
                 choices: Dict[str, Sequence[int]],
                 depths: Optional[Sequence[int]] = None) -> None:
        found: Dict[str, List[Elastic]] = {}
        for module in model.modules():
            if isinstance(module, Elastic):
                found.setdefault(module.argument, []).append(module)
        if not found:
            raise PEFTError('There is no NOAH in this model, so it has no '
                            "subnets; use method=dict(type='NOAH').")
        places = [m.site.index for m in next(iter(found.values()))]
        if len(set(places)) < len(places):
            raise PEFTError('NOAH is attached to several backbones of this '
                            'model; a supernet has one.')
        #: In the order of the parts of a subnet.
        self.kinds = [kind for kind in choices if kind in found]
        self.modules = [found[kind] for kind in self.kinds]
        self.choices = [sorted(set(choices[kind])) for kind in self.kinds]
        for kind, modules, widths in zip(self.kinds, self.modules,
                                         self.choices):
            narrow = min(modules, key=lambda m: m.full)
            whole = all(type(w) is int and w > 0 for w in widths)
            if not widths or not whole or widths[-1] > narrow.full:
                raise PEFTError(
                    f'{kind}={widths} must be whole numbers above 0, and at '
                    f'most the {narrow.full} that NOAH has in '
                    f'{narrow.site.block}; give NOAH that {kind}.')
        self.depths = [self._depths(depths, len(m)) for m in self.modules]

    @staticmethod
    def _depths(depths: Optional[Sequence[int]], blocks: int) -> List[int]:
        if depths is None:
            depths = [math.ceil(blocks * i / 4) for i in range(1, 5)]
        depths = sorted(set(depths))
        if not depths or not all(
                type(d) is int and 0 <= d <= blocks for d in depths):
            raise PEFTError(f'depths={depths} must be whole numbers from 0 to '
                            f'{blocks}, the number of blocks with NOAH.')
        return depths

    def describe(self) -> dict:
        """What makes it another space if it differs, for JSON."""
        return dict(
            widths=dict(zip(self.kinds, self.choices)),
            depths=dict(zip(self.kinds, self.depths)),
            sizes=[[m.count(1) for m in modules] for modules in self.modules])

    def activate(self, subnet: Subnet) -> None:
        """Let the model compute as this subnet does."""
        for module, width in self._pairs(subnet):
            module.set_width(width)

    def count(self, subnet: Subnet) -> int:
        """Parameters that training it alone trains in the backbone, besides
        those of other methods."""
        return sum(m.count(width) for m, width in self._pairs(subnet))

    def _pairs(self, subnet: Subnet) -> Iterator[Tuple[Elastic, int]]:
        for modules, widths in zip(self.modules, subnet):
            yield from zip(modules, widths)

    def smallest(self) -> Subnet:
        """That with the fewest parameters."""
        return self._uniform(0)

    def largest(self) -> Subnet:
        """That with the most."""
        return self._uniform(-1)

    def _uniform(self, end: int) -> Subnet:
        return tuple(
            self._padded([widths[end]] * depths[end], len(modules)) for widths,
            depths, modules in zip(self.choices, self.depths, self.modules))

    @staticmethod
    def _padded(widths: Sequence[int], blocks: int) -> Tuple[int, ...]:
        return tuple(widths) + (0, ) * (blocks - len(widths))

    def sample(self, rng: Random) -> Subnet:
        """Any, first the depth and then each width drawn evenly."""
        return tuple(
            self._padded([
                rng.choice(self.choices[k])
                for _ in range(rng.choice(self.depths[k]))
            ], len(self.modules[k])) for k in range(len(self.kinds)))

    def mutate(self, subnet: Subnet, rng: Random, width_prob: float,
               depth_prob: float) -> Subnet:
        """Draw some depths and widths anew."""
        parts = []
        for k, widths in enumerate(subnet):
            depth = sum(w > 0 for w in widths)
            if rng.random() < depth_prob:
                depth = rng.choice(self.depths[k])
            drawn = [
                rng.choice(self.choices[k])
                if not w or rng.random() < width_prob else w
                for w in widths[:depth]
            ]
            parts.append(self._padded(drawn, len(widths)))
        return tuple(parts)

    @staticmethod
    def cross(one: Subnet, other: Subnet, rng: Random) -> Subnet:
        """Each kind of part from one of two parents."""
        return tuple(rng.choice(pair) for pair in zip(one, other))

    def by_block(self, subnet: Subnet) -> Dict[int, Dict[str, int]]:
        """Widths as arguments of NOAH, by the number of the block."""
        blocks: Dict[int, Dict[str, int]] = {}
        for kind, modules, widths in zip(self.kinds, self.modules, subnet):
            for module, width in zip(modules, widths):
                blocks.setdefault(module.site.index, {})[kind] = width
        return dict(sorted(blocks.items()))
