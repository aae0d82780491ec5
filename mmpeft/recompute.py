"""What blocks and methods say of tensors that are cheap to make again."""
import sys
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Optional

import torch
import torch.nn as nn
from torch import Tensor

from .recipes import NoRecipes, Recipes, current

__all__ = [
    'MEMORY', 'added', 'dropped', 'is_compiling', 'pass_on', 'recipes_for',
    'recomputed', 'recomputed_if_lean'
]

#: What ``PEFTBackbone(memory=...)`` may be.
MEMORY = ('stock', 'fast', 'lean')


def recomputed(function: Callable,
               x: Tensor,
               *args: Any,
               known: Optional[Tensor] = None) -> Tensor:
    """``function(x, *args)``, which is cheap and draws no random numbers; its
    result is made again from ``x`` where backward needs it.

    Args:
        function (Callable): Gives the tensor.
        x (Tensor): What it is made of.
        *args: For ``function``; kept as they are.
        known (Tensor, optional): The result, if it is there already.
    """
    y = function(x, *args) if known is None else known
    recipes = current()
    if recipes is not None:
        source = recipes.reference(x)
        recipes.add(y, lambda: function(source(), *args))
    return y


def recomputed_if_lean(function: Callable, x: Tensor, *args: Any) -> Tensor:
    """The same for what takes a small GEMM."""
    recipes = current()
    if recipes is not None and recipes.lean:
        return recomputed(function, x, *args)
    return function(x, *args)


def added(x: Tensor, branch: Tensor) -> Tensor:
    """``x + branch``; if lean, and if the branch is made again anyway, the
    norm that follows need not keep the sum."""
    y = x + branch
    recipes = current()
    if recipes is not None and recipes.lean and recipes.knows(branch):
        first, second = recipes.reference(x), recipes.reference(branch)
        recipes.add(y, lambda: first() + second())
    return y


def dropped(drop_path: nn.Module, branch: Tensor) -> Tensor:
    """``drop_path(branch)`` of a (B, N, C), with the same draw; made again if
    lean, and if the branch is."""
    recipes = current()
    if recipes is None or not recipes.lean or not recipes.knows(branch):
        return drop_path(branch)
    factor = drop_path(branch.new_ones(len(branch), 1, 1))
    return recomputed(torch.mul, branch, factor)


def pass_on(tensor: Tensor) -> None:
    """Tell the next block how its input was made."""
    recipes = current()
    if recipes is not None:
        recipes.pass_on(tensor)


def recipes_for(memory: str, x: Tensor, checkpointed: bool) -> ContextManager:
    """A context for the forward of a block.

    Inside other hooks for what autograd keeps there are no recipes: those of
    checkpointing, or of a user, would see nothing any more. Without
    gradients, and while ``torch.compile`` traces (which decides itself what
    to keep), everything is as in stock code.

    Args:
        memory (str): One of ``MEMORY``.
        x (Tensor): What enters the block.
        checkpointed (bool): Whether the block is.
    """
    if memory == 'stock' or not torch.is_grad_enabled() or is_compiling():
        return nullcontext()
    if checkpointed or _has_hooks():
        return NoRecipes()
    return Recipes(x, lean=memory == 'lean')


def is_compiling() -> bool:
    """Whether ``torch.compile`` traces."""
    if hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    # torch 2.1; what was never imported traces nothing.
    dynamo = sys.modules.get('torch._dynamo')
    return dynamo is not None and dynamo.is_compiling()


def _has_hooks() -> bool:
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    if top is not None:
        return top(True) is not None
    # torch 2.1 cannot tell, but what a hook has packed takes no other.
    square = torch.ones(1, requires_grad=True)**2
    try:
        square.grad_fn._raw_saved_self.register_hooks(torch.clone, torch.clone)
    except RuntimeError:
        return True
    return False
