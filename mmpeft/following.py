"""See what goes through a stock module, and get there again."""
from typing import Any, Callable

import torch.nn as nn
from torch import Tensor

from .recipes import current
from .recompute import recomputed

__all__ = ['follow', 'follow_activations', 'reach', 'see_raw', 'unfollow']

#: Elementwise, and without random numbers.
ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ReLU)


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


def follow_activations(block: nn.Module) -> None:
    """Let the recipes of a block know what comes out of its activations.

    The layer behind one keeps it where anything there trains, and the
    activation itself has kept what it is made of.
    """
    for name, module in block.named_modules():
        own = not name.startswith('peft.') and not hasattr(
            module, '_peft_follow')
        if own and isinstance(
                module, ACTIVATIONS) and not getattr(module, 'inplace', False):
            module._peft_follow = module.register_forward_hook(_make_again)


def unfollow(module: nn.Module) -> None:
    """Undo :func:`follow`."""
    if '_peft_follow' in module.__dict__:
        module._peft_follow.remove()
        del module._peft_follow
        for name in ('_peft_role', '_peft_wanted'):
            module.__dict__.pop(name, None)


def see_raw(module: nn.Module, output: Tensor) -> None:
    """For what calls the modules attached to another: show what comes out of
    that one before."""
    if getattr(module, '_peft_wanted', None) == 'raw':
        raise _Reached(output)
    recipes = current()
    if recipes is not None and '_peft_role' in module.__dict__:
        recipes.meet(module._peft_role + '_raw', module, output)


def _make_again(module: nn.Module, args: tuple, output: Tensor) -> None:
    recomputed(module.forward, args[0], known=output)


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
