"""What a network runs beside, and what of the backbone it trains."""
from typing import List, Sequence, Set, Type

import torch.nn as nn

from .backbones.base import Block
from .errors import PEFTError, SiteError
from .methods.side import SideNetwork, Trunk
from .plan import MethodPlan

__all__ = [
    'HAS_STAGES', 'beside', 'replaces_outputs', 'trained_beside', 'trunk_of'
]

#: Why a method that makes a pyramid is refused.
HAS_STAGES = ('it makes a pyramid of maps that have one size, and this '
              'backbone has stages')


def replaces_outputs(plans: Sequence[MethodPlan]) -> bool:
    """Whether one of the methods gives the outputs of the backbone.

    Raises:
        PEFTError: If another one gives or joins them, too.
    """
    networks = [p.cls for p in plans if p.is_network]
    replacing = [c for c in networks if c.replaces_outputs]
    others = [c for c in networks if c.joins_outputs]
    if replacing and len(replacing + others) > 1:
        both = ' and '.join(c.__name__ for c in replacing + others)
        raise PEFTError(
            f'{both} cannot stand together: {replacing[0].__name__} replaces '
            'the outputs of the backbone, and nothing would read what others '
            'give.')
    return bool(replacing)


def beside(cls: Type[SideNetwork], chosen: Sequence[Block],
           blocks: Sequence[Block], backbone: nn.Module) -> List[Block]:
    """The blocks that a network runs beside.

    Args:
        cls (type[SideNetwork]): The network.
        chosen (Sequence[Block]): The blocks that it was given.
        blocks (Sequence[Block]): All that reach an output.
        backbone (nn.Module): The stock backbone.

    Raises:
        SiteError: If it cannot run beside such a backbone.
        PEFTError: If nothing would read it, or a stage between is left out.
    """
    family = blocks[0].family
    if cls.needs_grid and not family.has_grid:
        raise SiteError(f'{cls.__name__} needs a grid of tokens; the tokens '
                        f'of {family.__name__} form none.')
    if cls.one_stage and family.has_stages():
        raise SiteError(f'{cls.__name__} cannot run beside '
                        f'{type(backbone).__name__}: {HAS_STAGES}.')
    if cls.replaces_outputs and chosen[-1] is not blocks[-1]:
        raise PEFTError(f'{cls.__name__} gives the outputs of the backbone, '
                        f'which ends with {blocks[-1].path}; `layers` leaves '
                        'it out, and nothing would read it.')
    chosen = list(chosen)
    if cls.joins_outputs:
        chosen = _before_outputs(cls, chosen, backbone)
    stages = sorted({b.stage for b in chosen})
    gap = set(range(stages[0], stages[-1] + 1)) - set(stages)
    if gap:
        raise PEFTError(f'{cls.__name__}: `layers` leaves out stage '
                        f'{min(gap)} between two that it has; its state '
                        'cannot skip a stage.')
    return chosen


def _before_outputs(cls: Type[SideNetwork], chosen: Sequence[Block],
                    backbone: nn.Module) -> List[Block]:
    """Without the blocks behind the last output, where nothing would get a
    gradient."""
    family = chosen[0].family
    reason = family.no_trunk(backbone)
    if reason:
        raise SiteError(f'{cls.__name__} runs beside the backbone and joins '
                        f'its outputs, but {reason}.')
    outputs = family.outputs(backbone)
    last = max((b.stage for b in chosen if b.stage in outputs), default=-1)
    if last < 0:
        stages = sorted({b.stage for b in chosen})
        raise PEFTError(f'{cls.__name__}: none of the stages of `layers` '
                        f'({stages}) is an output of the backbone.')
    return [b for b in chosen if b.stage <= last]


def trunk_of(cls: Type[SideNetwork], chosen: Sequence[Block],
             backbone: nn.Module) -> Trunk:
    """These blocks, as a side network sees them."""
    family = chosen[0].family
    dims = {b.stage: family.embed_dims(b.module) for b in chosen}
    outputs = family.outputs(backbone) if cls.joins_outputs else ()
    return Trunk(
        tuple(family.trunk_block(b) for b in chosen), dims,
        tuple(s for s in outputs if s in dims),
        family.stem(backbone)[0])


def trained_beside(cls: Type[SideNetwork], chosen: Sequence[Block],
                   trunk: Trunk, backbone: nn.Module) -> Set[str]:
    """Names of the stock parameters that a network trains."""
    family, modules = chosen[0].family, []
    for block in chosen:
        for name in cls.trained_norms:
            # Refuses what it does not offer.
            modules.append(block.layer(family.site(block, name).name))
    if cls.trains_out_norms:
        modules += [
            part.module for part in family.parts(backbone)
            if part.name == 'out_norm' and part.stage in trunk.outputs
        ]
    names = {id(p): n for n, p in backbone.named_parameters()}
    return {names[id(p)] for m in modules for p in m.parameters()}
