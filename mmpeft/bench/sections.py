"""The parts of a report that are about one task."""
from typing import List, Sequence

from .cells_text import score_text
from .compare import reference
from .cost_tables import costs_table, head_table, head_words, published_table
from .document import Heading, Part, Text
from .rank_plots import ppt_bars, rank_flow
from .result_tables import (differences_table, gaps, others_table,
                            results_table, tuning_tables)
from .scatter_plots import against_memory, against_parameters
from .summary import TaskSummary

__all__ = ['task_parts']


def recipe(task: TaskSummary) -> str:
    """What the plan asks of every method."""
    text = f'Config: `{task.config}`. ' if task.config else ''
    asked = task.asked
    if asked is None:
        return text.strip()
    if asked.budget:
        text += f'{asked.budget.count} {asked.budget.unit} for every method. '
    text += 'Seeds of the reported runs: '
    text += ', '.join(map(str, asked.seeds)) + '. '
    if asked.head_lrs:
        text += ('Learning rates of neck and head, chosen by Frozen for all: '
                 f'{_numbers(asked.head_lrs)}. ')
    if len(asked.lrs) == 1 and not asked.head_lrs:
        text += f'Learning rate, for every method: {_numbers(asked.lrs)}.'
    elif asked.lrs:
        search = dict(
            climb='from the middle to where the best is no end of what was '
            'tried',
            all='all of them').get(asked.rule, asked.rule)
        text += ('Learning rates, one grid for every method: '
                 f'{_numbers(asked.lrs)}; tried with seed {asked.tune_seed}, '
                 f'{search}.')
    return text.strip()


def _numbers(values: Sequence[float]) -> str:
    return ', '.join(f'{value:g}' for value in values)


def headline(task: TaskSummary) -> str:
    """What the tables say, in words."""
    known = task.measured
    if not known:
        return 'Nothing has been measured on this task.'
    best = known[0]
    text = (f'Best by {task.words}: **{best.name}** ({score_text(best)} %)')
    weighted = [m for m in known if m.ppt_place == 1]
    if weighted:
        text += f'; best by PPT: **{weighted[0].name}** '
        text += f'({weighted[0].ppt:.2f} %)'
    full = task.find('Full')
    if full is not None:
        above = [m.name for m in known if m.score > full.score]
        text += '. Above full fine-tuning by their means: '
        text += ', '.join(above) if above else 'none'
    return text + '.'


def task_parts(task: TaskSummary, figures: bool) -> List[Part]:
    """Everything about a task; what has no numbers is left out.

    Raises:
        PEFTError: If figures are wanted without matplotlib.
    """
    column = reference(task)
    sections = {
        'Results': [
            results_table(task), figures and against_parameters(task),
            others_table(task)
        ],
        'Against the baselines': [differences_table(task)],
        'PPT': [
            figures and ppt_bars(task),
            head_words(task) and Text(head_words(task)),
            head_table(task)
        ],
        'Cost': [costs_table(task), figures and against_memory(task)],
        'Against the printed numbers':
        [published_table(task), figures and rank_flow(task, column)],
        'Tuning':
        tuning_tables(task),
        'Failed and missing cells':
        [Text(items=gaps(task))] if gaps(task) else []
    }
    parts: List[Part] = [Heading(2, task.name), Text(headline(task))]
    if recipe(task):
        parts.append(Text(recipe(task)))
    for title, found in sections.items():
        found = [part for part in found if part]
        if found:
            parts += [Heading(3, title), *found]
    return parts
