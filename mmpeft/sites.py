"""Names of the places in a transformer, and what a method sees there.

Every attached module has one contract, ``forward(x, y, layout) -> y``: ``x``
is what the stock operation received, ``y`` what it returned, and the result
takes the place of ``y``. ``docs/en/sites.md`` has the table of all sites.

======================================  =======================================
site                                    ``x`` -> ``y``
======================================  =======================================
``norm1``, ``norm2``                    input and output of the LayerNorm
``qkv``, ``proj``, ``fc1``, ``fc2``     input and output of the linear layer
                                        (inside windows; no layout)
``qkv_input``, ``proj_input``,          both the input of the linear layer,
``fc1_input``, ``fc2_input``            pad tokens of windows included
``attn_shortcut``, ``ffn_shortcut``     both the block stream; the result is
                                        what the branch is added to
``attn_parallel``, ``ffn_parallel``     stream after the norm -> branch
                                        output, before drop-path
``attn_branch``, ``ffn_branch``         block stream -> branch output, before
                                        drop-path
``attn_add``, ``ffn_add``               block stream -> branch output, after
                                        drop-path
``attn_residual``, ``ffn_residual``     block stream before the branch ->
                                        stream after the add
``tokens``                              block stream -> tokens that join its
                                        attention, through norm1
``attn_tokens``                         stream after norm1 -> tokens that join
                                        the attention as they are
``attn_kv``                             stream after norm1 -> pair of extra
                                        keys and values
``patch_embed``, ``patch_norm``         projection and norm of the stem
``merge_norm``, ``merge_linear``        norm and projection of a patch merging
``out_norm``                            norm of an output
======================================  =======================================
"""
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

from torch import Tensor

__all__ = [
    'LINEAR_SITES', 'MODULE_SITES', 'INPUT_SITES', 'STREAM_SITES',
    'TOKEN_SITES', 'PART_SITES', 'SITES', 'Site', 'TokenLayout'
]

LINEAR_SITES = ('qkv', 'proj', 'fc1', 'fc2')
# Sites that are a call of one stock submodule of a block.
MODULE_SITES = ('norm1', 'norm2') + LINEAR_SITES
# What a linear layer of a block receives.
INPUT_SITES = ('qkv_input', 'proj_input', 'fc1_input', 'fc2_input')
# Sites on the token stream, which the family's block forward calls.
STREAM_SITES = ('attn_shortcut', 'attn_parallel', 'attn_branch', 'attn_add',
                'attn_residual', 'ffn_shortcut', 'ffn_parallel', 'ffn_branch',
                'ffn_add', 'ffn_residual')
# What joins the attention beside the tokens of the map.
TOKEN_SITES = ('tokens', 'attn_tokens', 'attn_kv')
# Stock submodules outside the blocks.
PART_SITES = ('patch_embed', 'patch_norm', 'merge_norm', 'merge_linear',
              'out_norm')
SITES = MODULE_SITES + INPUT_SITES + STREAM_SITES + TOKEN_SITES + PART_SITES


@dataclass(frozen=True)
class Site:
    """One place in a backbone.

    Attributes:
        name (str): One of ``mmpeft.sites.SITES``.
        in_dims (int): Channels of ``x``.
        out_dims (int): Channels of ``y``.
        block (str): Path of the block inside the backbone, or of the
            submodule where the site is outside the blocks.
        stage (int): Number of the stage the block is in, from 0.
        rows (dict): For a fused linear layer, the output rows of each part,
            such as ``{'q': (0, 128), 'k': (128, 256), 'v': (256, 384)}``.
        index (int): Number of the block over the backbone, from 0.
        stem_dims (int): Width of the tokens that enter the first block.
        patch_size (int): Side of a patch of the stem, in pixels.
        drop_path (float): Rate of the block's own drop-path.
    """

    name: str
    in_dims: int
    out_dims: int
    block: str = ''
    stage: int = 0
    rows: Dict[str, Tuple[int, int]] = field(default_factory=dict)
    index: int = 0
    stem_dims: int = 0
    patch_size: int = 0
    drop_path: float = 0.

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
