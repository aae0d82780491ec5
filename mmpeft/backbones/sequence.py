"""Attention over the whole sequence, where extra tokens stand first."""
from typing import Callable, Optional

import torch
from torch import Tensor

from .prenorm import JoinedAttention

__all__ = ['JoinedSequence']


class JoinedSequence(JoinedAttention):
    """A stock attention over all tokens, with extra ones before the others.
    """

    def finish(self, out: Tensor) -> Tensor:
        """What follows the weighted values, (B, N, C) -> (B, N, C)."""
        return self.proj_drop(self.proj(out))

    def attend(self,
               x: Tensor,
               mix: Callable,
               place: Optional[Callable] = None) -> Tensor:
        """The attention of all tokens.

        Args:
            x (Tensor): (B, N, C).
            mix (Callable): Gives the weighted values of queries (B, heads,
                asked + N, C / heads), keys and values (B, heads, joined + N,
                C / heads).
            place (Callable, optional): What the stock attention does to the
                queries and to the keys (B, heads, N, C / heads) of ``x``.

        Returns:
            Tensor: (B, N, C).
        """
        joined, extra = self.take()
        num_joined = joined.shape[1]
        num_asked = num_joined if self.queries else 0

        def heads(t: Tensor) -> Tensor:
            # (B, N, C) -> (B, heads, N, C / heads)
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        qkv = self.qkv(torch.cat([joined, x], dim=1))
        q, k, v = map(heads, qkv.chunk(3, dim=-1))
        if place is not None:
            q, k = (
                torch.cat([t[:, :, :num_joined],
                           place(t[:, :, num_joined:])],
                          dim=2) for t in (q, k))
        # (B or 1, p, C) -> (B, heads, p, C / heads), in autocast's precision
        keys, values = (
            heads(t.to(q.dtype).expand(len(q), -1, -1)) for t in extra)
        out = mix(q[:, :, num_joined - num_asked:], torch.cat([keys, k],
                                                              dim=2),
                  torch.cat([values, v], dim=2))
        out = self.finish(out.transpose(1, 2).flatten(2))
        if self.queries:
            self.seen = out[:, :num_asked]
        return out[:, num_asked:]
