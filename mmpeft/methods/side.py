"""The third kind of method: a network that runs beside the backbone."""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Tuple, Type, Union

import torch.nn as nn
from torch import Tensor

from ..sites import TokenLayout
from .base import Method, PEFTModule

__all__ = ['SideNetwork', 'Trunk', 'TrunkBlock']


@dataclass(frozen=True)
class TrunkBlock:
    """A block of the backbone, as a side network sees it.

    Attributes:
        index (int): Number over the whole backbone, from 0.
        stage (int): Number of its stage, from 0.
        path (str): Path inside the backbone.
        embed_dims (int): Width of the token stream.
        num_heads (int): Heads of its attention.
        mlp_dims (int): Hidden channels of its MLP.
        window_size (int | tuple[int, int], optional): Side of its attention
            windows, or their height and width; None means that all tokens
            see each other.
        shift_size (int | tuple[int, int]): By how much its windows are
            shifted.
        key_stride (int): Side of the cells of the map whose means give keys
            and values.
    """

    index: int
    stage: int
    path: str
    embed_dims: int
    num_heads: int
    mlp_dims: int
    window_size: Union[int, Tuple[int, int], None] = None
    shift_size: Union[int, Tuple[int, int]] = 0
    key_stride: int = 1


@dataclass(frozen=True)
class Trunk:
    """The backbone, as a side network sees it.

    Attributes:
        blocks (tuple[TrunkBlock]): The blocks it runs beside, in order.
        stage_dims (dict[int, int]): Width of each of their stages.
        outputs (tuple[int]): Those of the stages that have an output that
            the network joins; a ViT has several of its one stage.
        stem_dims (int): Width of the tokens that enter the first block.
    """

    blocks: Tuple[TrunkBlock, ...]
    stage_dims: Dict[int, int]
    outputs: Tuple[int, ...]
    stem_dims: int


class SideNetwork(Method, nn.Module):
    """A network beside the backbone that reads it and joins its outputs.

    One object per backbone, at ``backbone.peft.<name>``. All it reads is
    detached, so that no gradient passes through a block and the backbone
    keeps nothing for backward. Its state ``u`` (a tensor, or what else a
    subclass makes of it) travels beside the token stream.

    One that :attr:`writes` changes the stream itself. It reads the stream as
    it is: gradients pass through the blocks behind the first one it wrote to,
    and those before keep nothing.

    One that :attr:`replaces_outputs` is all that is read of the backbone. It
    has ``out_channels``, those of its maps.

    Args:
        trunk (Trunk): What it runs beside.
    """

    #: Branch sites whose outputs :meth:`step` gets, before drop-path and
    #: detached; ``'tokens'`` for what became of the tokens of the block.
    taps: Tuple[str, ...] = ()
    #: By site, the modules it has in each of its blocks.
    attached: Dict[str, Type[PEFTModule]] = {}
    #: Sites of its blocks whose stock norms train too.
    trained_norms: Tuple[str, ...] = ()
    #: Whether the stream is detached where it reads it.
    detaches: bool = True
    #: Whether it has an :meth:`output`.
    joins_outputs: bool = True
    #: Whether it has a :meth:`write`.
    writes: bool = False
    #: Whether it has an :meth:`enter`.
    enters: bool = False
    #: Whether it has :meth:`outputs`.
    replaces_outputs: bool = False
    #: Whether :meth:`start` gets what the backbone got, as a third argument.
    reads_image: bool = False
    #: Whether it reads the H x W map and not only single tokens.
    needs_grid: bool = False
    #: Whether it can run only beside a backbone of one stage.
    one_stage: bool = False
    #: Whether the stock norms of the outputs train too.
    trains_out_norms: bool = False
    #: What it keeps for backward, one of ``mmpeft.recompute.MEMORY``; that
    #: of the backbone.
    memory: str = 'stock'
    #: Why it cannot be folded into stock layers.
    no_merge: str = 'it runs beside the backbone'

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def reset_parameters(self) -> None:
        """Initialise; called again after the backbone's ``init_weights``."""
        raise NotImplementedError

    def start(self, x: Tensor, layout: TokenLayout) -> Any:
        """State at the first block.

        Args:
            x (Tensor): (B, N, d), the tokens that enter it.
            layout (TokenLayout): How they are arranged.
        """
        raise NotImplementedError

    def step(self, u: Any, block: TrunkBlock, x: Tensor, y: Tensor,
             taps: Dict[str, Tensor], layout: TokenLayout) -> Any:
        """State after a block.

        Args:
            u: State before it.
            block (TrunkBlock): Which one.
            x (Tensor): (B, N, d), what entered the block.
            y (Tensor): (B, N, d), what left it.
            taps (dict[str, Tensor]): Branch outputs at :attr:`taps`.
            layout (TokenLayout): How the tokens are arranged.
        """
        raise NotImplementedError

    def next_stage(self, u: Any, stage: int, downsample: Callable,
                   layout: TokenLayout) -> Any:
        """State at the first block of another stage.

        Args:
            u: State after the last block of the stage before.
            stage (int): The stage that is entered.
            downsample (Callable): The frozen patch merging of the backbone,
                (B, N, d) -> (B, N / 4, 2 d); gradients pass through it.
            layout (TokenLayout): That of the stage before.
        """
        raise NotImplementedError

    def enter(self, u: Any, block: TrunkBlock, x: Tensor,
              layout: TokenLayout) -> Tensor:
        """What goes into a block in the place of ``x``, and what
        :meth:`step` then gets as such.

        Args:
            u: State before the block; at the first one, that of
                :meth:`start`.
            block (TrunkBlock): Which one.
            x (Tensor): (B, N, d), what came to it.
            layout (TokenLayout): How the tokens are arranged.
        """
        raise NotImplementedError

    def write(self, u: Any, block: TrunkBlock, y: Tensor,
              layout: TokenLayout) -> Tensor:
        """What goes on to the next block in the place of ``y``.

        Args:
            u: State after the block.
            block (TrunkBlock): Which one.
            y (Tensor): (B, N, d), what left it.
            layout (TokenLayout): How the tokens are arranged.
        """
        raise NotImplementedError

    def outputs(self, u: Any) -> Tuple[Tensor, ...]:
        """The maps (B, C, H, W) in the place of the backbone's outputs.

        Args:
            u: State after the last block.
        """
        raise NotImplementedError

    def output(self, u: Any, x: Tensor, stage: int,
               layout: TokenLayout) -> Tensor:
        """What goes into the stock norm of an output, if it has one.

        Args:
            u: State after the block that the output is from, in a pyramid the
                last one of the stage.
            x (Tensor): (B, N, d), the output.
            stage (int): The stage it is from.
            layout (TokenLayout): How the tokens are arranged.
        """
        raise NotImplementedError
