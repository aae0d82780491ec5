"""Where in a backbone something can be attached."""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterable, List, Optional, Tuple, Type

import torch.nn as nn

from ..sites import INPUT_SITES, Site

if TYPE_CHECKING:
    from .base import SiteMap

__all__ = ['Block', 'Part', 'parts_of']


@dataclass(frozen=True)
class Block:
    """One transformer block found in a backbone.

    Attributes:
        path (str): Path inside the backbone, such as ``stages.2.blocks.5``.
        index (int): Number over the whole backbone, from 0.
        stage (int): Number of its stage, from 0.
        stage_path (str): Path of its stage, such as ``stages.2``.
        module (nn.Module): The block itself.
        backbone (nn.Module): The backbone it is in.
        family (type): The site map of its family.
    """

    path: str
    index: int
    stage: int
    stage_path: str
    module: nn.Module
    backbone: nn.Module
    family: Type['SiteMap']

    def layer(self, site: str) -> Optional[nn.Module]:
        """The stock submodule at a site or behind an input; None if the site
        is no submodule."""
        name = site[:-len('_input')] if site in INPUT_SITES else site
        return self.family.modules(self.module).get(name)


@dataclass(frozen=True)
class Part:
    """A stock submodule outside the blocks that is a site.

    Attributes:
        name (str): One of ``mmpeft.sites.PART_SITES``.
        path (str): Path inside the backbone.
        stage (int): Number of the stage it belongs to, from 0.
        dims (int): Channels it returns.
        module (nn.Module): The submodule.
        channels_first (bool): Whether it returns a map (B, C, H, W), as a
            convolution always does.
    """

    name: str
    path: str
    stage: int
    dims: int
    module: nn.Module
    channels_first: bool = False

    @property
    def site(self) -> Site:
        """The site, for a module that is attached to it."""
        return Site(self.name, self.dims, self.dims, self.path, self.stage)

    def layer(self, site: str) -> nn.Module:
        """The submodule itself."""
        return self.module


def parts_of(found: Iterable[Tuple[str, str, int, Optional[nn.Module]]],
             channels_first: bool = False) -> List[Part]:
    """Parts of a name, a path, a stage and a module each; without those that
    a config leaves out, which are None or have no weight."""
    return [
        Part(name, path, stage, module.weight.shape[0], module, channels_first)
        for name, path, stage, module in found
        if getattr(module, 'weight', None) is not None
    ]
