"""Fold attached modules into stock weights: exact, or refused."""
from collections import OrderedDict
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from torch import Tensor

from .backbones.base import Block, Part, find_family
from .errors import MergeError
from .injection import eject
from .methods.base import PEFTModule
from .methods.side import SideNetwork
from .sites import INPUT_SITES
from .state import PEFTState, load_whole

__all__ = ['merge', 'merged_state_dict']


def merged_state_dict(model: nn.Module) -> 'OrderedDict[str, Tensor]':
    """State dict of the stock model that computes the same.

    Has exactly the keys of the stock model, buffers included, and the model
    is not changed. Products are computed in float64 and rounded once.

    Args:
        model (nn.Module): A model or backbone with methods attached.

    Raises:
        MergeError: If a method cannot be folded exactly, or weights are not
            finite.
    """
    reasons, folds = [], []
    for host, places in _places(model).items():
        for place in places:
            for layer, modules in _layers(place, reasons):
                folds.append(
                    ('.'.join(p for p in (host, layer) if p), modules))
        networks = model.get_submodule(host).peft.children()
        for network in networks:
            if isinstance(network, SideNetwork):
                reasons.append(_no_place(network))
    reasons = list(dict.fromkeys(reasons))
    if reasons:
        raise MergeError('This model cannot be merged exactly: ' +
                         '; '.join(reasons) + '. Keep the checkpoint as it '
                         'is; tools/test.py reads it.')
    merged = OrderedDict((k, v) for k, v in model.state_dict().items()
                         if '.peft.' not in f'.{k}')
    _check_finite(model, merged)
    for path, modules in folds:
        _fold(merged, path, model.get_submodule(path), modules)
    return merged


def _check_finite(model: nn.Module, state: Dict[str, Tensor]) -> None:
    """Stock tensors; buffers may hold infinities, as masks of attention."""
    parameters = {n for n, _ in model.named_parameters()}
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all() and (
                name in parameters or value.isnan().any()):
            raise MergeError(f'{name} has values that are not finite; the run '
                             'diverged, take an earlier checkpoint.')


def merge(model: nn.Module) -> nn.Module:
    """Merge in place and take everything off; the model is stock again.

    Returns:
        nn.Module: The same model.

    Raises:
        MergeError: As :func:`merged_state_dict`; then nothing has changed.
    """
    merged = merged_state_dict(model)
    for host in _places(model):
        eject(model.get_submodule(host))
    load_whole(model, merged)
    return model


def _places(model: nn.Module) -> Dict[str, list]:
    """Blocks and parts of each PEFT backbone, by its path."""
    places: Dict[str, list] = {}
    for host, block in find_family(model) or ():
        if isinstance(getattr(block.backbone, 'peft', None), PEFTState):
            if host not in places:
                places[host] = block.family.parts(block.backbone)
            places[host].append(block)
    return places


def _layers(place: Union[Block, Part],
            reasons: List[str]) -> List[Tuple[str, List[PEFTModule]]]:
    """Stock layers at a place with what is folded into them, in order: what
    changes the output first, then what changes the input, from the layer
    outwards."""
    before: Dict[str, List[PEFTModule]] = {}
    after: Dict[str, List[PEFTModule]] = {}
    for modules in getattr(place.module, 'peft', {}).values():
        for site, module in modules.items():
            path = _path_of(place, site)
            if module.no_merge is not None:
                reasons.append(_no_place(module))
            elif path is None:
                reasons.append(f'{type(module).__name__} sits at {site}, '
                               'which is no stock layer')
            else:
                side = before if site in INPUT_SITES else after
                side.setdefault(path, []).append(module)
    return [(path, after.get(path, []) + before.get(path, [])[::-1])
            for path in dict.fromkeys([*after, *before])]


def _no_place(module: nn.Module) -> str:
    return (f'{type(module).__name__} has no place in a stock layer, as '
            f'{module.no_merge}')


def _path_of(place: Union[Block, Part], site: str) -> Optional[str]:
    """Path of the stock layer at a site, inside the backbone."""
    layer = place.layer(site)
    for name, module in place.module.named_modules():
        if module is layer:
            return '.'.join(p for p in (place.path, name) if p)
    return None


def _fold(state: Dict[str, Tensor], path: str, layer: nn.Module,
          modules: List[PEFTModule]) -> None:
    key, names = _weight_name(path, layer), _bias_names(path, layer)
    # In messages: the layer, or the weight where there is no layer.
    path = key[:-len('.weight')] if key.endswith('.weight') else key
    for module in modules:
        for name, parameter in _own_weights(module):
            if not torch.isfinite(parameter).all():
                raise MergeError(
                    f'{path}: {name} of {type(module).__name__} has values '
                    'that are not finite; the run diverged, take an earlier '
                    'checkpoint.')
    weight = state[key]
    bias = _join(state, names, len(weight))
    # A convolution as the matrix that it is at each place.
    matrix = weight.flatten(1) if weight.ndim > 1 else weight
    new_weight, new_bias = matrix.double(), bias
    with torch.no_grad():
        for module in modules:
            new_weight, new_bias = module.merge(new_weight, new_bias)
    state[key] = _rounded(path, new_weight, weight).view_as(weight)
    if bias is None and new_bias is not None:
        raise MergeError(f'{path} has no bias in the stock model to fold '
                         'one into.')
    parts = () if bias is None else new_bias.chunk(len(names))
    for name, part in zip(names, parts):
        if name is not None:
            state[name] = _rounded(path, part, state[name])
        elif part.any() and not layer.keys_need_no_bias:
            raise MergeError(f'{path} has no bias of the keys in the stock '
                             'model to fold one into.')


def _weight_name(path: str, layer: nn.Module) -> str:
    """Key of a layer's weight, which may belong to the attention."""
    part = getattr(layer, 'weight_part', None)
    return f'{path}.weight' if part is None else _beside(path, part)


def _beside(path: str, part: str) -> str:
    return '.'.join(p for p in (path.rpartition('.')[0], part) if p)


def _bias_names(path: str, layer: nn.Module) -> Tuple[Optional[str], ...]:
    """Keys of the parts of a layer's bias; None where it has none."""
    parts = getattr(layer, 'bias_parts', None)
    if parts is None:
        return (f'{path}.bias', )
    return tuple(part and _beside(path, part) for part in parts)


def _join(state: Dict[str, Tensor], names: Sequence[Optional[str]],
          rows: int) -> Optional[Tensor]:
    """The bias in float64; None if there is none."""
    parts = [state.get(name) for name in names]
    found = next((p for p in parts if p is not None), None)
    if found is None:
        return None
    zeros = found.new_zeros(rows // len(names))
    return torch.cat([zeros if p is None else p for p in parts]).double()


def _own_weights(module: PEFTModule) -> Iterator[Tuple[str, Tensor]]:
    """Tensors of a module, and of what it shares with others."""
    for owner in (module, *module._shared):
        yield from owner.named_parameters()
        yield from owner.named_buffers()


def _rounded(layer: str, value: Tensor, like: Tensor) -> Tensor:
    rounded = value.to(like.dtype)
    if not torch.isfinite(rounded).all():
        raise MergeError(f'{layer}: the merged weight does not fit into '
                         f'{like.dtype}; merge in float32.')
    return rounded
