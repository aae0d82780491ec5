"""The table in docs, from the results and nothing else."""

import platform
import shlex
from dataclasses import replace
from statistics import mean
from typing import Sequence

from benchmarks.real.cell import ppt
from benchmarks.real.pages import INTROS, reading_of
from benchmarks.real.plan import (STRETCH, Cell, choose, reported_cells,
                                  tuning_cells, why_cells)
from benchmarks.real.tasks import TASKS, Task
from mmpeft.bench.markdown import fold, spread, table

COMMAND = 'python benchmarks/real/run.py --data-root DIR'
COLUMNS = {
    'camvid': ('mIoU', ),
    'camvid-vit': ('mIoU', ),
    'coco-mini': ('bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'segm_mAP_50')
}
TITLES = {
    'camvid': 'CamVid, 240x180 (width x height), UPerNet',
    'camvid-vit': 'CamVid, 240x176 (width x height), SETR head',
    'coco-mini': 'COCO subset, one category, Mask R-CNN'
}


def _rate(task: Task, best: Cell) -> str:
    """Marks a learning rate at the end of a grid that has a middle."""
    rate, grid = best.lr, task.grid
    if task.head_grid and best.method == 'Frozen':
        rate, grid = best.lr * best.head_mult, task.head_grid
    ends = (grid[0], grid[-1]) if len(grid) > 2 else ()
    edge = any(f'{rate:g}' == f'{end:g}' for end in ends)
    return f'{rate:g}' + (' (edge)' if edge else '')


def done_results(task: Task, results: dict[str, dict], method: str) -> list:
    """Results behind a row, those that finished."""
    found = (
        results.get(cell.name)
        for cell in reported_cells(task, results, method))
    return [r for r in found if r is not None and r['status'] == 'done']


def main_rows(task: Task, results: dict[str, dict]) -> list[list[str]]:
    rows, columns = [], COLUMNS[task.name]
    for method in task.methods:
        done = done_results(task, results, method)
        best = choose(task, results, method)
        row = [method]
        row += [spread([r['final'][name] for r in done]) for name in columns]
        if done:
            trainable = done[0]['backbone_trainable']
            score = mean(r['final'][task.metric] for r in done)
            row += [
                f'{trainable / 1e6:.4f}', f'{ppt(score, trainable):.2f}',
                f"{mean(r['cpu_s_per_step'] for r in done):.3f}"
            ]
        else:
            row += ['not measured'] * 3
        row.append(_rate(task, best) if best else 'not measured')
        if task.seeds:
            row.append(', '.join(str(r['seed']) for r in done) or 'none')
        rows.append(row)
    return rows


def tuning_rows(task: Task, results: dict[str, dict],
                methods: Sequence[str]) -> list[list[str]]:
    rows = []
    for method in methods:
        row, best = [method], choose(task, results, method)
        cells = tuning_cells(task, method, results)
        if not cells:
            row += ['not measured'] * len(task.grid)
        for cell in cells:
            result = results.get(cell.name)
            if result is None:
                text = '-' if best else 'not measured'
            elif result['status'] == 'failed':
                text = 'failed'
            else:
                text = f"{result['tune'][task.metric]:.2f}"
            row.append(f'**{text}**' if cell == best else text)
        rows.append(row)
    return rows


def gains(task: Task, results: dict[str, dict]) -> str:
    """How every method stands to Frozen, in words."""
    scores = {
        m: [r['final'][task.metric] for r in done_results(task, results, m)]
        for m in task.methods
    }
    if not scores['Frozen']:
        return ''
    base = mean(scores['Frozen'])
    parts = [
        f'{m} {mean(values) - base:+.2f}' for m, values in scores.items()
        if values and m != 'Frozen'
    ]
    text = (f'Difference of {task.metric} to Frozen, in points: ' +
            ', '.join(parts) + '.')
    if task.seeds:
        text += ' By seed: ' + '; '.join(f'{m} ' + ', '.join(f'{v:.2f}'
                                                             for v in values)
                                         for m, values in scores.items()
                                         if values) + '.'
    return text


def failures(task: Task, results: dict[str, dict]) -> list[str]:
    return [
        f"- `{name}` failed: {result['reason']}"
        for name, result in sorted(results.items())
        if result['task'] == task.name and result['status'] == 'failed'
    ]


def recipe(task: Task) -> str:
    """The facts of a task, read from its config."""
    from mmengine.config import Config

    import mmpeft  # noqa: F401 (makes the names mmseg::… resolve)
    cfg = Config.fromfile(task.config_path, import_custom_modules=False)
    warmup = cfg.param_scheduler[0]['end']
    text = (f'{cfg.train_cfg.max_iters} iterations of batch '
            f'{cfg.train_dataloader.batch_size}, AdamW (weight decay '
            f'{cfg.optim_wrapper.optimizer.weight_decay}, none on norms and '
            f'positions), {warmup} iterations of warm-up, then '
            'linear decay to zero, random flip. ' + _rates(task))
    if len(task.grid) > 2:
        text += ('Each method starts in the middle of the grid and goes on '
                 'while the best is the last one tried. ')
    if task.seeds:
        return text + (
            f'Chosen by {task.metric} on the val split with seed '
            f'{task.tune_seed}; reported: last iterate on the test split, '
            f'seeds {", ".join(map(str, task.seeds))}, mean ± sample '
            'standard deviation.')
    return text + (
        f'One seed ({task.tune_seed}). Of the validation images, sorted by '
        f'id, every other one chooses the rate (by {task.metric}), the rest '
        'are reported. Differences of a point mean nothing here.')


def _rates(task: Task) -> str:
    own = ', '.join(f'{lr:g}' for lr in task.grid)
    if not task.head_grid:
        return f'Learning rates, for every method: {own}. '
    head = ', '.join(f'{lr:g}' for lr in task.head_grid)
    return (f'Learning rates of the head: {head}, chosen by Frozen and the '
            'same for all; of what a method trains in the backbone: '
            f'{own}, for every method. ')


def why_section(task: Task, results: dict[str, dict]) -> str:
    """The examination beside the study."""

    def score(cell: Cell) -> str:
        result = results.get(cell.name)
        if result is None:
            return 'not measured'
        if result['status'] == 'failed':
            return 'failed'
        return f'{result[cell.phase][task.metric]:.2f}'

    cells, seed = why_cells(task, results), task.seeds[0]
    shared, longer = [], []
    for cell in cells:
        rates = [cell.method, f'{cell.lr:g}', f'{cell.lr * cell.head_mult:g}']
        if cell.stretch == 1:
            own = reported_cells(task, results, cell.method)[:1]
            before = score(own[0]) if own else 'not measured'
            shared.append([*rates, score(cell), before])
        else:
            phase = 'final' if cell.head_mult == 1 else 'why'
            before = score(replace(cell, phase=phase, stretch=1))
            longer.append([*rates, before, score(cell)])
    return '\n\n'.join([
        '### Why',
        'Beside the study, designed after its first results, with seed '
        f'{seed} and on the reported images; one seed, so less than two '
        'points mean little. (a) The head at the rate that Frozen chose, the '
        'backbone (what the method trains of it) at a fraction:',
        table([
            'Method', 'Backbone rate', 'Head rate', task.metric,
            'with one rate, as above'
        ], shared), f'(b) {STRETCH} times the iterations:',
        table([
            'Method', 'Backbone rate', 'Head rate', f'{task.metric}, as above',
            f'{task.metric}, {STRETCH} x iterations'
        ], longer)
    ])


def task_section(task: Task, results: dict[str, dict]) -> str:
    head = ['Method', *COLUMNS[task.name], 'Trainable in backbone (M)', 'PPT']
    head += ['CPU s/step', 'Learning rate']
    if task.seeds:
        head.append('Seeds')
    tuned = 'Tuning ({}; bold: chosen, "-": not needed):'
    parts = [
        f'## {TITLES[task.name]}',
        f'Config: `benchmarks/real/configs/{task.config}`. ' + recipe(task),
        table(head, main_rows(task, results)),
        gains(task, results),
        tuned.format(task.metric)
    ]
    apart = ['Frozen'] if task.head_grid else []
    if apart:
        parts.append(
            table(['Head', *(f'{lr:g}' for lr in task.head_grid)],
                  tuning_rows(task, results, apart)))
    parts.append(
        table(['Method', *(f'{lr:g}' for lr in task.grid)],
              tuning_rows(task, results,
                          [m for m in task.methods if m not in apart])))
    if task.why_mults or task.why_long:
        parts.append(why_section(task, results))
    failed = failures(task, results)
    if failed:
        parts.append('\n'.join(failed))
    return '\n\n'.join(part for part in parts if part)


def machine(results: dict[str, dict]) -> str:
    done = [r for r in results.values() if r['status'] == 'done']
    if not done:
        return 'Nothing has been measured.'
    dates = sorted(r['date'] for r in done)
    hours = sum(r['steps'] * r['cpu_s_per_step'] for r in done) / 3600
    versions = ', '.join(sorted({r['torch'] for r in done}))
    cores = ', '.join(sorted({str(r['cores']) for r in done}))
    return (f'{len(done)} runs between {dates[0]} and {dates[-1]}, '
            f'{hours:.2f} CPU hours of training steps, on a machine with '
            f'{cores} CPU cores ({platform.machine()}), '
            f'{done[0]["threads"]} thread per run, torch {versions}.')


def render(results: dict[str, dict], page: str) -> str:
    """Name of a cell to its result -> the page."""
    tasks = [t for t in TASKS.values() if t.page == page]
    names = {t.name for t in tasks}
    results = {k: r for k, r in results.items() if r['task'] in names}
    specs = ', '.join(f'`{shlex.quote(s)}`' for s in tasks[0].methods.values())
    command = COMMAND
    if len(tasks) < len(TASKS):
        command += ' --tasks ' + ' '.join(t.name for t in tasks)
    parts = [INTROS[page].format(command=command, specs=specs).strip()]
    parts += [machine(results)]
    parts += [task_section(task, results) for task in tasks]
    reading = reading_of(page)
    if reading.exists():
        parts += ['## Reading', reading.read_text().strip()]
    return '\n\n'.join(map(fold, parts)) + '\n'
