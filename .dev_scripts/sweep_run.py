"""Run one stock config with a method: what happens, in a word."""
import copy
import inspect
import json
import logging
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple
from urllib.error import URLError

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from sweep_shrink import shrink
from torch import Tensor

from mmpeft.config import add_method, find_backbones, load_config, nodes
from mmpeft.engine.count import without_init
from mmpeft.errors import PEFTError
from mmpeft.registry import MODELS

__all__ = ['METHODS', 'Sweep', 'step']

#: By the name in the table, as given to ``--method``.
METHODS = {'Mona': 'Mona:dim=4', 'LoRA': 'LoRA:rank=2'}
WORKS, REFUSED, CRASH = 'works', 'refused', 'crash'
STOCK_BROKEN, ALONE = 'stock broken', 'backbone alone'
BATCH = 2


class Outcome(NamedTuple):
    """A verdict, and the reason for it where it is not `works`."""
    verdict: str
    reason: str = ''

    def __str__(self) -> str:
        return f'{self.verdict}: {self.reason}' if self.reason else \
            self.verdict


class Sweep:
    """Runs configs; those with the same backbone share a run."""

    def __init__(self, types: Dict[str, type]) -> None:
        MMLogger.get_instance('mmpeft', log_level=logging.ERROR)
        self.types = types
        self.known: Dict[str, Outcome] = {}

    def __call__(self, name: str) -> Optional[Dict[str, Any]]:
        """``at``, ``type`` and the outcome of each method.

        Only ``type`` if that backbone is of no family, and None if the model
        has no transformer for a backbone.
        """
        try:
            cfg = load_config(name)
        except Exception as error:
            # Ours names the file, whose folder differs between machines.
            cause = error.__cause__ or error
            broken = str(Outcome(STOCK_BROKEN, 'loading: ' + _line(cause)))
            return dict(at='', type='', **dict.fromkeys(METHODS, broken))
        found = find_backbones(cfg)
        if not found:
            return self._of_no_family(cfg)
        at = 'model.backbone' if 'model.backbone' in found else min(found)
        row = dict(at=at, type='')
        if len(found) > 1:
            row['others'] = sorted(set(found) - {at})
        model = None
        for label, method in METHODS.items():
            peft, _ = add_method(cfg, method, at)
            node = _node(peft, at)
            row['type'] = node['stock']
            outcome = self.backbone(peft, node)
            if outcome.verdict == WORKS:
                # What is around the backbone is the same for all methods.
                model = outcome = model or self.model(peft, at)
            row[label] = str(outcome)
        return row

    def _of_no_family(self, cfg: Config) -> Optional[Dict[str, Any]]:
        scope = cfg.get('default_scope')
        for _, node in nodes(cfg.get('model'), 'model'):
            name = node['type']
            name = name if '.' in name else f'{scope}.{name}'
            if name in self.types:
                return dict(type=name)
        return None

    def backbone(self, cfg: Config, node: dict) -> Outcome:
        """Forward and backward of the backbone."""
        with _scope(cfg):
            small, size = shrink(node, MODELS.get(node['stock']))
            key = json.dumps([small, size], sort_keys=True, default=str)
            if key not in self.known:
                self.known[key] = _try_backbone(small, size)
        return self.known[key]

    def model(self, cfg: Config, at: str) -> Outcome:
        """Build the whole model around the small backbone."""
        node = _node(cfg, at)
        with _scope(cfg), without_init():
            small, _ = shrink(node, MODELS.get(node['stock']))
            try:
                MODELS.build(_replaced(cfg, at, small))
            except Exception as error:
                try:
                    MODELS.build(_replaced(cfg, at, _stock(small)))
                except Exception as stock_error:
                    return _without(stock_error)
                return Outcome(CRASH, 'model: ' + _line(error))
        return Outcome(WORKS)


def _scope(cfg: Config):
    return DefaultScope.overwrite_default_scope(cfg.default_scope)


def _node(cfg: Config, at: str) -> dict:
    value: Any = cfg
    for key in at.split('.'):
        value = value[int(key) if isinstance(value, list) else key]
    return value


