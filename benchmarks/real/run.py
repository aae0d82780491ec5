"""The study on real data, one command that may be stopped and repeated::

    python benchmarks/real/run.py --data-root DIR

It prepares the data in the cache, runs what is missing of the cells at low
priority and writes the tables (docs/en/real_data.md and real_data_vit.md).
README.md in this folder says what is measured.
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
from benchmarks.real.plan import next_cells  # noqa: E402
from benchmarks.real.pretrain import pretrain  # noqa: E402
from benchmarks.real.tasks import TASKS  # noqa: E402

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
        '--prepare',
        action='store_true',
        help='only lay out the data in the cache')
    parser.add_argument(
        '--report',
        action='store_true',
        help='only write the table from the results there are')
    parser.add_argument(
        '--out',
        type=Path,
        default=cell_module.ROOT / 'docs' / 'en',
        help='folder the tables go to')
    return parser.parse_args(args)


class Study:
    """Runs cells, some at a time, until all are there or time is up."""

    def __init__(self, places: cell_module.Places,
                 args: argparse.Namespace) -> None:
        self.places = places
        self.args = args
        self.results = {}
        self.running = {}
        # Cells of this call, so that a killed one is left to the next call.
        self.taken = set()
        self.active = 0
        self.changed = threading.Condition()
        self.stopped = False
        self.deadline = None
        if args.budget is not None:
            self.deadline = time.monotonic() + 60 * args.budget

    def load(self, name: str) -> None:
        """Reads the cached results of a task."""
        task, iters = TASKS[name], self.args.iters
        # What comes next is known once what it depends on is read. A failed
        # cell that is to be tried again stays among the next.
        seen = set()
        cells = next_cells(task, self.results, iters)
        while cells:
            for cell in cells:
                seen.add(cell.name)
                result = cell_module.read_result(cell, self.places)
                if result and not (result['status'] == 'failed'
                                   and self.args.retry_failed):
                    self.results[cell.name] = result
            cells = [
                c for c in next_cells(task, self.results, iters)
                if c.name not in seen
            ]

    def take(self, name: str):
        """Waits for a cell that can run; None when there will be none."""
        with self.changed:
            while True:
                late = self.deadline and time.monotonic() > self.deadline
                if self.stopped or late:
                    return None
                cells = next_cells(TASKS[name], self.results, self.args.iters)
                cell = next((c for c in cells if c.name not in self.taken),
                            None)
                if cell:
                    self.taken.add(cell.name)
                    self.active += 1
                    return cell
                if not self.active:
                    return None
                self.changed.wait()

    def work(self, name: str) -> None:
        """Runs cells one after the other."""
        while (cell := self.take(name)) is not None:
            began, result = time.monotonic(), None
            try:
                result = cell_module.run_cell(cell, self.places, self.running)
            finally:
                with self.changed:
                    self.active -= 1
                    if result:
                        self.results[cell.name] = result
                    self.changed.notify_all()
            if result:
                metric = TASKS[name].metric
                outcome = (f'{metric} {result[cell.phase][metric]:.2f}'
                           if result['status'] == 'done' else
                           f"failed, {result['reason']}")
                print(
                    f'{time.strftime("%H:%M:%S")} {cell.name}: {outcome} '
                    f'({time.monotonic() - began:.0f} s)',
                    flush=True)

    def run_task(self, name: str) -> None:
        self.load(name)
        print(f'{name}: {len(self.results)} results are there', flush=True)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = [
                pool.submit(self.work, name) for _ in range(self.args.jobs)
            ]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:
                self.stopped = True
                for process in list(self.running.values()):
                    process.terminate()
                raise


def main() -> int:
    args = parse_args()
    os.nice(5)
    data_root, cache = args.data_root.resolve(), args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    own = cache / data.BASE_NAME
    checkpoints = {
        'swin-nano':
        own if args.pretrain else data.find_base(data_root, cache),
        'deit-tiny': data.find_deit(data_root)
    }
    study = Study(cell_module.Places(data_root, cache, checkpoints), args)
    try:
        for name in [] if args.report else args.tasks:
            task = TASKS[name]
            checkpoint = checkpoints[task.base]
            if checkpoint == own and not own.exists():
                pretrain(data.prepare_tiny_imagenet(data_root, cache), own)
            print(f'backbone: {data.need(checkpoint, task.base)}', flush=True)
            if task.size:
                data.prepare_camvid(data_root, cache, task.size)
            else:
                data.prepare_coco(data_root, cache)
            if not args.prepare:
                study.run_task(name)
    except data.DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('stopped; the same command goes on', file=sys.stderr)
        return 130
    if args.iters is None and not args.prepare:
        # Without this, another task's failed cells would be left out.
        args.retry_failed = False
        for name in TASKS:
            study.load(name)
        args.out.mkdir(parents=True, exist_ok=True)
        # Only the pages that this call is about.
        for page in {TASKS[name].page: None for name in args.tasks}:
            file = args.out / f'{page}.md'
            file.write_text(report.render(study.results, page))
            print(f'table: {file}', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
