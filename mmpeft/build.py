"""Build what the methods ask for, and put it into a backbone."""
from typing import Dict, List, Optional, Sequence, Tuple

import torch.nn as nn

from .backbones.attached import BlockPEFT, connect
from .backbones.base import Block, Part
from .beside import beside, replaces_outputs, trained_beside, trunk_of
from .errors import PEFTError, SiteError
from .methods.base import PEFTModule
from .methods.side import SideNetwork
from .plan import MethodPlan
from .sites import INPUT_SITES, MODULE_SITES
from .state import PEFTState
from .stream import Stream

__all__ = ['Build', 'attach']


class Build:
    """Everything that will be attached, built and checked.

    The backbone is only read.

    Args:
        backbone (nn.Module): The stock backbone.
        plans (list[MethodPlan]): The methods.
        blocks (list[Block]): The blocks that reach an output.
    """

    def __init__(self, backbone: nn.Module, plans: Sequence[MethodPlan],
                 blocks: Sequence[Block]) -> None:
        self.family = blocks[0].family
        #: (block or part, name of the method, modules by site)
        self.modules: List[Tuple] = []
        self.shared: Dict[str, nn.Module] = {}
        self.networks: Dict[str, SideNetwork] = {}
        #: By method, the blocks it left out as no output depends on their
        #: grid.
        self.gridless: Dict[str, List[str]] = {}
        #: Blocks that a side network runs beside, and what it reads there.
        self.taps: Dict[str, Tuple[str, ...]] = {}
        #: Names of the stock parameters that side networks train.
        self.trained: set = set()
        self.stream: Optional[Stream] = None
        #: Paths of stock parts whose output nothing reads.
        self.unread: List[str] = []
        if replaces_outputs(plans):
            self.unread = self.family.out_paths(backbone)
        for plan in plans:
            if plan.is_module:
                self._add_modules(plan, backbone, blocks)
            elif plan.is_network:
                self._add_network(plan, backbone, blocks)
        self._check_tokens()
        carries = any(m.carries for _, _, at in self.modules
                      for m in at.values())
        joins = any('tokens' in at for _, _, at in self.modules)
        if self.networks or carries or joins:
            self.stream = Stream(self.family, self.networks,
                                 self.family.mergings(backbone))

    def _add_modules(self, plan: MethodPlan, backbone: nn.Module,
                     blocks: Sequence[Block]) -> None:
        cls = plan.cls
        places: List[Tuple] = []
        for block in plan.choose(blocks):
            if cls.needs_grid and not self.family.has_grid:
                raise SiteError(
                    f'{cls.__name__} needs a grid of tokens; the tokens of '
                    f'{type(block.module).__name__} form none.')
            if cls.needs_grid and not cls.moves_extra and \
                    self.family.grid_ends(block):
                self.gridless.setdefault(plan.name, []).append(block.path)
                continue
            kwargs = plan.kwargs_for(block, blocks)
            sites = [
                self.family.site(block, name)
                for name in cls.sites_for(**kwargs)
            ]
            sites = list({site.name: site for site in sites}.values())
            # A block may have nothing of a method whose widths differ, or that
            # only sits outside the blocks.
            if sites or cls.parts:
                places.append((block, sites, kwargs))
        if not places and plan.name not in self.gridless:
            raise PEFTError(f'{cls.__name__}: with these arguments there is '
                            'nothing to attach to any block.')
        if not places:
            raise SiteError(
                f'{cls.__name__} changes the grid of tokens, but in '
                f'{", ".join(self.gridless[plan.name])} no output depends on '
                'it: the head reads the class token alone. Choose other '
                'blocks with `layers`, or another `out_type` of the backbone.')
        if not plan.restricted:
            places += [
                (part, [part.site], plan.kwargs)
                for part in self.family.parts(backbone)
                if part.name in cls.parts and part.path not in self.unread
            ]
        owner = cls.build_shared([s for _, sites, _ in places for s in sites],
                                 **plan.kwargs)
        if owner is not None:
            if plan.overrides:
                raise PEFTError(f'{cls.__name__} shares weights between '
                                'blocks, so its arguments cannot differ per '
                                'block; remove `overrides`.')
            self.shared[plan.name] = owner
        for place, sites, kwargs in places:
            at = {site.name: plan.construct(site, kwargs) for site in sites}
            for name, module in at.items():
                if owner is not None:
                    module.bind_shared(owner)
                if module.needs_layer:
                    module.bind_layer(place.layer(name))
            self.modules.append((place, plan.name, at))

    def _add_network(self, plan: MethodPlan, backbone: nn.Module,
                     blocks: Sequence[Block]) -> None:
        cls = plan.cls
        chosen = beside(cls, plan.choose(blocks), blocks, backbone)
        trunk = trunk_of(cls, chosen, backbone)
        self.networks[plan.name] = plan.construct(trunk)
        self.trained |= trained_beside(cls, chosen, trunk, backbone)
        for block in chosen:
            self.taps[block.path] = self.taps.get(block.path, ()) + cls.taps
            at = {
                name: module(self.family.site(block, name))
                for name, module in cls.attached.items()
            }
            if at:
                self.modules.append((block, plan.name, at))

    def _check_tokens(self) -> None:
        """Tokens that are passed on cannot be told from others' tokens."""
        names: Dict[str, List[PEFTModule]] = {}
        for place, _, at in self.modules:
            if 'tokens' in at:
                names.setdefault(place.path, []).append(at['tokens'])
        for modules in names.values():
            if len(modules) > 1 and any(m.carries or m.asks for m in modules):
                titles = ' and '.join(type(m).__name__ for m in modules)
                raise PEFTError(f'{titles} cannot stand together: both put '
                                'tokens before the same blocks, and one of '
                                'them passes its tokens on or reads what '
                                'becomes of them.')


