"""What stands under ``.peft`` of a stock module, and how it is called."""
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from ..following import see_raw
from ..recipes import current
from ..recompute import pass_on, recipes_for, recomputed
from ..sites import INPUT_SITES, TokenLayout

__all__ = ['BlockPEFT', 'connect', 'disconnect', 'peft_class']


class BlockPEFT(nn.ModuleDict):
    """``block.peft``: the attached modules, ``{name: {site: module}}``."""

    # What its forward keeps for backward, one of ``mmpeft.recompute.MEMORY``.
    memory = 'stock'

    # What travels beside the tokens (mmpeft.stream.Stream); None if nothing
    # does.
    stream = None
    # The block as side networks see it.
    place = None
    # Where the arrangement of the tokens is written down, in families whose
    # blocks are not told.
    grid = None
    # How the tokens of the stream are arranged, as of the last forward.
    layout: Optional[TokenLayout] = None
    # Branch sites that side networks read, and what they found there.
    taps: Tuple[str, ...] = ()
    tapped: Optional[Dict[str, Tensor]] = None

    def has(self, *sites: str) -> bool:
        """Whether anything is attached at one of the sites."""
        return any(s in modules for modules in self.values() for s in sites)

    def draws(self, *sites: str) -> bool:
        """Whether anything attached at one of the sites draws random numbers,
        in a dropout or a drop-path."""
        return any(
            m.training and _rate(m) > 0 for modules in self.values()
            for s in sites if s in modules for m in modules[s].modules())

    def only_elementwise(self, site: str) -> bool:
        """Whether all that is attached at a site is elementwise."""
        return all(modules[site].elementwise for modules in self.values()
                   if site in modules)

    @property
    def carries(self) -> bool:
        """Whether its tokens go on to the next block."""
        return any(modules['tokens'].carries for modules in self.values()
                   if 'tokens' in modules)

    @property
    def asks(self) -> bool:
        """Whether its tokens see the others, and go through the MLP."""
        return self.carries or any(modules['tokens'].asks
                                   for modules in self.values()
                                   if 'tokens' in modules)

    def run(self,
            site: str,
            x: Tensor,
            y: Any,
            layout: Optional[TokenLayout] = None,
            done: Optional[nn.Module] = None) -> Any:
        """Pass ``y`` through the modules at a site, in order of attachment,
        except through one that is part of it already."""
        for modules in self.values():
            if site in modules and modules[site] is not done:
                y = modules[site](x, y, layout)
        if self.tapped is not None and site in self.taps:
            self.tapped[site] = y.detach()
        return y

    def leader(self, site: str, x: Tensor,
               layer: nn.Module) -> Optional[nn.Module]:
        """The first module at a linear layer or norm, if it stands for both.

        Evaluation, and ``memory='stock'``, are the plain formula.
        """
        if self.memory == 'stock' or not self.training:
            return None
        for modules in self.values():
            if site in modules:
                first = modules[site]
                leads = first.leads and first.takes_over(x, layer)
                return first if leads else None
        return None

    def call(self, forward: Callable, x: Tensor, layout: TokenLayout,
             with_cp: bool, *args: Any) -> Tensor:
        """Run the forward of the block, with what travels beside it.

        Args:
            forward (Callable): ``(x, tokens, layout, *args) -> (x, tokens)``.
            x (Tensor): (B, N, C).
            layout (TokenLayout): How its tokens are arranged.
            with_cp (bool): Whether to checkpoint. Stock checkpoints only
                where the input requires a gradient, as the reentrant kind
                needs that; behind a frozen stem it never does in the first
                block, whose modules need gradients all the same.
            *args: For ``forward``.
        """
        tokens, self.layout = None, layout
        if self.stream is not None:
            x = self.stream.arrive(self, x, layout)
            tokens = self.stream.join(self, x, layout)
            self.tapped = {} if self.taps else None
        with_cp = with_cp and torch.is_grad_enabled()
        block = getattr(forward, '__self__', self)
        memory = self.memory if self._is_reached(x, block) else 'stock'

        def run(x: Tensor, *others: Any) -> Tuple:
            with recipes_for(memory, x, with_cp):
                y, tokens = forward(x, *others)
                pass_on(y)
            return y, tokens

        if with_cp:
            y, tokens = checkpoint(
                run, x, tokens, layout, *args, use_reentrant=False)
        else:
            y, tokens = run(x, tokens, layout, *args)
        if self.stream is not None:
            # Taken away, so that recomputing in backward records nothing.
            taps, self.tapped = self.tapped, None
            y = self.stream.leave(self, x, y, tokens, taps, layout)
        return y

    def _is_reached(self, x: Tensor, block: nn.Module) -> bool:
        """Whether a gradient of training comes back to the block.

        Elsewhere there is nothing to keep, and gradients in evaluation are of
        what evaluation computes.
        """
        if not self.training or not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(p.requires_grad
                                      for p in block.parameters())


