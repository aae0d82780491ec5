"""Run the demo's long steps as subprocesses, with progress bars."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from rich.console import Console
from rich.progress import (BarColumn, Progress, SpinnerColumn, TextColumn,
                           TimeElapsedColumn, TimeRemainingColumn)

ROOT = Path(__file__).resolve().parent.parent
# As mmengine's LoggerHook writes them: epoch, iteration / iterations.
TRAINED = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]')
VALIDATING = re.compile(r'Epoch\(val\)|Saving checkpoint')


class StepError(RuntimeError):
    """A step failed; the message holds the last lines of its log."""


@dataclass
class Step:
    """One subprocess whose result is kept until its key changes.

    Args:
        title (str): What the progress bar shows.
        command (list[str]): The command, run in the checkout.
        folder (Path): For the log and ``done.json``; emptied at the start.
        key (str): Identifies all that the result depends on.
        epochs (int): Epochs of a training, for the bar; 0 if it is none.
        collect (Callable): Folder -> result, kept in ``done.json``.
    """
    title: str
    command: List[str]
    folder: Path
    key: str
    collect: Callable[[Path], Dict]
    epochs: int = 0
    process: Optional[subprocess.Popen] = field(default=None, init=False)
    started: float = field(default=0., init=False)

    @property
    def log(self) -> Path:
        return self.folder / 'log.txt'

    def result(self) -> Optional[Dict]:
        """The result, or None if it has to be made."""
        try:
            done = json.loads((self.folder / 'done.json').read_text())
        except (OSError, ValueError):
            return None
        return done['result'] if done['key'] == self.key else None

    def start(self) -> None:
        """Starts the command in an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        # One thread each: threads that wait for each other in a busy loop
        # make two runs on two cores several times slower.
        env = dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
        self.started = time.time()
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def finish(self) -> Dict:
        """Keeps the result of an ended command, or raises StepError."""
        if self.process.returncode:
            lines = self.log.read_text(errors='replace').splitlines()
            raise StepError('\n'.join([
                f'{self.title} failed with status {self.process.returncode}; '
                f'the last lines of {self.log}:', *lines[-15:]
            ]))
        result = dict(
            self.collect(self.folder), seconds=time.time() - self.started)
        (self.folder / 'done.json').write_text(
            json.dumps(dict(key=self.key, result=result), indent=2))
        return result

    def progress(self) -> Tuple[int, Optional[int], str]:
        """Iterations done, iterations in all if known, and what it does."""
        text = self.log.read_text(errors='replace')
        found = TRAINED.findall(text)
        if not found:
            return 0, None, 'starting' if self.epochs else 'running'
        epoch, iteration, length = map(int, found[-1])
        done, total = (epoch - 1) * length + iteration, self.epochs * length
        last = max(
            VALIDATING.finditer(text), key=lambda m: m.start(), default=None)
        done_training = done >= total or last
        return done, total, 'validating' if done_training else 'training'


def run_steps(steps: List[Step], jobs: int, console: Console) -> List[Dict]:
    """Runs steps, ``jobs`` at a time; skips those whose result is there.

    Returns:
        list[dict]: Their results, in the order of ``steps``.

    Raises:
        StepError: If one fails; the others are stopped.
    """
    waiting = [step for step in steps if step.result() is None]
    for step in steps:
        if step not in waiting:
            console.print(f'  {step.title}: done before, kept.')
    if not waiting:
        return [step.result() for step in steps]
    running: Dict[int, Step] = {}
    bars = Progress(
        SpinnerColumn(),
        TextColumn('  {task.description:<22}'),
        BarColumn(bar_width=24),
        TextColumn('{task.fields[iterations]:>10}'),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'),
        console=console)
    tasks = {
        id(step):
        bars.add_task(
            step.title, total=None, start=False, iterations='', note='waiting')
        for step in waiting
    }
    # The last printed tenth of each step, for a log that is not a terminal.
    told = {id(step): -1 for step in waiting}
    # A terminated demo must not leave its trainings running.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with bars:
            while waiting or running:
                while waiting and len(running) < jobs:
                    step = waiting.pop(0)
                    step.start()
                    running[id(step)] = step
                    bars.start_task(tasks[id(step)])
                time.sleep(.5)
                for key, step in list(running.items()):
                    done, total, note = step.progress()
                    if step.process.poll() is not None:
                        step.finish()
                        del running[key]
                        total, note = total or 1, 'done'
                        done = total
                    bars.update(
                        tasks[key],
                        completed=done,
                        total=total,
                        note=note,
                        iterations=f'{done}/{total} it'
                        if step.epochs and total else '')
                    tenth = done * 10 // total if total else 0
                    if not console.is_terminal and tenth != told[key]:
                        told[key] = tenth
                        console.print(f'  {step.title}: {note}, '
                                      f'{done}/{total or "?"} iterations')
    finally:
        for step in running.values():
            step.process.terminate()
        for step in running.values():
            step.process.wait()
        signal.signal(signal.SIGTERM, previous)
    return [step.result() for step in steps]


def collect_training(folder: Path) -> Dict:
    """mAP of the last validation and the time of an iteration."""
    newest = max(folder.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for line in newest.read_text().splitlines()]
    # The first records hold the warm-up of the process.
    times = sorted(r['time'] for r in records if 'loss' in r)
    scores = [r for r in records if 'coco/segm_mAP' in r][-1]
    checkpoint = (folder / 'last_checkpoint').read_text().strip()
    return dict(
        bbox=scores['coco/bbox_mAP'],
        segm=scores['coco/segm_mAP'],
        step_seconds=times[len(times) // 2],
        checkpoint=checkpoint)


def train_step(title: str, config: str, folder: Path, key: str,
               options: List[str], epochs: int) -> Step:
    """The ordinary command that trains ``config``, as a step."""
    command = [
        sys.executable, 'tools/train.py', config, '--work-dir',
        str(folder), '--cfg-options', *options
    ]
    return Step(title, command, folder, key, collect_training, epochs)