def attach(backbone: nn.Module, state: PEFTState, build: Build) -> None:
    """Put everything in its place."""
    family, stream = build.family, build.stream
    reference = next(iter(backbone.parameters()))
    for name, child in [*build.shared.items(), *build.networks.items()]:
        if getattr(state, name, child) is not child:
            raise PEFTError(f'name={name!r} is taken; choose another.')
        # What is attached follows the backbone's device and precision.
        state.add_module(name, child.to(reference))
    for network in build.networks.values():
        network.memory = state.memory
    for place, name, at in build.modules:
        if isinstance(place, Part):
            _attach_part(place, name, at)
        else:
            _attach_block(place, name, at)
        place.module.peft[name].to(reference)
    if stream is not None:
        for block in _blocks(build, backbone):
            module = block.module
            family.swap(module)
            module.peft.stream = stream
            module.peft.place = family.trunk_block(block)
            module.peft.taps = build.taps.get(block.path, ())
            stream.enter(module.peft)
    if state.memory != 'stock':
        for _, block in family.blocks(backbone):
            family.swap(block.module)
            block.module.peft.memory = state.memory
            family.save_memory(block.module)
    stages = {s for n in build.networks.values() for s in n.trunk.outputs}
    if stages:
        state._handles += family.join_outputs(backbone, stream, stages)
    state._handles += family.watch(
        backbone,
        [b for _, b in family.blocks(backbone) if hasattr(b.module, 'peft')])


def _blocks(build: Build, backbone: nn.Module) -> List[Block]:
    """Blocks that anything travels beside."""
    paths = set(build.taps) | {
        place.path
        for place, _, at in build.modules if 'tokens' in at
    }
    return [b for _, b in build.family.blocks(backbone) if b.path in paths]


def _attach_block(block: Block, name: str, at_sites: Dict[str,
                                                          PEFTModule]) -> None:
    family, module = block.family, block.module
    family.swap(module)
    module.peft[name] = nn.ModuleDict(at_sites)
    if not set(at_sites).isdisjoint(family.attention_sites):
        family.open_attention(module)
    for site in at_sites:
        if site in MODULE_SITES + INPUT_SITES:
            connect(block.layer(site), module.peft, site)


def _attach_part(part: Part, name: str, at_sites: Dict[str,
                                                       PEFTModule]) -> None:
    if 'peft' not in part.module._modules:
        part.module.peft = BlockPEFT()
    part.module.peft[name] = nn.ModuleDict(at_sites)
    connect(part.module, part.module.peft, part.name, part.channels_first)
