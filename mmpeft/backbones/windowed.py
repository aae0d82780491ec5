"""Attention in windows, where extra tokens join every window."""
from typing import Callable

import torch
from torch import Tensor

from .prenorm import JoinedAttention

__all__ = ['JoinedWindows']


class JoinedWindows(JoinedAttention):
    """A stock attention in windows, where extra tokens join every window.

    They have no place in the window, so no relative position and no shift
    mask. A window belongs to one sample (windows are ordered by sample
    first), and sees the tokens of that sample.

    With nothing that joins, this gives the bits of the stock attention, if
    :meth:`project`, :meth:`similarity` and ``place`` do.
    """

    #: What stands in the scores for a relative position, where there is none.
    placeless = 0.

    def project(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C), queries, keys and values."""
        return self.qkv(x)

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores of queries and keys, (..., C / heads), but for the place."""
        return q * self.scale @ k.transpose(-2, -1)

    def attend(self, x: Tensor, place: Callable) -> Tensor:
        """The attention of all windows.

        Args:
            x (Tensor): (B * windows, N, C).
            place (Callable): Adds relative positions and masks to the scores
                (B * windows, heads, N, N) of queries, and gets both.

        Returns:
            Tensor: (B * windows, N, C).
        """
        joined, extra = self.take()

        def heads(t: Tensor) -> Tensor:
            # (B * windows, N, C) -> (B * windows, heads, N, C / heads)
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = map(heads, self.project(x).chunk(3, dim=-1))
        scores = place(self.similarity(q, k), q)
        num_asked = 0
        if joined is not None:

            def spread(t: Tensor) -> Tensor:
                # (B or 1, p, C) -> (B * windows, p, C), in autocast's
                # precision
                return t.to(q.dtype).repeat_interleave(len(x) // len(t), dim=0)

            asked, *new = self.project(joined).chunk(3, dim=-1)
            keys, values = (heads(torch.cat([spread(e), spread(t)], dim=1))
                            for e, t in zip(extra, new))
            scores = torch.cat(
                [self.similarity(q, keys) + self.placeless, scores], dim=-1)
            v = torch.cat([values, v], dim=2)
            if self.queries:
                num_asked = joined.shape[1]
                # The same for all keys, as none has a place relative to them.
                asked = self.similarity(
                    heads(spread(asked)), torch.cat([keys, k], dim=2))
                scores = torch.cat([asked, scores], dim=2)
        weights = self.attn_drop(scores.softmax(-1))
        out = (weights @ v).transpose(1, 2).flatten(2)
        out = self.proj_drop(self.proj(out))
        if self.queries:
            # The mean over the windows of a sample.
            seen = out[:, :num_asked].unflatten(0, (len(joined), -1))
            self.seen = seen.mean(dim=1)
        return out[:, num_asked:]
