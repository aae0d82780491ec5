import torch.nn as nn

from ..registry import METHODS
from .base import MONA_RECIPE, Selector

__all__ = ['BitFit']


@METHODS.register_module()
class BitFit(Selector):
    """Train the bias vectors.

    `BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
    Masked Language-models <https://arxiv.org/abs/2106.10199>`_ (ACL 2022).
    The paper's models have no relative-position bias; the released dense code
    matches names by the substring ``bias`` and so trains those tables as
    well, which is what the published counts contain (0.202 M in Swin-B, of
    which 0.064 M are tables). That is the default here.

    Args:
        rel_pos_tables (bool): Whether ``relative_position_bias_table`` counts
            as a bias. Defaults to True.
    """

    key = 'bitfit'
    recipe_lr = MONA_RECIPE

    def __init__(self, rel_pos_tables: bool = True) -> None:
        self.rel_pos_tables = rel_pos_tables

    def selects(self, module: nn.Module, leaf: str) -> bool:
        # Fused in nn.MultiheadAttention; that of q and v may be apart.
        if leaf in ('bias', 'in_proj_bias', 'q_bias', 'v_bias'):
            return True
        return self.rel_pos_tables and leaf == 'relative_position_bias_table'
