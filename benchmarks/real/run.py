"""The study on real data, one command that may be stopped and repeated::

    python benchmarks/real/run.py --data-root DIR

It prepares the data in the cache, runs what is missing of the cells at low
priority and writes the table (docs/en/real_data.md). README.md in this folder
says what is measured.
"""

import argparse
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.real import cell as cell_module  # noqa: E402
from benchmarks.real import data, report  # noqa: E402
from benchmarks.real.plan import TASKS, final_cells, tuning_cells  # noqa: E402
from benchmarks.real.pretrain import pretrain  # noqa: E402

DEFAULT_CACHE = Path(os.environ.get(
    'XDG_CACHE_HOME',
    Path.home() / '.cache')) / 'mmpeft' / 'real'


def parse_args(args=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='PEFT methods on CamVid and a COCO subset, on a CPU.')
    parser.add_argument(
        '--data-root',
        type=Path,
        required=True,
        help='holds camvid/, coco_mini/, tiny_imagenet_100/ and perhaps '
        'nano_swin/ (README.md: layout)')
    parser.add_argument('--cache', type=Path, default=DEFAULT_CACHE)
    parser.add_argument(
        '--tasks', nargs='+', choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        '--budget',
        type=float,
        metavar='MINUTES',
        help='start no cell after that; the next call goes on')
    parser.add_argument(
        '--jobs',
        type=int,
        default=2,
        help='cells at a time, one thread each (default: 2)')
    parser.add_argument(
        '--iters',
        type=int,
        help='only so many iterations per cell, to try the study out; such '
        'cells have their own results and write no table')
    parser.add_argument(
        '--pretrain',
        action='store_true',
        help='train the backbone here even if the data has one')
    parser.add_argument(
        '--retry-failed', action='store_true', help='run failed cells again')
    parser.add_argument(
        '--report',
        action='store_true',
        help='only write the table from the results there are')
    parser.add_argument(
        '--out',
        type=Path,
        default=cell_module.ROOT / 'docs' / 'en' / 'real_data.md',
        help='where the table goes')
    return parser.parse_args(args)


class Study:
    """Runs cells, some at a time, until all are there or time is up."""

    def __init__(self, places: cell_module.Places,
                 args: argparse.Namespace) -> None:
        self.places = places
        self.args = args
        self.running = {}
        self.results = {}
        self.stop = threading.Event()
        self.deadline = None
        if args.budget is not None:
            self.deadline = time.monotonic() + 60 * args.budget

    def load(self, cells) -> list:
        """Reads cached results; returns the cells that have none."""
        missing = []
        for cell in cells:
            result = cell_module.read_result(cell, self.places)
            failed = result is not None and result['status'] == 'failed'
            if result is None or (failed and self.args.retry_failed):
                missing.append(cell)
            else:
                self.results[cell.name] = result
        return missing

    def _one(self, cell) -> None:
        late = self.deadline is not None and time.monotonic() > self.deadline
        if self.stop.is_set() or late:
            return
        began = time.monotonic()
        result = cell_module.run_cell(cell, self.places, self.running)
        if result is None:
            return
        self.results[cell.name] = result
        task = TASKS[cell.task]
        outcome = result.get('reason')
        if result['status'] == 'done':
            score = result[cell.phase][task.metric]
            outcome = f'{task.metric} {score:.2f}'
        print(
            f'{time.strftime("%H:%M:%S")} {cell.name}: {outcome} '
            f'({time.monotonic() - began:.0f} s)',
            flush=True)

    def run(self, title: str, cells) -> None:
        missing = self.load(cells)
        print(
            f'{title}: {len(missing)} of {len(cells)} cells to run',
            flush=True)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = [pool.submit(self._one, cell) for cell in missing]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:
                self.stop.set()
                for process in list(self.running.values()):
                    process.terminate()
                raise

    def run_task(self, name: str) -> None:
        task, iters = TASKS[name], self.args.iters
        self.run(f'{name}, learning rates', tuning_cells(task, iters))
        self.run(f'{name}, reported runs',
                 final_cells(task, self.results, iters))


def main() -> int:
    args = parse_args()
    os.nice(5)
    data_root, cache = args.data_root.resolve(), args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    own = cache / data.BASE_NAME
    checkpoint = own if args.pretrain else data.find_base(data_root, cache)
    places = cell_module.Places(data_root, cache, checkpoint)
    study = Study(places, args)
    try:
        if not args.report:
            if not checkpoint.exists():
                pretrain(data.prepare_tiny_imagenet(data_root, cache), own)
            print(f'backbone: {checkpoint}', flush=True)
            data.prepare_camvid(data_root, cache)
            data.prepare_coco(data_root, cache)
            for name in args.tasks:
                study.run_task(name)
        else:
            for task in TASKS.values():
                study.load(tuning_cells(task))
                study.load(final_cells(task, study.results))
    except data.DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('stopped; the same command goes on', file=sys.stderr)
        return 130
    if args.iters is None:
        for task in TASKS.values():
            study.load(tuning_cells(task))
            study.load(final_cells(task, study.results))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(report.render(study.results))
        print(f'table: {args.out}', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
