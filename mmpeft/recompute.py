"""Keep for backward how a tensor was made, instead of the tensor.

autograd keeps the input of every operation whose gradient needs it. Many of
these inputs are a norm, a copy or a small projection of something else that is
kept anyway. Inside a block :class:`Recipes` is asked for every tensor that
autograd is about to keep; where it knows a recipe, the recipe is kept, and
backward follows it. The graph, its gradients and their order stay autograd's.
"""
import sys
import threading
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, ContextManager, Dict, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = [
    'MEMORY', 'Recipes', 'added', 'current', 'dropped', 'follow', 'pass_on',
    'reach', 'recipes_for', 'recomputed', 'recomputed_if_lean',
    'recomputed_sum', 'see_raw', 'unfollow'
]

#: What ``PEFTBackbone(memory=...)`` may be.
MEMORY = ('stock', 'fast', 'lean')

_LOCAL = threading.local()


def current() -> Optional['Recipes']:
    """The recipes of the block that is being run, if it has any."""
    return getattr(_LOCAL, 'recipes', None)


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


def recomputed_sum(x: Tensor, function: Callable, h: Tensor, *args:
                   Any) -> Tensor:
    """``x + function(h, *args)``, where ``function`` is a small GEMM; if lean,
    the norm that follows need not keep it."""
    y = x + function(h, *args)
    recipes = current()
    if recipes is not None and recipes.lean:
        first, second = recipes.reference(x), recipes.reference(h)
        recipes.add(y, lambda: first() + function(second(), *args))
    return y


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
    if memory == 'stock' or not torch.is_grad_enabled() or _is_compiling():
        return nullcontext()
    if checkpointed or _has_hooks():
        return NoRecipes()
    return Recipes(x, lean=memory == 'lean')


def _is_compiling() -> bool:
    if hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    # torch 2.1; what was never imported traces nothing.
    dynamo = sys.modules.get('torch._dynamo')
    return dynamo is not None and dynamo.is_compiling()


def _has_hooks() -> bool:
    # torch 2.1 cannot tell; there blocks see to it that they do not nest.
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    return top is not None and top(True) is not None


class Recipe:
    """How to make one tensor again.

    While somebody else will ask for it, it is kept.

    Args:
        make (Callable): Gives the tensor.
        precision (Callable): Context in which it was made.
    """

    def __init__(self, make: Callable[[], Tensor],
                 precision: Callable) -> None:
        self.make = make
        self.precision = precision
        # How many places backward will ask from, and how many it still will.
        self.places = 0
        self.left = 0
        self.value: Optional[Tensor] = None

    def get(self) -> Tensor:
        """The tensor, for another recipe."""
        value = self.value
        if value is None:
            # In the same way as before, to the last bit.
            with torch.no_grad(), self.precision(), NoRecipes():
                value = self.make().detach()
            self.value = value if self.left else None
        return value

    def take(self) -> Tensor:
        """The tensor, for one of the places."""
        self.left = (self.left or self.places) - 1
        value = self.get()
        if self.left == 0:
            self.value = None
        return value