def _replaced(cfg: Config, at: str, node: dict) -> dict:
    cfg = copy.deepcopy(cfg)
    parent, _, key = at.rpartition('.')
    holder = _node(cfg, parent)
    holder[int(key) if isinstance(holder, list) else key] = node
    return cfg.model


def _stock(node: dict) -> dict:
    stock = {k: v for k, v in node.items() if k not in ('method', 'stock')}
    return dict(stock, type=node['stock'])


def _try_backbone(node: dict, size: Tuple[int, int, int]) -> Outcome:
    try:
        step(MODELS.build(_stock(node)), size)
    except Exception as error:
        return Outcome(STOCK_BROKEN, _line(error))
    try:
        backbone = MODELS.build(dict(node, allow_random_base=True))
        wrong = step(backbone, size)
    except PEFTError as error:
        return Outcome(REFUSED, _line(error))
    except Exception as error:
        return Outcome(CRASH, _line(error))
    return Outcome(CRASH, wrong[0]) if wrong else Outcome(WORKS)


def step(backbone: nn.Module, size: Tuple[int, int, int]) -> List[str]:
    """One step in training mode; what is wrong with the gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        # What starts as zero would hide what is behind it.
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=.05)
    backbone.train()
    wrong = _step(backbone, size)
    # Drop-path may have dropped a branch for the whole batch.
    if any('zero' in w for w in wrong):
        for module in backbone.modules():
            if hasattr(module, 'drop_prob'):
                module.drop_prob = 0.
        wrong = _step(backbone, size)
    return wrong


def _step(backbone: nn.Module, size: Tuple[int, int, int]) -> List[str]:
    backbone.zero_grad(set_to_none=True)
    image = torch.randn(BATCH, *size)
    loss = sum((out * torch.randn_like(out)).sum()
               for out in _tensors(backbone(image, *_mask(backbone, size)))
               if out.requires_grad)
    # The backbone of a linear probe is frozen.
    if isinstance(loss, Tensor):
        loss.backward()
    wrong = []
    for name, parameter in backbone.named_parameters():
        grad = parameter.grad
        if not parameter.requires_grad:
            if grad is not None:
                wrong.append(f'{name} is frozen and has a gradient')
        elif grad is None:
            wrong.append(f'{name} has no gradient')
        elif not grad.isfinite().all():
            wrong.append(f'the gradient of {name} is not finite')
        elif not grad.any():
            wrong.append(f'the gradient of {name} is zero')
    return wrong


def _mask(backbone: nn.Module, size: Tuple[int, int, int]) -> tuple:
    """What a backbone of masked pre-training asks for: every other token."""
    parameters = list(inspect.signature(backbone.forward).parameters.values())
    asked = [
        p for p in parameters[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL,
                                                   p.VAR_KEYWORD)
    ]
    if not asked:
        return ()
    height, width = backbone.patch_embed.projection.kernel_size
    count = (size[1] // height) * (size[2] // width)
    mask = torch.arange(count).remainder(2).bool().expand(BATCH, -1)
    # MILAN's importance is a probability.
    return (torch.rand(BATCH, count), ) if asked[0].name == 'importance' \
        else (mask, )


def _without(error: Exception) -> Outcome:
    """Why a stock model cannot be built: it lacks something, or is broken."""
    text = str(error)
    if 'multimodal' in text:
        return Outcome(ALONE, 'the model needs mmpretrain[multimodal]')
    if isinstance(error, URLError):
        return Outcome(ALONE, 'the model downloads weights while it is built')
    if isinstance(error, ImportError) or ' install' in text:
        return Outcome(ALONE, 'the model needs a package: ' + _line(error))
    return Outcome(STOCK_BROKEN, 'model: ' + _line(error))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _line(error: Exception) -> str:
    """An error on one line, without what differs between machines."""
    text = ' '.join(str(error).split())
    if not isinstance(error, PEFTError):
        text = f'{type(error).__name__}: {text}'
    return text if len(text) < 300 else text[:297] + '...'
