"""Keep for backward how a tensor was made, instead of the tensor.

autograd keeps the input of every operation whose gradient needs it. Many of
these inputs are a norm, a copy or a small projection of something else that is
kept anyway. Inside a block :class:`Recipes` is asked for every tensor that
autograd is about to keep; where it knows a recipe, the recipe is kept, and
backward follows it. The graph, its gradients and their order stay autograd's.
"""
import threading
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ['NoRecipes', 'Recipes', 'autocast_of', 'current']

_LOCAL = threading.local()


def current() -> Optional['Recipes']:
    """The recipes of the block that is being run, if it has any."""
    return getattr(_LOCAL, 'recipes', None)


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


def autocast_of(device: str) -> Tuple[bool, torch.dtype]:
    """Whether autocast is on, and its dtype."""
    if hasattr(torch, 'get_autocast_dtype'):
        return (torch.is_autocast_enabled(device),
                torch.get_autocast_dtype(device))
    # torch 2.1
    if device == 'cpu':
        return (torch.is_autocast_cpu_enabled(),
                torch.get_autocast_cpu_dtype())
    return torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()


def _precision(device: str) -> Callable:
    """A context with the autocast of now."""
    enabled, dtype = autocast_of(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)
