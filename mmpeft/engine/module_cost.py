"""Mona's module against that of the released code."""
import copy
from statistics import median
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmengine.config import Config
from torch import Tensor

from ..config import add_method, load_config
from ..errors import PEFTError
from ..methods.mona import Mona
from ..plan import parse_methods
from ..recompute import recipes_for
from ..sites import TokenLayout
from .measure import interleave, kept_by_forward
from .released_mona import ReleasedMona
from .run import parse_options
from .settings import DTYPES, Progress, Settings, clock_of, quiet
from .subject import build_backbone, node_at

__all__ = ['compare']


def compare(config: str,
            methods: Sequence[str],
            settings: Settings,
            memories: Sequence[Optional[str]] = (None, ),
            at: Optional[str] = None,
            options: Optional[List[str]] = None,
            progress: Progress = quiet) -> List[Dict[str, Any]]:
    """Rows of ``tools/benchmark.py --module-against-released``.

    A row for each size of tokens that Mona gets in the backbone of the
    config, and one with ``width=None`` for all of its modules. A step is
    forward and backward of one module, with the gradients of its input and
    its parameters; its input counts for neither.

    Arguments and errors are those of :func:`mmpeft.engine.benchmark.
    benchmark`; the only method is Mona.
    """
    method = methods[0] if methods else 'Mona'
    plans = parse_methods(method)
    if len(methods) > 1 or [p.cls for p in plans] != [Mona]:
        raise PEFTError('--module-against-released knows the released module '
                        'of one method, Mona; give --method Mona:dim=... or '
                        'none.')
    cfg = load_config(config)
    parsed = parse_options(options)
    if parsed:
        cfg.merge_from_dict(parsed)
    rows = []
    for memory in memories:
        backbone = _build(cfg, at, method, memory, settings)
        found = _modules_by_size(backbone, settings)
        progress(more=len(found))
        own = []
        for (width, hw_shape), modules in found.items():
            progress(f'Mona at {width} x {hw_shape[0]} x {hw_shape[1]}')
            row = dict(
                config=config,
                module='Mona',
                memory=backbone.peft.memory,
                width=width,
                hw_shape=list(hw_shape),
                modules=len(modules))
            row.update(
                _against_released(modules[0], hw_shape, row['memory'],
                                  settings))
            row['settings'] = settings.to_dict()
            own.append(row)
        rows += [*own, _total(own)]
    return rows


def _build(cfg: Config, at: Optional[str], method: Any, memory: Optional[str],
           settings: Settings) -> nn.Module:
    cfg, at = add_method(cfg, method, at)
    node = node_at(cfg, at)
    node['allow_random_base'] = True
    if memory is not None:
        node['memory'] = memory
    backbone = build_backbone(cfg, at)
    return backbone.to(settings.device, DTYPES[settings.dtype])


def _modules_by_size(backbone: nn.Module,
                     settings: Settings) -> Dict[tuple, List[Mona]]:
    """Modules that get tokens of the same number and width."""
    found: Dict[tuple, List[Mona]] = {}

    def note(module: nn.Module, args: tuple) -> None:
        _, y, layout = args
        size = (y.shape[-1], tuple(layout.hw_shape))
        found.setdefault(size, []).append(module)

    hooks = [
        m.register_forward_pre_hook(note) for m in backbone.modules()
        if isinstance(m, Mona)
    ]
    with torch.no_grad():
        backbone(
            torch.randn(
                settings.batch_size,
                3,
                *settings.image_size,
                device=settings.device,
                dtype=DTYPES[settings.dtype]))
    for hook in hooks:
        hook.remove()
    return found


def _against_released(module: Mona, hw_shape: Tuple[int, int], memory: str,
                      settings: Settings) -> Dict[str, Any]:
    ours = copy.deepcopy(module).train()
    torch.manual_seed(0)
    with torch.no_grad():
        # gamma = 1e-6 would hide the norm.
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=.05)
    width, dim = ours.project1.in_features, ours.project1.out_features
    released = ReleasedMona(width, dim, ours.dropout.p).to(ours.gamma)
    released.load_state_dict(ours.state_dict())
    y = torch.randn(settings.batch_size, hw_shape[0] * hw_shape[1],
                    width).to(ours.gamma).requires_grad_()
    grad = torch.randn_like(y)
    layout = TokenLayout(hw_shape)

    def run_ours(y: Tensor) -> Tensor:
        # As in a block, which says what is computed again in backward.
        with _autocast(settings), recipes_for(memory, y, False):
            return ours(y, y, layout)

    def run_released(y: Tensor) -> Tensor:
        with _autocast(settings):
            return released(y, hw_shape)

    steps = {
        'ours': _Step(run_ours, ours, y, grad),
        'released': _Step(run_released, released, y, grad)
    }
    for step in steps.values():
        step()
    kept = [kept_by_forward(run, y).saved for run in (run_ours, run_released)]
    row = dict(
        parameters=sum(p.numel() for p in ours.parameters()),
        released_parameters=sum(p.numel() for p in released.parameters()),
        saved_bytes=kept[0],
        released_saved_bytes=kept[1],
        ratio_saved=kept[0] / kept[1],
        step_s=None,
        released_step_s=None,
        ratio_step=None)
    if settings.repeats:
        times = interleave(steps, settings.repeats, **clock_of(settings))
        row['step_s'] = median(times['ours'])
        row['released_step_s'] = median(times['released'])
        row['ratio_step'] = median(
            a / b for a, b in zip(times['ours'], times['released']))
    # What is drawn need not be drawn alike.
    ours.dropout.p = released.dropout.p = 0.
    (out, grads), (expected, wanted) = (s() for s in steps.values())
    row['output_difference'] = _difference(out, expected)
    row['gradient_difference'] = max(map(_difference, grads, wanted))
    return row


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast(
        torch.device(settings.device).type,
        settings.autocast,
        enabled=settings.amp is not None)


class _Step:
    """Forward and backward of a module."""

    def __init__(self, run: Callable[[Tensor], Tensor], module: nn.Module,
                 y: Tensor, grad: Tensor) -> None:
        self.run, self.y, self.grad = run, y, grad
        named = dict(module.named_parameters())
        self.wanted = [y, *(named[name] for name in sorted(named))]

    def __call__(self) -> Tuple[Tensor, Sequence[Tensor]]:
        out = self.run(self.y)
        return out.detach(), torch.autograd.grad(out, self.wanted,
                                                 self.grad.to(out.dtype))


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest one, relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


def _total(rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    """All modules of a backbone."""
    total = dict(rows[0], width=None, hw_shape=None)
    for name in ('modules', 'parameters', 'released_parameters', 'saved_bytes',
                 'released_saved_bytes', 'step_s', 'released_step_s'):
        if rows[0][name] is not None:
            total[name] = sum(r[name] *
                              (1 if name == 'modules' else r['modules'])
                              for r in rows)
    for name in ('saved_bytes', 'step_s'):
        if rows[0][name] is not None:
            total['ratio_' + name.split('_')[0]] = \
                total[name] / total['released_' + name]
    for name in ('output_difference', 'gradient_difference'):
        total[name] = max(r[name] for r in rows)
    return total
