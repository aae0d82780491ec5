"""Blocks around ``torch.nn.MultiheadAttention``, whose weights are packed."""
import math
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.utils import digit_version
from torch import Tensor

from ..errors import SiteError
from ..sites import TOKEN_SITES
from .base import SiteMap
from .prenorm import JoinedAttention, PreNormForward

__all__ = ['InProjection', 'PackedAttention', 'PackedForward', 'PackedSites']

# Queries are divided by a root before torch 2.3, and multiplied by its
# inverse since: the last bit differs.
MULTIPLIES = digit_version(torch.__version__) >= digit_version('2.3.0')

# What stock modules get as identity, to return their branch alone.
NO_IDENTITY = 0.


class PackedForward(PreNormForward):
    """The stock forward of a block with mmcv's wrapper of the attention.

    That wrapper and the MLP add the identity and have drop-path inside.
    """

    joined_attention = property(lambda self: self.attn.attn)

    def run_attention(self, normed: Tensor, *args: Any) -> Tensor:
        branch = self.attn(normed, *args, identity=NO_IDENTITY)
        attention = self.joined_attention
        if getattr(attention, 'seen', None) is not None:
            attention.seen = self.attn.proj_drop(attention.seen)
        return branch

    def run_mlp(self, normed: Tensor) -> Tensor:
        return self.ffn(normed, identity=NO_IDENTITY)


class InProjection(nn.Module):
    """The projection to queries, keys and values, as a layer.

    The attention has its weights, and no submodule that something could be
    attached to. This one owns nothing, so that no key changes.

    Args:
        attention (nn.MultiheadAttention): The stock attention.
        parts (tuple[int]): How many of queries, keys and values stock
            computes in one product; others give other bits.
    """

    #: Names in the attention of the weight and of the bias.
    weight_part = 'in_proj_weight'
    bias_parts = ('in_proj_bias', )

    def __init__(self, attention: nn.MultiheadAttention,
                 parts: Tuple[int, ...]) -> None:
        super().__init__()
        # A tuple, so that it is not registered as a child.
        self._attention = (attention, )
        self.parts = parts

    weight = property(lambda self: self._attention[0].in_proj_weight)
    bias = property(lambda self: self._attention[0].in_proj_bias)

    def forward(self, x: Tensor, num_queries: int, first_key: int) -> Tensor:
        """What no use is made of is 0.

        Args:
            x (Tensor): (N, B, C).
            num_queries (int): How many tokens, from the first, ask.
            first_key (int): From which token on they are keys and values.

        Returns:
            Tensor: (N, B, 3 * C).
        """
        sizes = [n * x.shape[-1] for n in self.parts]
        weights = self.weight.split(sizes)
        biases = [None] * len(sizes)
        if self.bias is not None:
            biases = self.bias.split(sizes)
        queries = F.linear(x[:num_queries], weights[0], biases[0])
        after = len(x) - num_queries
        outs = [F.pad(queries, (0, 0, 0, 0, 0, after)) if after else queries]
        for weight, bias in zip(weights[1:], biases[1:]):
            out = F.linear(x[first_key:], weight, bias)
            if first_key:
                out = F.pad(out, (0, 0, 0, 0, first_key, 0))
            outs.append(out)
        return torch.cat(outs, dim=-1)


