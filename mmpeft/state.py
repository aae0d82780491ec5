"""What a backbone with methods attached remembers, and what guards it."""
import types
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .backbones.attached import BlockPEFT
from .errors import PEFTError
from .key_styles import hint
from .methods.base import PEFTModule
from .stream import Stream, begin, end

__all__ = ['PEFTState', 'guard', 'attached_modules', 'load_whole']


class PEFTState(nn.Module):
    """``backbone.peft``: how it was made, and what belongs to no block.

    Its children are the side networks and what the modules of a method share,
    by the name of the method.

    Args:
        plans (list[dict]): The method configs, as given.
        skipped (list[str]): Blocks left out because no output reaches them.
        allow_random_base (bool): Do not ask whether weights were loaded.
        eval_frozen (bool): Keep frozen stock modules in evaluation mode.
        gridless (dict[str, list[str]]): By the name of a method that needs
            the grid, blocks left out because no output depends on theirs.
        stream (Stream, optional): What travels beside the tokens.
        memory (str): What blocks keep for backward.
    """

    def __init__(self,
                 plans: Sequence[dict],
                 skipped: Sequence[str] = (),
                 allow_random_base: bool = False,
                 eval_frozen: bool = False,
                 gridless: Optional[Dict[str, List[str]]] = None,
                 stream: Optional[Stream] = None,
                 memory: str = 'stock') -> None:
        super().__init__()
        self.memory = memory
        self.plans = list(plans)
        self.skipped = list(skipped)
        self.gridless = dict(gridless or {})
        self.eval_frozen = eval_frozen
        self.base_checked = allow_random_base
        self.stream = stream
        self.loaded: Set[str] = set()
        # Names in checkpoints that are none of this backbone's.
        self.strangers: List[str] = []
        # Attached modules whose start is yet to be taken from their layer.
        self.unsettled: Set[str] = set()
        self._handles: list = []

    def release(self, backbone: nn.Module) -> None:
        """Undo :func:`guard`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in ('init_weights', 'train'):
            backbone.__dict__.pop(name, None)


def load_whole(model: nn.Module, state: Dict[str, Tensor]) -> None:
    """Load a state dict that holds every tensor of a model.

    A strict load would miss what the stock model itself takes out while it
    loads, as the positions of mmpretrain's Swin V2, which it makes anew.

    Raises:
        RuntimeError: If a tensor is missing, left over, or of another shape.
    """
    found = model.load_state_dict(state, strict=False)
    missing = [k for k in found.missing_keys if k not in state]
    if missing or found.unexpected_keys:
        raise RuntimeError(
            f'{type(model).__name__}: missing keys {missing}, unexpected keys '
            f'{found.unexpected_keys}.')


def attached_modules(module: nn.Module) -> List[PEFTModule]:
    """All attached modules below ``module``."""
    return [m for m in module.modules() if isinstance(m, PEFTModule)]


def layer_modules(backbone: nn.Module) -> Iterator[Tuple[str, PEFTModule]]:
    """Attached modules that start from the weight of their stock layer."""
    for name, module in backbone.named_modules():
        if isinstance(module, PEFTModule) and module.needs_layer:
            yield name, module


def settle(backbone: nn.Module) -> None:
    """Start those modules whose base weights arrived without their own."""
    state = backbone.peft
    for name in sorted(state.unsettled):
        module = backbone.get_submodule(name)
        # Parameters can be counted on the meta device, which has no values.
        if not module.layer.weight.is_meta:
            with torch.no_grad():
                module.start_from_layer()
    state.unsettled.clear()


def guard(backbone: nn.Module, fresh: bool = True) -> None:
    """Protect frozen weights and fresh adapters from the stock machinery.

    The class of the backbone must stay the stock one (mmpretrain migrates old
    keys only ``if self.__class__ is SwinTransformer``), so two methods are
    bound to the instance. Bound methods follow a deep copy.

    Args:
        backbone (nn.Module): With everything attached.
        fresh (bool): Whether that was just made, and is to be started.
    """
    state = backbone.peft
    if hasattr(type(backbone), 'init_weights'):
        backbone.init_weights = types.MethodType(init_weights, backbone)
    backbone.train = types.MethodType(train, backbone)
    state._handles += [
        backbone._register_load_state_dict_pre_hook(
            note_loaded, with_module=True),
        backbone.register_forward_pre_hook(refuse_random_base),
        backbone.register_forward_pre_hook(settle_first),
        backbone.register_state_dict_pre_hook(settle_first),
    ]
    if state.stream is not None:
        state._handles += [
            backbone.register_forward_pre_hook(begin),
            backbone.register_forward_hook(end, always_call=True),
        ]
    if fresh:
        state.unsettled = {name for name, _ in layer_modules(backbone)}
        settle(backbone)
    backbone.train(backbone.training)


def init_weights(self: nn.Module) -> None:
    """The stock ``init_weights``, then the methods' own initialisation.

    Stock code initialises by layer type and would overwrite the attached
    modules: mmdet's Swin sets every Linear below it to a normal.

    Raises:
        PEFTError: If the pre-trained weights are of another architecture.
    """
    again = getattr(self, '_is_init', False)
    try:
        type(self).init_weights(self)
    except AssertionError as error:
        # mmengine's answer to an init_cfg whose prefix no key has.
        if 'is not in the pretrained model' not in str(error):
            raise
        raise PEFTError(
            f'No key in the pre-trained weights of init_cfg begins with '
            f'{str(error).split(" ")[0]!r}; look at the keys of the file and '
            'give the prefix they have, or none.') from error
    except RuntimeError as error:
        line = next(
            (t for t in str(error).splitlines() if 'size mismatch' in t), None)
        if line is None:
            raise
        raise PEFTError(
            'The pre-trained weights in init_cfg are of another architecture '
            f'than this {type(self).__name__} ({line.strip(" .")}); give '
            'weights that fit, or their widths and depths.') from error
    if not again:
        for module in [*self.peft.children(), *attached_modules(self)]:
            module.reset_parameters()
        self.peft.unsettled = {name for name, _ in layer_modules(self)}
    settle(self)


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """The stock ``train``, with what is frozen kept as it was.

    Statistics of BatchNorm belong to the frozen base unless that BatchNorm
    trains. Unlike the stock Swin's, it returns the module.
    """
    type(self).train(self, mode)
    if mode:
        state = self.peft
        for module in _stock_modules(self):
            trains = any(
                p.requires_grad for p in module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and not trains:
                module.training = False
            elif state.eval_frozen and module is not self and not trains:
                module.training = False
    return self


def _stock_modules(backbone: nn.Module):
    """Modules of the backbone without those attached to it."""
    attached = [backbone.peft] + [
        m for m in backbone.modules() if isinstance(m, BlockPEFT)
    ]
    skipped = {id(m) for a in attached for m in a.modules()}
    return (m for m in backbone.modules() if id(m) not in skipped)


def note_loaded(module: nn.Module, state_dict: dict, prefix: str,
                *args) -> None:
    """Load hook: remember which frozen weights a checkpoint brings, and which
    modules have to start from them."""
    for name, parameter in module.named_parameters():
        value = state_dict.get(prefix + name)
        if value is not None and value.shape == parameter.shape:
            module.peft.loaded.add(name)
    own = {prefix + name for name in module.state_dict(keep_vars=True)}
    module.peft.strangers = [
        k[len(prefix):] for k in state_dict
        if k.startswith(prefix) and k not in own
    ]
    names = {id(p): name for name, p in module.named_parameters()}
    for name, attached in layer_modules(module):
        if any(k.startswith(f'{prefix}{name}.') for k in state_dict):
            module.peft.unsettled.discard(name)
        elif prefix + names[id(attached.stock_layer.weight)] in state_dict:
            module.peft.unsettled.add(name)


def settle_first(module: nn.Module, *args) -> None:
    """Forward and state-dict hook: nothing reads a module that is not
    started."""
    settle(module)


def refuse_random_base(module: nn.Module, args: tuple) -> None:
    """Forward hook: adapters on a frozen random backbone learn nothing.

    Weights arrive after the model is built, so the first training forward is
    the earliest moment to know. Vectors (biases, norms) are not asked for: an
    ImageNet checkpoint has no output norms, and those start as identities.
    What trains may start anywhere, but not where a checkpoint was given of
    which next to nothing fits.

    Raises:
        PEFTError: If a frozen weight matrix was never loaded, or if the names
            in a checkpoint are not those of the backbone.
    """
    state = module.peft
    if state.base_checked or not module.training:
        return
    matrices = {
        n: p.requires_grad
        for n, p in module.named_parameters()
        if p.ndim > 1 and '.peft.' not in f'.{n}'
    }
    frozen = [n for n, trains in matrices.items() if not trains]
    # Zeros are not random: the position tables of mmseg's MAE, which its
    # checkpoints do not have, add nothing.
    missing = [
        n for n in frozen
        if n not in state.loaded and module.get_parameter(n).any()
    ]
    foreign = state.strangers and 2 * len(state.loaded
                                          & set(matrices)) < len(matrices)
    if foreign and not missing:
        missing = [n for n in matrices if n not in state.loaded]
        raise PEFTError(
            f'{len(missing)} of {len(matrices)} weights of '
            f'{type(module).__name__} are not in the checkpoint (such as '
            f'{missing[0]!r}). ' + hint(state.strangers, module.state_dict()))
    if missing:
        way_out = (
            'give the backbone an init_cfg=dict(type="Pretrained", '
            'checkpoint=...) or the config a load_from of the same '
            'architecture, or set allow_random_base=True if this is meant.')
        if state.strangers:
            way_out += ' ' + hint(state.strangers, module.state_dict())
        raise PEFTError(
            f'{len(missing)} of {len(frozen)} frozen weights of '
            f'{type(module).__name__} were never loaded (such as '
            f'{missing[0]!r}), and adapters on random weights learn nothing: '
            f'{way_out}')
    state.base_checked = True
