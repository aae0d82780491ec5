"""What travels beside the token stream through one forward."""
from functools import partial
from typing import Any, Dict, Optional, Tuple, Type

import torch.nn as nn
from torch import Tensor

from .errors import PEFTError, SiteError
from .methods.side import SideNetwork
from .sites import TokenLayout

__all__ = ['Stream', 'begin', 'end', 'join_output']


class Stream:
    """Prompts that blocks pass on, and the states of side networks.

    It lives from the beginning of the backbone's forward to its end; between
    two forwards it holds no tensor. Blocks reach it by a plain attribute, so
    a deep copy of the backbone gets one of its own.

    Args:
        family (type): Site map of the blocks.
        networks (dict[str, SideNetwork]): The side networks by name.
        mergings (dict[int, nn.Module]): By stage, the stock patch merging
            that leads into it.
    """

    def __init__(self, family: Type, networks: Dict[str, SideNetwork],
                 mergings: Dict[int, nn.Module]) -> None:
        self.family = family
        self.networks = networks
        self.mergings = mergings
        # By network, the blocks it runs beside; others may have tokens.
        self.beside = {
            name: [b.index for b in network.trunk.blocks]
            for name, network in networks.items()
        }
        # Those that write go first, so that the others see what goes on.
        self.order = sorted(networks, key=lambda n: not networks[n].writes)
        # Numbers of the first and last block here, and of the first one that
        # passes its tokens on.
        self.first: Optional[int] = None
        self.last: Optional[int] = None
        self.source: Optional[int] = None
        # What the backbone got, if a network reads it.
        self.image: Optional[Tensor] = None
        self.reset()

    def enter(self, peft: nn.ModuleDict) -> None:
        """Run beside another block; they come in order."""
        index = self.last = peft.place.index
        self.first = index if self.first is None else self.first
        if peft.carries and self.source is None:
            self.source = index

    def reset(self) -> None:
        """Forget all tensors."""
        self.tokens: Optional[Tensor] = None
        self.states: Dict[str, Any] = {}
        # The stage that is being run.
        self.stage: Optional[int] = None
        # By network, stage and layout of the last block it ran beside.
        self.places: Dict[str, Tuple[int, TokenLayout]] = {}
        # Whether the last output was joined before its norm.
        self.joined = False

    def arrive(self, peft: nn.ModuleDict, x: Tensor,
               layout: TokenLayout) -> Tensor:
        """What goes into a block in the place of ``x``.

        Raises:
            PEFTError: If the state of a side network is gone.
            SiteError: If one needs a grid, and the tokens form none.
        """
        place = peft.place
        if place.index == self.first:
            # Not all that runs the blocks is the forward of the backbone:
            # timm's models have a forward_features.
            self.reset()
        for name, network in self.networks.items():
            if network.enters and place.index in self.beside[name]:
                self._reach(name, peft, x, layout)
                x = network.enter(self.states[name], place, x, layout)
        return x

    def join(self, peft: nn.ModuleDict, x: Tensor,
             layout: TokenLayout) -> Optional[Tensor]:
        """Tokens (B, p, C) that enter a block beside ``x``; None if it has no
        such site.

        Raises:
            PEFTError: If the tokens of the block before are gone.
        """
        if not peft.has('tokens'):
            self.tokens = None
            return None
        tokens = self.tokens
        if tokens is None and peft.carries and peft.place.index != self.source:
            raise _run_alone('The tokens', peft)
        if tokens is None:
            tokens = x.new_zeros(x.shape[0], 0, x.shape[-1])
        elif tokens.shape[-1] != x.shape[-1]:
            merging = self.mergings[peft.place.stage]
            tokens = self.family.merge_tokens(merging, tokens)
        return peft.run('tokens', x, tokens, layout)

    def leave(self, peft: nn.ModuleDict, x: Tensor, y: Tensor,
              tokens: Optional[Tensor], taps: Optional[Dict[str, Tensor]],
              layout: TokenLayout) -> Tensor:
        """Take over what came out of a block.

        Returns:
            Tensor: What goes on to the next block.

        Raises:
            PEFTError: If the state of a side network is gone.
            SiteError: If one needs a grid, and the tokens form none.
        """
        if 'tokens' in peft.taps:
            taps['tokens'] = tokens
        last = peft.place.index == self.last
        self.tokens = tokens if peft.carries and not last else None
        place, states = peft.place, self.states
        for name in self.order:
            network = self.networks[name]
            if place.index not in self.beside[name]:
                continue
            self._reach(name, peft, x, layout)
            seen = (x.detach(), y.detach()) if network.detaches else (x, y)
            states[name] = network.step(states[name], place, *seen, taps,
                                        layout)
            if network.writes:
                y = network.write(states[name], place, y, layout)
        self.stage = place.stage
        return y

    def _reach(self, name: str, peft: nn.ModuleDict, x: Tensor,
               layout: TokenLayout) -> None:
        """Bring the state of a side network to a block."""
        network, place, states = self.networks[name], peft.place, self.states
        if network.needs_grid and layout.hw_shape is None:
            raise SiteError(
                f'{type(network).__name__} needs the whole grid of '
                f'tokens, but {x.shape[1]} tokens entered {place.path}, '
                'as with masked images or patch dropout; choose a method '
                'that reads single tokens.')
        if name not in states:
            if place.index != self.beside[name][0]:
                raise _run_alone(f'The state of {name!r}', peft)
            image = [self._image(network)] if network.reads_image else []
            x = x.detach() if network.detaches else x
            states[name] = network.start(x, layout, *image)
        elif place.stage != self.places[name][0]:
            before = self.places[name][1]
            downsample = partial(self.family.merge_map,
                                 self.mergings.get(place.stage), before)
            states[name] = network.next_stage(states[name], place.stage,
                                              downsample, before)
        self.places[name] = place.stage, layout

    def output(self, x: Tensor, stage: int) -> Tensor:
        """The output of a stage with the side networks joined."""
        for name, (last, layout) in self.places.items():
            network = self.networks[name]
            if last == stage and network.joins_outputs:
                x = network.output(self.states[name], x, stage, layout)
        return x

    def begin(self, args: tuple) -> None:
        """Before the forward of the backbone."""
        self.reset()
        if args and any(n.reads_image for n in self.networks.values()):
            self.image = args[0]

    def _image(self, network: SideNetwork) -> Tensor:
        if self.image is None:
            raise PEFTError(
                f'{type(network).__name__} reads the image and replaces the '
                'outputs of the backbone, whose blocks were run without its '
                'forward(image), as forward_features of timm does; call the '
                'backbone itself.')
        return self.image

    def end(self) -> Optional[Tuple[Tensor, ...]]:
        """Behind it: what takes the place of its outputs; None if nothing
        does."""
        outputs = None
        for name, network in self.networks.items():
            if network.replaces_outputs and name in self.states:
                outputs = network.outputs(self.states[name])
        self.reset()
        self.image = None
        return outputs


def _run_alone(what: str, peft: nn.ModuleDict) -> PEFTError:
    return PEFTError(
        f'{what} of the block before did not reach {peft.place.path}: it was '
        'run by itself, as checkpointing around a block does in backward. Set '
        'with_cp=True on the blocks instead.')


def begin(backbone: nn.Module, args: tuple) -> None:
    """Forward pre-hook of the backbone."""
    backbone.peft.stream.begin(args)


def end(backbone: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of the backbone; also runs after an error."""
    return backbone.peft.stream.end()


def join_output(norm: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of the norm of an output."""
    stream, stage = norm._peft_output
    stream.joined = True
    return (stream.output(args[0], stage), *args[1:])
