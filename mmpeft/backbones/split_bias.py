"""A fused projection whose bias the stock attention keeps in parts."""
from typing import Optional

import torch
import torch.nn as nn
from torch import Tensor

from .attached import peft_class

__all__ = ['SplitBias', 'join_bias', 'split_bias']


class SplitBias:
    """``qkv`` of an attention with a ``q_bias`` and a ``v_bias`` of its own.

    Stock puts the bias together and calls ``F.linear`` with the weight of
    ``qkv``, so that no hook on ``qkv`` ever runs. With this bias a call of
    ``qkv`` is the same operation, and its keys stay as they were.
    """

    #: Names in the attention of the bias of each third of the rows.
    bias_parts = ('q_bias', None, 'v_bias')

    @property
    def bias(self) -> Optional[Tensor]:
        """(3 * C, ), with zeros for the keys; None if there is none."""
        attention = self._attention[0]
        q, v = attention.q_bias, attention.v_bias
        if q is None:
            return None
        return torch.cat((q, torch.zeros_like(v, requires_grad=False), v))


def join_bias(attention: nn.Module, softmax_of_products: bool) -> None:
    """Let calls of ``attention.qkv`` add the bias.

    Args:
        attention (nn.Module): Has ``qkv``, ``q_bias`` and ``v_bias``.
        softmax_of_products (bool): Whether the weights are the softmax of
            products of queries and keys. A bias of the keys, the same for
            all of them, then changes nothing, and may be left out by a
            merge.
    """
    qkv = attention.qkv
    qkv.__class__ = peft_class(SplitBias, type(qkv))
    # A tuple, so that the attention is not registered as a child.
    qkv._attention = (attention, )
    qkv.keys_need_no_bias = softmax_of_products


def split_bias(attention: nn.Module) -> None:
    """Undo :func:`join_bias`."""
    qkv = attention.qkv
    qkv.__class__ = type(qkv).stock_class
    del qkv._attention, qkv.keys_need_no_bias
