"""What tools/bench.py does."""
import contextlib
import dataclasses
import json
import multiprocessing
import os
import os.path as osp
import signal
import sys
import warnings
from argparse import Namespace
from typing import Any, Dict, Iterator, List

from rich.console import Console

from ..engine.run import parse_options
from ..errors import PEFTError
from .base_weights import base_run, finish
from .cell_config import TaskConfigs
from .costs import measure_costs
from .launch import Launcher, locked
from .plan import Plan
from .plan_file import load_plan
from .progress import Watch, status_table
from .rows import results_file
from .study import Study
from .table import read_rows
from .warm import Warm

__all__ = ['main']


def main(args: Namespace) -> None:
    """Run a plan, report on it, or say how far it is."""
    plan = load_plan(args.plan, parse_options(args.cfg_options),
                     args.data_root)
    folder = args.work_dir or osp.join('work_dirs', 'bench', plan.name)
    # Tables go to standard output, the rest to standard error.
    console = Console(stderr=True)
    if args.action in ('run', 'all'):
        # Libraries print, and warn of optional packages.
        warnings.simplefilter('ignore')
        with contextlib.redirect_stdout(sys.stderr):
            run_plan(plan, folder, args, console)
    if args.action != 'report':
        show_status(plan, folder, args.json)
    if args.action in ('report', 'all'):
        write_report(plan, folder, console)


def run_plan(plan: Plan, folder: str, args: Namespace,
             console: Console) -> None:
    """Run what is missing; interrupted, the same command goes on."""
    os.makedirs(folder, exist_ok=True)
    launcher = Launcher(args.launcher, args.ranks, args.srun_args or '',
                        ['--amp'] if args.amp else [])
    with locked(osp.join(folder, 'lock')), _stoppable():
        for base in plan.bases:
            if not osp.isfile(base.out):
                finish(base, base_run(base, folder, launcher, args.jobs),
                       console.print)
        configs = {
            name: TaskConfigs(task, folder)
            for name, task in plan.tasks.items()
        }
        for config in configs.values():
            config.check()

        def tell(cell, row: Dict[str, Any]) -> None:
            said = f'{row["metric"]:.2f} {row["metric_name"]}' \
                if row['status'] == 'done' else f'failed: {row["reason"]}'
            console.print(
                f'{cell.name}: {said}', highlight=False, markup=False)

        if not args.cold and _can_fork(launcher):
            launcher = dataclasses.replace(
                launcher, warm=Warm({c.library
                                     for c in configs.values()}))
        study = Study(plan, folder, configs, launcher, args.retry_failed, tell)
        with Watch(study, console) as watch:
            study.run(args.jobs, args.budget, watch)
            watch()
        for name, task in plan.tasks.items():
            cells = [
                r for r in study.rows.values()
                if (r['task'], r['phase'], r['status']) == (name, 'final',
                                                            'done')
            ]
            if task.costs and cells and args.budget is None:
                study.table.add_costs(
                    name, measure_costs(task, cells, folder, console.print))
    failed = sum(r['status'] == 'failed' for r in study.rows.values())
    if failed:
        console.print(f'{failed} cells failed; status says why, '
                      '--retry-failed runs them again.')


def _can_fork(launcher: Launcher) -> bool:
    """CUDA is not for forks, and other launchers start their own."""
    import torch
    return (launcher.kind == 'none' and not torch.cuda.is_available()
            and 'forkserver' in multiprocessing.get_all_start_methods())


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A terminated plan stops its runs, as an interrupted one does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show_status(plan: Plan, folder: str, as_json: bool = False) -> None:
    """Print what the table has so far."""
    rows = read_rows(results_file(folder))
    if as_json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    # A file is wide enough for all columns.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(status_table(plan, rows))
    console.print(results_file(folder), highlight=False)


def write_report(plan: Plan, folder: str, console: Console) -> None:
    """Markdown, CSV, LaTeX and HTML from the table."""
    try:
        from .report import write_report as write
    except ImportError as error:
        raise PEFTError(f'The report needs a package that is not installed '
                        f'({error}).') from error
    rows: List[Dict[str, Any]] = read_rows(results_file(folder))
    out = osp.join(folder, 'report')
    write(rows, out, plan)
    console.print(f'report: {out}', highlight=False)
