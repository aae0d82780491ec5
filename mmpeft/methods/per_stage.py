"""What the blocks of a stage share, as widths differ between stages."""
from typing import Mapping

import torch.nn as nn

from ..sites import Site

__all__ = ['PerStage']


class PerStage(nn.ModuleDict):
    """One module for each stage, with the keys ``stage0`` and so on.

    Args:
        stages (Mapping[int, nn.Module]): By the number of the stage, what has
            a ``reset_parameters``.
    """

    def __init__(self, stages: Mapping[int, nn.Module]) -> None:
        super().__init__({f'stage{n}': m for n, m in stages.items()})

    def of(self, site: Site) -> nn.Module:
        """That of the stage a site is in."""
        return self[f'stage{site.stage}']

    def reset_parameters(self) -> None:
        """Initialise every stage."""
        for module in self.values():
            module.reset_parameters()
