"""Time models in turns, and write it into their rows."""
from functools import partial
from statistics import median
from typing import Any, Callable, Dict, List

import torch.nn as nn

from ..errors import PEFTError
from ..folding import fold
from ..merging import merge
from .measure import TrainStep, interleave
from .settings import Progress, Settings, clock_of
from .subject import Subject

__all__ = ['step_of', 'time_latency', 'time_steps']


def step_of(subject: Subject, **kwargs: Any) -> TrainStep:
    """A training step of what is measured.

    Args:
        subject (Subject): The model and its inputs.
        **kwargs: For :class:`TrainStep`.
    """
    return TrainStep(
        subject.trained,
        *subject.inputs,
        autocast=subject.settings.autocast,
        loss=subject.loss_of,
        **kwargs)


class TimedStep:
    """A step that notes when its forward ends.

    Args:
        subject (Subject): What is measured.
        clock (Callable): Gives seconds.
        synchronize (Callable): Waits for the device.
        begins (Callable): Called before each step.
    """

    def __init__(self, subject: Subject, clock: Callable[[], float],
                 synchronize: Callable[[], None],
                 begins: Callable[[], None]) -> None:
        self._clock, self._synchronize = clock, synchronize
        self._begins = begins
        self._step = step_of(subject, forward_ends=self._forward_ends)
        #: Seconds of the forward of each step.
        self.forward_s: List[float] = []

    def _forward_ends(self) -> None:
        self._synchronize()
        self.forward_s.append(self._clock() - self._start)

    def __call__(self) -> None:
        self._begins()
        self._start = self._clock()
        self._step()


def time_steps(rows: List[Dict], subjects: List[Subject], settings: Settings,
               progress: Progress) -> None:
    """Seconds of steps of all rows in turns.

    Args:
        rows (list[dict]): The first is what the others are compared with.
        subjects (list[Subject]): One for each row.
        settings (Settings): How often, and on which clock.
        progress (Callable): Called before each step.
    """
    how = clock_of(settings)
    steps = {
        number:
        TimedStep(
            subject,
            begins=partial(progress, f'step of {rows[number]["method"]}'),
            **how)
        for number, subject in enumerate(subjects)
    }
    seconds = interleave(steps, settings.repeats, **how)
    for number, row in enumerate(rows):
        times, forward = seconds[number], steps[number].forward_s[1:]
        row['step_s'], row['forward_s'] = median(times), median(forward)
        row['step_spread_s'] = [min(times), max(times)]
        # Of one round, so that a machine that is busy slows both.
        ratios = _ratios(times, seconds[0])
        row['ratio_step'] = median(ratios)
        row['ratio_step_spread'] = [min(ratios), max(ratios)]
        row['ratio_forward'] = median(_ratios(forward, steps[0].forward_s[1:]))


def _ratios(times: List[float], reference: List[float]) -> List[float]:
    return [a / b for a, b in zip(times, reference)]


def time_latency(row: Dict[str, Any], subject: Subject, stock: Subject,
                 settings: Settings) -> None:
    """Of the stock model, the row's, and both forms for deployment, in turns;
    they are made here and dropped, as each is a whole model."""
    for model in (stock.model, subject.model):
        model.eval()
    models = {'latency_stock_s': stock.model, 'latency_s': subject.model}
    for name, form, reason in (('latency_merged_s', merge, 'not_merged'),
                               ('latency_folded_s', fold, 'not_folded')):
        try:
            models[name] = form(subject.copy())
        except PEFTError as error:
            row[reason] = str(error)
    if settings.repeats:
        seconds = interleave(
            {
                n: _inference(stock, m)
                for n, m in models.items()
            }, settings.repeats, **clock_of(settings))
        reference = seconds['latency_stock_s']
        for name, times in seconds.items():
            row[name] = median(times)
            if name != 'latency_stock_s':
                row['ratio_' + name[:-2]] = median(_ratios(times, reference))
    subject.model.train()


def _inference(stock: Subject, model: nn.Module) -> Callable[[], Any]:
    return lambda: stock.infer(model)