class PackedAttention(JoinedAttention):
    """``nn.MultiheadAttention`` as its slow path computes it, to the last bit,
    through layers that something can be attached to.

    Stock calls neither a layer for the projection in front nor ``out_proj``,
    and torch has a fused path that would know nothing of what is attached;
    with this forward there is none.
    """

    #: See :class:`InProjection`.
    parts = (1, 1, 1)

    def prepare(self) -> None:
        self.in_projection = InProjection(self, self.parts)

    def forget(self) -> None:
        super().forget()
        del self.in_projection

    def forward(self,
                query: Tensor,
                key: Tensor,
                value: Tensor,
                attn_mask: Optional[Tensor] = None,
                key_padding_mask: Optional[Tensor] = None) -> Tuple:
        """(N, B, C), (M, B, C) -> (N, B, C), None

        Keys and values are of the same tokens, and these the queries' or
        others.
        """
        if attn_mask is not None or key_padding_mask is not None:
            raise SiteError(f'{type(self).__name__}: what is attached knows '
                            'no attention mask; the stock block has none.')
        joined, extra = self.take()
        num_joined = 0 if joined is None else joined.shape[1]
        num_queries = len(query) + (num_joined if self.queries else 0)
        # As many keys as queries are the same tokens, seen before a reduction
        # of the map or without one.
        same = len(key) == len(query)
        x = self._join(query, joined, None if same else key)
        y = self.in_projection(x, num_queries, 0 if same else len(query))
        q, k, v = y.chunk(3, dim=-1)
        q = q[:num_queries]
        if not same:
            k, v = k[len(query):], v[len(query):]
        if extra is not None and extra[0].shape[1]:
            # (B or 1, p, C) -> (p, B, C), in autocast's precision
            keys, values = (
                t.to(k.dtype).expand(k.shape[1], -1, -1).transpose(0, 1)
                for t in extra)
            k, v = torch.cat([keys, k]), torch.cat([values, v])
        out = self._attend(q, k, v)
        if self.queries:
            self.seen = out[len(query):].transpose(0, 1)
        return out[:len(query)], None

    @staticmethod
    def _join(query: Tensor, joined: Optional[Tensor],
              key: Optional[Tensor]) -> Tensor:
        """All tokens, (N, B, C): first those of the stream."""
        if joined is None and key is None:
            return query
        # Batch first, as the tokens are; the layout decides about the bits.
        parts = [query.transpose(0, 1), joined]
        parts.append(None if key is None else key.transpose(0, 1))
        return torch.cat([p for p in parts if p is not None],
                         dim=1).transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, B, C), twice (M, B, C) -> (N, B, C)"""
        length, batch, dims = q.shape

        def heads(t: Tensor) -> Tensor:
            # (N, B, C) -> (B * heads, N, C / heads)
            return t.reshape(len(t), batch * self.num_heads,
                             self.head_dim).transpose(0, 1)

        if MULTIPLIES:
            q = heads(q) * math.sqrt(1 / self.head_dim)
        else:
            q = heads(q) / math.sqrt(self.head_dim)
        weights = torch.bmm(q, heads(k).transpose(1, 2)).softmax(-1)
        if self.training and self.dropout:
            weights = F.dropout(weights, self.dropout)
        out = torch.bmm(weights, heads(v)).transpose(0, 1)
        out = self.out_proj(out.reshape(length * batch, dims))
        return out.view(length, batch, -1)


class PackedSites(SiteMap):
    """Where things are in such blocks; ``qkv`` sees (N, B, C), ``proj``
    (N * B, C)."""

    # Anything there needs the attention that calls its layers.
    attention_sites = TOKEN_SITES + ('qkv', 'proj', 'qkv_input', 'proj_input')
    attention_mixin = PackedAttention

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        attention = block.attn.attn
        qkv = getattr(attention, 'in_projection', None)
        return dict(
            norm1=block.norm1,
            norm2=block.norm2,
            qkv=qkv or InProjection(attention, cls.attention_mixin.parts),
            proj=attention.out_proj)

    @classmethod
    def stream(cls, block: nn.Module) -> None:
        # Drop-path has no parameters, so moving it changes no key.
        block.attn_drop_path = block.attn.dropout_layer
        block.ffn_drop_path = block.ffn.dropout_layer
        block.attn.dropout_layer = nn.Identity()
        block.ffn.dropout_layer = nn.Identity()

    @classmethod
    def unstream(cls, block: nn.Module) -> None:
        block.attn.dropout_layer = block.attn_drop_path
        block.ffn.dropout_layer = block.ffn_drop_path
        del block.attn_drop_path, block.ffn_drop_path

    @classmethod
    def attention(cls, block: nn.Module) -> nn.Module:
        return block.attn.attn

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.attn.embed_dims

    @classmethod
    def drop_path(cls, block: nn.Module) -> float:
        layer = getattr(block, 'ffn_drop_path', block.ffn.dropout_layer)
        return float(getattr(layer, 'drop_prob', 0.))