def _rate(module: nn.Module) -> float:
    """How often a module leaves something out."""
    if isinstance(module, _DropoutNd):
        return module.p
    # That of drop-path, in all libraries.
    return getattr(module, 'drop_prob', None) or 0.


class Led:
    """The forward of a linear layer or norm whose first module may stand for
    it."""

    def forward(self, x: Tensor) -> Tensor:
        peft, site = self._peft_site
        leader = peft.leader(site, x, self)
        if leader is None:
            return super().forward(x)
        # Called, so that hooks on it run.
        return leader(x, None, None, layer=self)


def input_hook(module: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of a linear layer whose input is a site."""
    peft, site = module._peft_site
    x = args[0]
    if module._peft_channels_first:
        x = x.movedim(1, -1)
    x = peft.run(f'{site}_input', x, x)
    if module._peft_channels_first:
        x = x.movedim(-1, 1)
    return (x, *args[1:])


def output_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a stock submodule that is a site.

    It reads its target from the module and closes over nothing, so that a
    deep copy (EMA) runs the copy's adapters.
    """
    peft, site = module._peft_site
    if module._peft_channels_first:
        # (B, C, H, W) -> (B, H, W, C) and back: sites have channels last.
        x, y = args[0].movedim(1, -1), output.movedim(1, -1)
        return peft.run(site, x, y).movedim(-1, 1)
    see_raw(module, output)
    done = None
    if isinstance(module, Led):
        done = peft.leader(site, args[0], module)
    if current() is None or not peft.only_elementwise(site):
        return peft.run(site, args[0], output, done=done)
    if isinstance(module, nn.LayerNorm):
        output = recomputed(module.forward, args[0], known=output)
    return recomputed(lambda y: peft.run(site, None, y, done=done), output)


def connect(module: nn.Module,
            peft: BlockPEFT,
            site: str,
            channels_first: bool = False) -> None:
    """Make a stock submodule call the modules attached at its sites.

    Args:
        module (nn.Module): The stock submodule.
        peft (BlockPEFT): What is attached.
        site (str): Name of the submodule's site, or of that of its input.
        channels_first (bool): Whether it returns a map (B, C, H, W), as a
            convolution always does. Defaults to False.
    """
    is_input = site in INPUT_SITES
    if is_input:
        site = site[:-len('_input')]
    if not hasattr(module, '_peft_site'):
        # A tuple, so that the reference is not registered as a child.
        module._peft_site = (peft, site)
        module._peft_handles = {}
        module._peft_channels_first = channels_first or isinstance(
            module, nn.Conv2d)
    if type(module) in (nn.Linear, nn.LayerNorm) and not is_input and any(
            site in modules and modules[site].leads
            for modules in peft.values()):
        module.__class__ = peft_class(Led, type(module))
    if is_input not in module._peft_handles:
        module._peft_handles[is_input] = (
            module.register_forward_pre_hook(input_hook)
            if is_input else module.register_forward_hook(output_hook))


def disconnect(module: nn.Module) -> None:
    """Undo :func:`connect`."""
    if hasattr(module, '_peft_site'):
        for handle in module._peft_handles.values():
            handle.remove()
        if isinstance(module, Led):
            module.__class__ = type(module).stock_class
        del module._peft_site, module._peft_handles
        del module._peft_channels_first


_CLASSES: Dict[Tuple[type, type], type] = {}


def peft_class(mixin: type, stock: type) -> type:
    """``class PEFTX(mixin, X)``, made once per stock class."""
    key = (mixin, stock)
    if key not in _CLASSES:
        _CLASSES[key] = type(f'PEFT{stock.__name__}', (mixin, stock),
                             dict(stock_class=stock, __module__=__name__))
    return _CLASSES[key]
