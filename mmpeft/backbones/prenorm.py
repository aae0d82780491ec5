"""What pre-norm blocks have in common, whatever their attention."""
from typing import Any, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..following import reach
from ..recipes import current
from ..recompute import added, dropped, recomputed
from ..sites import TOKEN_SITES, TokenLayout

__all__ = ['JoinedAttention', 'PreNormForward']


class PreNormForward:
    """The forward of a stock pre-norm block, with its stream sites called::

        x = x + attn_drop_path(attention(norm1(x)))
        x = x + ffn_drop_path(mlp(norm2(x)))

    Drop-path is called here and not inside the attention and the MLP, so that
    a branch can be seen before it. A family's mixin has the stock signature
    of ``forward`` and says what the block calls these parts.
    """

    norm1: nn.Module
    norm2: nn.Module
    #: The site that the norm before the MLP is.
    second_norm = 'norm2'
    attn_drop_path: nn.Module
    ffn_drop_path: nn.Module

    def run_attention(self, normed: Tensor, *args: Any) -> Tensor:
        """The attention branch before drop-path, of the arguments of
        ``BlockPEFT.call``."""
        raise NotImplementedError

    def run_mlp(self, normed: Tensor) -> Tensor:
        """The MLP branch before drop-path."""
        raise NotImplementedError

    def run_map_mlp(self, normed: Tensor, layout: TokenLayout) -> Tensor:
        """The same of the whole stream, where it matters what is where."""
        return self.run_mlp(normed)

    @property
    def joined_attention(self) -> 'JoinedAttention':
        """Where tokens join; one only if there is a module for them."""
        raise NotImplementedError

    def _forward(self, x: Tensor, tokens: Optional[Tensor],
                 layout: TokenLayout, *args: Any) -> Tuple:
        run = self.peft.run
        shortcut = run('attn_shortcut', x, x, layout)
        normed = self._norm('norm1', x)
        self._expect_qkv_input(x, args)
        joined = None if tokens is None else self.norm1(tokens)
        branch, seen = self._attend(normed, joined, layout, *args)
        branch = run('attn_parallel', normed, branch, layout)
        branch = run('attn_branch', x, branch, layout)
        branch, seen = self._drop(self.attn_drop_path, branch, seen)
        y = added(shortcut, run('attn_add', x, branch, layout))
        x = run('attn_residual', x, y, layout)
        if seen is not None:
            tokens = tokens + seen

        shortcut = run('ffn_shortcut', x, x, layout)
        normed = self._norm(self.second_norm, x)
        self._expect_hidden(x, layout)
        branch = self.run_map_mlp(normed, layout)
        branch = run('ffn_parallel', normed, branch, layout)
        branch = run('ffn_branch', x, branch, layout)
        if seen is not None:
            seen = self.run_mlp(self.norm2(tokens))
        branch, seen = self._drop(self.ffn_drop_path, branch, seen)
        y = added(shortcut, run('ffn_add', x, branch, layout))
        if seen is not None:
            tokens = tokens + seen
        return run('ffn_residual', x, y, layout), tokens

    def _norm(self, site: str, x: Tensor) -> Tensor:
        """A norm with what is attached to it, made again in backward unless
        that draws random numbers."""
        norm = getattr(self, site)
        return norm(x) if self.peft.draws(site) else recomputed(norm, x)

    def _expect_qkv_input(self, x: Tensor, args: Tuple) -> None:
        """Tell how to make what is projected to queries, keys and values,
        which may be a copy of the norm, in windows."""
        recipes = current()
        if recipes is not None and not self.peft.has(
                *TOKEN_SITES) and not self.peft.draws('norm1', 'qkv_input'):
            source = recipes.reference(x)
            recipes.expect(
                'qkv', lambda qkv: reach(
                    qkv, lambda: self.run_attention(
                        self.norm1(source()), *args)))

    def _expect_hidden(self, x: Tensor, layout: TokenLayout) -> None:
        """Tell how to make what the activation of the MLP gets, which takes
        its first GEMM again."""
        recipes = current()
        if recipes is not None and recipes.lean and not self.peft.draws(
                self.second_norm, 'fc1_input', 'fc1'):
            source = recipes.reference(x)
            # What is elementwise can be made of the layer's own output.
            raw = self.peft.has('fc1') and self.peft.only_elementwise('fc1')
            recipes.expect(
                'fc1_raw' if raw else 'fc1', lambda fc1: reach(
                    fc1, lambda: self.run_map_mlp(
                        self.norm2(source()), layout), raw))

    @staticmethod
    def _drop(drop_path: nn.Module, branch: Tensor,
              seen: Optional[Tensor]) -> Tuple:
        """Drop-path, the same draw for the stream and the tokens of a
        sample."""
        if seen is None:
            return dropped(drop_path, branch), None
        both = drop_path(torch.cat([seen, branch], dim=1))
        return both[:, seen.shape[1]:], both[:, :seen.shape[1]]

    def _attend(self, normed: Tensor, joined: Optional[Tensor],
                layout: TokenLayout, *args: Any) -> Tuple:
        """Attention branch, and what the tokens that go on have seen.

        Both come in as the attention gets them.
        """
        peft = self.peft
        if not peft.has(*TOKEN_SITES):
            return self.run_attention(normed, *args), None
        empty = normed.new_zeros(normed.shape[0], 0, normed.shape[-1])
        joined = empty if joined is None else joined
        attention = self.joined_attention
        attention.queries = peft.asks
        attention.joined = peft.run('attn_tokens', normed, joined, layout)
        attention.extra = peft.run('attn_kv', normed, (empty[:1], ) * 2,
                                   layout)
        branch = self.run_attention(normed, *args)
        seen, attention.seen = attention.seen, None
        return branch, None if seen is None else seen[:, :joined.shape[1]]


class JoinedAttention:
    """A stock attention where extra tokens join the others.

    A family's mixin computes in ``forward`` what the stock one does, with the
    tokens of :meth:`take`, and leaves what they have seen in :attr:`seen`.
    """

    # Set by the block before each call: tokens (B, p, C) that are projected
    # like the others; extra keys and values; whether the tokens ask, too; and
    # what they have seen if they do, (B, p, C).
    joined = extra = seen = None
    queries = False

    def take(self) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:
        """What joins in this call, and no longer."""
        joined, extra = self.joined, self.extra
        self.joined = self.extra = None
        return joined, extra

    def prepare(self) -> None:
        """Called when a stock module becomes this one."""

    def forget(self) -> None:
        """Leave nothing in a module that becomes stock again."""
        for name in ('joined', 'extra', 'seen', 'queries'):
            self.__dict__.pop(name, None)
