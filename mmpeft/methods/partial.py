from typing import Iterator, Optional, Sequence

import torch.nn as nn

from ..errors import PEFTError
from ..registry import METHODS
from .base import MONA_RECIPE, Selector

__all__ = ['Partial']


@METHODS.register_module()
class Partial(Selector):
    """Train the last blocks or stages in full (Partial-k).

    The baseline of `Visual Prompt Tuning <https://arxiv.org/abs/2203.12119>`_
    (ECCV 2022). The released dense code trains ``layers.3.blocks.1`` and
    leaves the output norm frozen, which is the default; the paper's code
    trains the final norm too (``final_norm=True``). Blocks before the first
    trained one run without autograd.

    Args:
        num_blocks (int, optional): How many blocks, counted from the end.
            Defaults to 1.
        num_stages (int, optional): How many stages, counted from the end,
            with the patch merging inside them; then ``num_blocks`` is not
            used. Defaults to None.
        final_norm (bool): Whether the norm of the last output trains too.
            Defaults to False.

    Raises:
        PEFTError: If the backbone has fewer blocks or stages.
    """

    recipe_lr = MONA_RECIPE

    def __init__(self,
                 num_blocks: int = 1,
                 num_stages: Optional[int] = None,
                 final_norm: bool = False) -> None:
        self.num_blocks = num_blocks
        self.num_stages = num_stages
        self.final_norm = final_norm

    def select(self, backbone: nn.Module, blocks: Sequence,
               restricted: bool) -> Iterator[str]:
        roots = self._roots(blocks)
        if self.final_norm:
            roots.append(blocks[-1].family.final_norm(backbone))
        for name, _ in backbone.named_parameters():
            if any(name.startswith(root + '.') for root in roots):
                yield name

    def _roots(self, blocks: Sequence) -> list:
        stages = list(dict.fromkeys(b.stage_path for b in blocks))
        wanted, found, what = (self.num_blocks, [b.path for b in blocks],
                               'num_blocks')
        if self.num_stages is not None:
            wanted, found, what = self.num_stages, stages, 'num_stages'
        if isinstance(wanted, bool) or not isinstance(
                wanted, int) or not (1 <= wanted <= len(found)):
            raise PEFTError(f'Partial: {what}={wanted!r} must be a whole '
                            f'number from 1 to {len(found)}, what this '
                            'backbone has.')
        return found[-wanted:]