class Recipes:
    """What is known about the tensors of one forward of a block.

    Args:
        x (Tensor): What enters the block.
        lean (bool): Whether a GEMM of the base may be computed again.
    """

    def __init__(self, x: Tensor, lean: bool) -> None:
        self.lean = lean
        self.precision = _precision(x.device.type)
        # By address: the tensor, its version, its recipe. It is held so that
        # the address stays its own.
        self._known: Dict[int, Tuple[Tensor, int, Recipe]] = {}
        self._expected: Dict[str, Callable] = {}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        recipe, version = getattr(x, '_peft_recipe', (None, None))
        if recipe is not None and version == x._version:
            self._known[_address(x)] = (x, version, recipe)

    def __enter__(self) -> 'Recipes':
        self._outer, _LOCAL.recipes = current(), self
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        _LOCAL.recipes = self._outer
        self._known.clear()
        self._expected.clear()

    def add(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """Say how a tensor is made."""
        self._known[_address(tensor)] = (tensor, tensor._version,
                                         Recipe(make, self.precision))

    def expect(self, role: str, make: Callable[[nn.Module], Tensor]) -> None:
        """Say how to make a tensor that :meth:`meet` will see."""
        self._expected[role] = make

    def meet(self, role: str, module: nn.Module, tensor: Tensor) -> None:
        """See the tensor that goes into, or comes from, a module."""
        make = self._expected.pop(role, None)
        if make is not None:
            self.add(tensor, partial(make, module))

    def reference(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Something that gives the tensor in backward: its recipe, or the
        tensor itself if it has none."""
        known = self._find(tensor)
        if self.knows(tensor):
            return known[2].get
        tensor = tensor.detach()
        return lambda: tensor

    def knows(self, tensor: Tensor) -> bool:
        """Whether there is a recipe for a tensor."""
        known = self._find(tensor)
        return known is not None and known[0] is tensor

    def pass_on(self, tensor: Tensor) -> None:
        """Tell the next block how its input was made."""
        known = self._find(tensor)
        if self.knows(tensor):
            tensor._peft_recipe = (known[2], tensor._version)

    def _find(self, tensor: Tensor) -> Optional[Tuple]:
        known = self._known.get(_address(tensor))
        # What was changed in place since is no longer what the recipe makes.
        return known if known and known[1] == tensor._version else None

    def _pack(self, tensor: Tensor) -> Any:
        known = self._find(tensor)
        if known is None or known[0].dtype != tensor.dtype:
            # Detached: an output that its own node keeps would be a cycle.
            return tensor.detach()
        whole, _, recipe = known
        recipe.places += 1
        recipe.left = recipe.places
        offset = tensor.storage_offset() - whole.storage_offset()
        return recipe, tensor.size(), tensor.stride(), offset


class NoRecipes(Recipes):
    """For a forward that computes in the same way, but keeps everything."""

    def __init__(self) -> None:
        self.lean = False
        self._known, self._expected = {}, {}

    def __enter__(self) -> 'Recipes':
        self._outer, _LOCAL.recipes = current(), self
        return self

    def __exit__(self, *error: Any) -> None:
        _LOCAL.recipes = self._outer

    def add(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """Nothing is written down."""

    def expect(self, role: str, make: Callable[[nn.Module], Tensor]) -> None:
        """Nothing is expected."""


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, size, stride, offset = packed
    value = recipe.take()
    return value.as_strided(size, stride, value.storage_offset() + offset)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _precision(device: str) -> Callable:
    """A context with the autocast of now."""
    if hasattr(torch, 'get_autocast_dtype'):
        enabled = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device)
    elif device == 'cpu':
        enabled = torch.is_autocast_cpu_enabled()
        dtype = torch.get_autocast_cpu_dtype()
    else:
        enabled = torch.is_autocast_enabled()
        dtype = torch.get_autocast_gpu_dtype()
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


class _Reached(Exception):
    """Ends a forward where :func:`reach` wanted to get."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def reach(module: nn.Module, run: Callable[[], Any], raw=False) -> Tensor:
    """Run until a followed module has what it is followed for.

    Args:
        module (nn.Module): Given to :func:`follow` before.
        run (Callable): Calls it.
        raw (bool): Whether that is its output before anything attached to it.
            Defaults to False.

    Returns:
        Tensor: Its input or output.
    """
    module._peft_wanted = 'raw' if raw else 'last'
    try:
        run()
    except _Reached as reached:
        return reached.tensor
    finally:
        module._peft_wanted = None
    raise RuntimeError(f'{type(module).__name__} was not called again.')


def follow(module: nn.Module, role: str, output: bool) -> None:
    """Let the recipes of a block see what goes into a module, or comes out.

    Args:
        module (nn.Module): Part of the block; already with all other hooks.
        role (str): What it is called in :meth:`Recipes.expect`.
        output (bool): Whether its output is to be seen, and not its input.
    """
    module._peft_role = role
    module._peft_wanted = None
    module._peft_follow = module.register_forward_hook(
        _see_output) if output else module.register_forward_pre_hook(
            _see_input)


def unfollow(module: nn.Module) -> None:
    """Undo :func:`follow`."""
    if '_peft_follow' in module.__dict__:
        module._peft_follow.remove()
        del module._peft_role, module._peft_wanted, module._peft_follow


def see_raw(module: nn.Module, output: Tensor) -> None:
    """For what calls the modules attached to another: show what comes out of
    that one before."""
    if getattr(module, '_peft_wanted', None) == 'raw':
        raise _Reached(output)
    recipes = current()
    if recipes is not None and '_peft_role' in module.__dict__:
        recipes.meet(module._peft_role + '_raw', module, output)


def _see(module: nn.Module, tensor: Tensor) -> None:
    if module._peft_wanted == 'last':
        raise _Reached(tensor)
    recipes = current()
    if recipes is not None:
        recipes.meet(module._peft_role, module, tensor)


def _see_input(module: nn.Module, args: tuple) -> None:
    _see(module, args[0])


def _see_output(module: nn.Module, args: tuple, output: Tensor) -> None:
    _see(module, output)
