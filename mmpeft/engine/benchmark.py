"""Measure what methods cost, side by side in one process."""
import copy
import gc
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.config import Config

from ..config import add_method, find_peft_backbones, load_config
from ..counting import count_params
from ..plan import parse_methods
from ..state import PEFTState
from .checkpoint import strip_method
from .measure import TrainStep, kept_by_forward
from .operations import seconds_by_group
from .run import parse_options
from .settings import Progress, Settings, clock_of, quiet
from .subject import Subject, node_at, set_checkpointing
from .timing import step_of, time_latency, time_steps

__all__ = ['Settings', 'benchmark']

REFERENCES = ('Full', 'Frozen')
#: Columns that only times fill.
TIMES = ('step_s', 'step_spread_s', 'forward_s', 'latency_s',
         'latency_stock_s', 'latency_merged_s', 'latency_folded_s')
RATIOS = ('ratio_saved', 'ratio_peak', 'ratio_flops', 'ratio_step',
          'ratio_step_spread', 'ratio_forward', 'ratio_latency',
          'ratio_latency_merged', 'ratio_latency_folded')


class Case(NamedTuple):
    """One row of the table, to be."""

    method: Any
    memory: Optional[str] = None
    with_cp: bool = False


def benchmark(config: str,
              methods: Sequence[str],
              settings: Settings,
              memories: Sequence[Optional[str]] = (None, ),
              at: Optional[str] = None,
              options: Optional[List[str]] = None,
              progress: Progress = quiet) -> List[Dict[str, Any]]:
    """Rows of ``tools/benchmark.py`` for one config.

    Args:
        config (str): A file or a stock name.
        methods (Sequence[str]): As for ``--method``; a PEFT config's own
            method if there are none.
        settings (Settings): How it is measured.
        memories (Sequence[str | None]): Values of the argument ``memory`` of
            ``PEFTBackbone`` that each method is measured with; None is its
            default.
        at (str, optional): Path of the backbone in the config.
        options (list[str], optional): Changes of the config, ``KEY=VALUE``.
        progress (Callable): Called with what begins, and once with
            ``more``, how often that will be.

    Raises:
        PEFTError: For a mistake in the config or in a method, or if the model
            does not run on generated inputs.
    """
    for method in methods:
        parse_methods(method)  # mistakes first
    cfg = load_config(config)
    parsed = parse_options(options)
    if parsed:
        cfg.merge_from_dict(parsed)
    chosen = list(methods) or _own_methods(cfg)
    cfg, at = add_method(cfg, 'Full', at)
    if 'pretrained' in node_at(cfg, at):
        # timm would download; weights are random here.
        node_at(cfg, at)['pretrained'] = False
    cases = _cases(chosen, memories, settings)
    rounds = settings.repeats + 1 if settings.repeats else 0
    each = 2 + rounds + settings.operations
    progress(more=1 + each * len(cases))
    rows: List[Dict[str, Any]] = []
    progress('building the stock model')
    stock = Subject(strip_method(cfg), at, settings)
    stock.try_step()
    subjects: List[Subject] = []
    for case in cases:
        progress(f'building {title(case.method)}')
        subject = Subject(_with(cfg, at, case), at, settings, base=stock.model)
        subject.try_step()
        subjects.append(subject)
        rows.append(_describe(config, case, subject, settings))
    if settings.repeats:
        time_steps(rows, subjects, settings, progress)
    no_latency = stock.why_no_latency() if settings.latency else None
    for row, subject in zip(rows, subjects):
        row['no_latency'] = no_latency
        if settings.operations:
            progress(f'operations of {row["method"]}')
            row['operations'] = seconds_by_group(
                step_of(subject), **clock_of(settings))
        progress(f'latency of {row["method"]}')
        if settings.latency and no_latency is None:
            time_latency(row, subject, stock, settings)
    for row in rows:
        _compare(row, rows[0])
    return rows


def title(method: Any) -> str:
    """A method of a config as text."""
    if isinstance(method, str):
        return method
    texts = []
    for plan in parse_methods(method):
        given = ','.join(f'{k}={v}' for k, v in plan.cfg.items()
                         if k != 'type')
        texts.append(':'.join(filter(None, (plan.cls.__name__, given))))
    return '+'.join(texts)


def _own_methods(cfg: Config) -> list:
    return [node['method'] for node in find_peft_backbones(cfg).values()]


def _cases(methods: Sequence[Any], memories: Sequence[Optional[str]],
           settings: Settings) -> List[Case]:
    """References, then each method; the first is what all are compared
    with."""
    cases = [Case('Full')]
    if settings.with_cp:
        cases.append(Case('Full', with_cp=True))
    cases.append(Case('Frozen', with_cp=settings.with_cp))
    for method in methods:
        if method not in REFERENCES:
            cases += [
                Case(method, memory, settings.with_cp) for memory in memories
            ]
    return cases


def _with(cfg: Config, at: str, case: Case) -> Config:
    """A PEFT config with the method of a case in the place of its own."""
    cfg = copy.deepcopy(cfg)
    node = node_at(cfg, at)
    node.update(method=case.method, allow_random_base=True)
    if case.memory is not None:
        node['memory'] = case.memory
    if case.with_cp:
        set_checkpointing(cfg, at)
    return cfg


def _describe(config: str, case: Case, subject: Subject,
              settings: Settings) -> Dict[str, Any]:
    """A row with everything that needs no clock."""
    step = step_of(subject)
    torch.manual_seed(0)
    kept = kept_by_forward(step.forward)
    row = dict(
        config=config,
        method=title(case.method),
        memory=_memory(subject.model),
        with_cp=case.with_cp,
        backbone_trainable=count_params(subject.model)['backbone_trainable'],
        saved_bytes=kept.saved,
        output_bytes=kept.outputs,
        peak_bytes=_peak(step),
        flops=subject.flops)
    row.update(dict.fromkeys((*TIMES, *RATIOS)))
    row.update(
        no_latency=None,
        not_merged=None,
        not_folded=None,
        operations=None,
        settings=settings.to_dict())
    return row


def _memory(model: nn.Module) -> str:
    """What its backbone was built with, or what is the default."""
    return next(m.memory for m in model.modules() if isinstance(m, PEFTState))


def _peak(step: TrainStep) -> Optional[int]:
    """Bytes on a GPU during a step: of its model, its optimizer, and all that
    comes and goes, without other rows."""
    if step.device != 'cuda':
        return None
    step()  # makes the state of the optimizer
    gc.collect()
    own = {}
    state = step.optimizer.state.values() if step.optimizer else ()
    for tensor in (*step.model.parameters(), *step.model.buffers(),
                   *(t for s in state for t in s.values())):
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            storage = tensor.untyped_storage()
            own[storage.data_ptr()] = storage.nbytes()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + sum(own.values())


def _compare(row: Dict[str, Any], full: Dict[str, Any]) -> None:
    """What training costs of that of the first row."""
    for name, key in (('ratio_saved', 'saved_bytes'),
                      ('ratio_peak', 'peak_bytes'), ('ratio_flops', 'flops')):
        if row[key] is not None and full[key]:
            row[name] = row[key] / full[key]
