"""Fold attached modules into stock weights: exact, or refused."""
from collections import OrderedDict
from typing import Dict, List

import torch
import torch.nn as nn
from torch import Tensor

from .backbones.base import Block, find_family
from .errors import MergeError
from .injection import eject
from .methods.base import PEFTModule

__all__ = ['merge', 'merged_state_dict']


def merged_state_dict(model: nn.Module) -> 'OrderedDict[str, Tensor]':
    """State dict of the stock model that computes the same.

    Has exactly the keys of the stock model, buffers included, and the model
    is not changed. Products are computed in float64 and rounded once.

    Args:
        model (nn.Module): A model or backbone with methods attached.

    Raises:
        MergeError: If a method cannot be folded exactly, or its weights are
            not finite.
    """
    state = model.state_dict()
    reasons, folds = [], []
    for host, block in find_family(model) or ():
        for site, modules in _at_sites(block).items():
            for module in modules:
                reason = _obstacle(block, site, module)
                if reason and reason not in reasons:
                    reasons.append(reason)
            layer = _layer_path(host, block, site)
            folds.append((layer, modules))
    if reasons:
        raise MergeError('This model cannot be merged exactly: ' +
                         '; '.join(reasons) + '. Keep the checkpoint as it '
                         'is; tools/test.py reads it.')
    merged = OrderedDict(
        (k, v) for k, v in state.items() if '.peft.' not in f'.{k}')
    for layer, modules in folds:
        _fold(merged, layer, modules)
    return merged


def merge(model: nn.Module) -> nn.Module:
    """Merge in place and take everything off; the model is stock again.

    Returns:
        nn.Module: The same model.

    Raises:
        MergeError: As :func:`merged_state_dict`; then nothing has changed.
    """
    merged = merged_state_dict(model)
    hosts = dict.fromkeys(host for host, _ in find_family(model) or ())
    for host in hosts:
        eject(model.get_submodule(host))
    model.load_state_dict(merged, strict=True)
    return model


def _at_sites(block: Block) -> Dict[str, List[PEFTModule]]:
    sites: Dict[str, List[PEFTModule]] = {}
    for modules in getattr(block.module, 'peft', {}).values():
        for site, module in modules.items():
            sites.setdefault(site, []).append(module)
    return sites


def _obstacle(block: Block, site: str, module: PEFTModule) -> str:
    name = type(module).__name__
    if module.no_merge is not None:
        return f'{name} has no place in a stock layer, as {module.no_merge}'
    if site not in block.family.modules(block.module):
        return f'{name} sits at {site}, which is no stock layer'
    return ''


def _layer_path(host: str, block: Block, site: str) -> str:
    layer = block.family.modules(block.module).get(site)
    for name, module in block.module.named_modules():
        if module is layer:
            return '.'.join(p for p in (host, block.path, name) if p)
    return ''


def _fold(state: Dict[str, Tensor], layer: str,
          modules: List[PEFTModule]) -> None:
    weight, bias = state[f'{layer}.weight'], state.get(f'{layer}.bias')
    for module in modules:
        for name, parameter in module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise MergeError(
                    f'{layer}: {name} of {type(module).__name__} has values '
                    'that are not finite; the run diverged, take an earlier '
                    'checkpoint.')
    new_weight, new_bias = weight.double(), _double(bias)
    with torch.no_grad():
        for module in modules:
            new_weight, new_bias = module.merge(new_weight, new_bias)
    state[f'{layer}.weight'] = _rounded(layer, new_weight, weight)
    if bias is not None:
        state[f'{layer}.bias'] = _rounded(layer, new_bias, bias)
    elif new_bias is not None:
        raise MergeError(f'{layer} has no bias in the stock model to fold '
                         'one into.')


def _double(tensor: Tensor) -> Tensor:
    return None if tensor is None else tensor.double()


def _rounded(layer: str, value: Tensor, like: Tensor) -> Tensor:
    rounded = value.to(like.dtype)
    if not torch.isfinite(rounded).all():
        raise MergeError(f'{layer}: the merged weight does not fit into '
                         f'{like.dtype}; merge in float32.')
    return rounded
