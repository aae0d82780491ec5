"""Names of the places in a transformer block, and what a method sees there.

Every attached module has one contract, ``forward(x, y, layout) -> y``: ``x``
is what the stock operation received, ``y`` what it returned, and the result
takes the place of ``y``.

======================================  =======================================
site                                    ``x`` -> ``y``
======================================  =======================================
``norm1``, ``norm2``                    input and output of the LayerNorm
``qkv``, ``proj``, ``fc1``, ``fc2``     input and output of the linear layer
                                        (inside windows; no layout)
``attn_branch``, ``ffn_branch``         block stream -> branch output, before
                                        drop-path and the residual add
``attn_residual``, ``ffn_residual``     block stream before the branch ->
                                        stream after the add
======================================  =======================================
"""
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

from torch import Tensor

__all__ = ['MODULE_SITES', 'STREAM_SITES', 'SITES', 'Site', 'TokenLayout']

# Sites that are a call of one stock submodule.
MODULE_SITES = ('norm1', 'norm2', 'qkv', 'proj', 'fc1', 'fc2')
# Sites on the token stream, which the family's block forward calls.
STREAM_SITES = ('attn_branch', 'attn_residual', 'ffn_branch', 'ffn_residual')
SITES = MODULE_SITES + STREAM_SITES


@dataclass(frozen=True)
class Site:
    """One place in one block.

    Attributes:
        name (str): One of ``mmpeft.sites.SITES``.
        in_dims (int): Channels of ``x``.
        out_dims (int): Channels of ``y``.
        block (str): Path of the block inside the backbone.
        stage (int): Number of the stage the block is in, from 0.
        rows (dict): For a fused linear layer, the output rows of each part,
            such as ``{'q': (0, 128), 'k': (128, 256), 'v': (256, 384)}``.
    """

    name: str
    in_dims: int
    out_dims: int
    block: str = ''
    stage: int = 0
    rows: Dict[str, Tuple[int, int]] = field(default_factory=dict)

    @property
    def embed_dims(self) -> int:
        """Width of the token stream (``x`` and ``y`` agree there)."""
        return self.in_dims


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of a stream are arranged.

    Attributes:
        hw_shape (tuple[int, int], optional): Height and width of the token
            grid; None where the tokens form none.
        num_extra_tokens (int): Class and register tokens before the grid.
    """

    hw_shape: Optional[Tuple[int, int]] = None
    num_extra_tokens: int = 0

    def to_grid(self, tokens: Tensor) -> Tensor:
        """(B, H*W, C) -> (B, C, H, W)."""
        height, width = self.hw_shape
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    @staticmethod
    def to_tokens(grid: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H*W, C)."""
        return grid.flatten(2).transpose(1, 2)
