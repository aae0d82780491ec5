"""Runs one cell: its config, ``tools/train.py``, its result as JSON."""

import datetime
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from benchmarks.real.data import camvid_folder
from benchmarks.real.halves import evaluate_halves
from benchmarks.real.plan import Cell
from benchmarks.real.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Places:
    """Where things are.

    Args:
        data_root (Path): The data as downloaded.
        cache (Path): Prepared data, cells and results.
        checkpoints (dict): The pre-trained backbones, by name.
    """

    data_root: Path
    cache: Path
    checkpoints: dict[str, Path]

    def folder(self, cell: Cell) -> Path:
        return self.cache / 'cells' / cell.name


CONFIG = """\
_base_ = {base!r}
custom_imports = dict(
    imports=['mmpeft', 'mmpeft.bench.record_hook'],
    allow_failed_imports=False)
model = dict(backbone=dict(init_cfg=dict(checkpoint={checkpoint!r})))
train_dataloader = dict(dataset=dict({train}))
val_dataloader = dict(dataset=dict({val}))
test_dataloader = val_dataloader
{evaluator}
optim_wrapper = dict({optim})
randomness = dict(seed={seed})
{length}
default_hooks = dict(checkpoint=dict({keep}))
custom_hooks = [
    dict(type='mmpeft.CellRecordHook', out={out!r}, checkpoint={checkpoint!r})
]
"""


def _stretched(cell: Cell) -> str:
    """The schedule of the task, longer but for the warm-up."""
    from mmengine.config import Config

    import mmpeft  # noqa: F401 (makes the names mmseg::… resolve)
    cfg = Config.fromfile(
        TASKS[cell.task].config_path, import_custom_modules=False)
    schedule = cfg.to_dict()['param_scheduler']
    iters = cfg.train_cfg.max_iters * cell.stretch
    schedule[-1]['end'] = iters
    return (f'train_cfg = dict(max_iters={iters}, val_interval={iters})\n'
            f'param_scheduler = {schedule!r}')


def cell_config(cell: Cell, places: Places) -> str:
    """The text of the config file of a cell: paths, rate, seed, split."""
    folder = places.folder(cell)
    evaluator = ''
    task = TASKS[cell.task]
    checkpoint = str(places.checkpoints[task.base])
    if task.size:
        data = repr(str(camvid_folder(places.cache, task.size)))
        split = 'val' if cell.phase == 'tune' else 'test'
        train = f'data_root={data}'
        val = (f"data_root={data}, data_prefix=dict(img_path='images/{split}',"
               f" seg_map_path='annotations/{split}')")
    else:
        images = repr(str(places.data_root / 'coco_mini') + '/')
        made = str(places.cache / 'coco_mini_object')
        train, val = (f'data_root={images}, '
                      f"ann_file={f'{made}/instances_{split}.json'!r}"
                      for split in ('train', 'val'))
        evaluator = ('val_evaluator = dict('
                     f"ann_file={f'{made}/instances_val.json'!r}, "
                     f"outfile_prefix={str(folder / 'coco')!r})\n"
                     'test_evaluator = val_evaluator')
    length = ''
    if cell.iters:
        length = (f'train_cfg = dict(max_iters={cell.iters}, '
                  f'val_interval={cell.iters})')
    if cell.stretch != 1:
        length += _stretched(cell)
    optim = f'optimizer=dict(lr={cell.lr!r})'
    if cell.head_mult != 1:
        # Substrings of the names of all that is not the backbone.
        parts = ', '.join(f'{part}=dict(lr_mult={cell.head_mult!r})'
                          for part in ('neck', 'head'))
        optim += f', paramwise_cfg=dict(custom_keys=dict({parts}))'
    # Only the reported runs keep their weights.
    keep = '' if cell.phase == 'final' else 'interval=10**9, save_last=False'
    return CONFIG.format(
        base=str(task.config_path),
        checkpoint=checkpoint,
        train=train,
        val=val,
        evaluator=evaluator,
        optim=optim,
        seed=cell.seed,
        length=length,
        keep=keep,
        out=str(folder / 'record.json'))


def cell_command(cell: Cell, places: Places) -> list:
    folder = places.folder(cell)
    return [
        sys.executable,
        str(ROOT / 'tools' / 'train.py'),
        str(folder / 'cell.py'), '--method',
        TASKS[cell.task].methods[cell.method], '--work-dir',
        str(folder / 'run')
    ]


def read_result(cell: Cell, places: Places) -> Optional[dict]:
    """The cached result, if it belongs to the config as it is now."""
    file = places.folder(cell) / 'result.json'
    try:
        result = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return result if result.get('digest') == cell.digest() else None


def _why(log: Path) -> str:
    lines = [
        line.strip() for line in log.read_text(errors='replace').splitlines()
        if line.strip()
    ]
    return lines[-1][:300] if lines else 'no output'


def _measured(cell: Cell, places: Places) -> dict:
    """Metrics and costs of a finished run, checked."""
    folder = places.folder(cell)
    record = json.loads((folder / 'record.json').read_text())
    base = record['base']
    if base['differ']:
        raise ValueError(f"{len(base['differ'])} of {base['tensors']} "
                         'pre-trained tensors were not in the model when '
                         f"training began, e.g. {base['differ'][0]}")
    if not record['finite']:
        raise ValueError('a trained weight is not finite: training diverged')
    if TASKS[cell.task].size:
        scores = {
            cell.phase: {
                key: float(record['metrics'][key])
                for key in ('mIoU', 'aAcc', 'mAcc')
            }
        }
    else:
        scores = evaluate_halves(
            places.cache / 'coco_mini_object' / 'instances_val.json',
            str(folder / 'coco'))
    return dict(record, **scores)


def ppt(metric: float, trainable: int) -> float:
    """``metric * exp(-log10(P / 1e7 + 1))`` of V-PETL Bench, P in the
    backbone."""
    return metric * math.exp(-math.log10(trainable / 1e7 + 1))


def run_cell(cell: Cell, places: Places, running: dict) -> Optional[dict]:
    """Runs a cell from its start and writes its result.

    Args:
        cell (Cell): What to run.
        places (Places): Where.
        running (dict): Gets the process while it runs, so that the caller
            can stop it; a run that was stopped leaves no result.

    Returns:
        dict: The result, with ``status`` 'done', or 'failed' and ``reason``.
        None if it was stopped.
    """
    folder = places.folder(cell)
    # A killed cell is minutes old at most: it starts again.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / 'cell.py').write_text(cell_config(cell, places))
    threads = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), '1')
    paths = [str(ROOT)]
    if os.environ.get('PYTHONPATH'):
        paths.append(os.environ['PYTHONPATH'])
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), **threads)
    log = folder / 'train.log'
    with open(log, 'w') as output:
        process = subprocess.Popen(
            cell_command(cell, places),
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL)
    running[cell.name] = process
    code = process.wait()
    running.pop(cell.name, None)
    if code in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL):
        return None
    result = dict(
        asdict(cell),
        digest=cell.digest(),
        status='done',
        date=datetime.datetime.now(
            datetime.timezone.utc).isoformat(timespec='seconds'))
    try:
        if code:
            raise ValueError(f'tools/train.py ended with {code}: {_why(log)}')
        result.update(_measured(cell, places))
    except (ValueError, KeyError, OSError) as error:
        result.update(status='failed', reason=str(error))
    temporary = folder / 'result.part'
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, folder / 'result.json')
    return result
