"""Memory, step time and latency of the methods of a task."""
import hashlib
import json
import os
import os.path as osp
import sys
from typing import Any, Callable, Dict, List, Sequence

from ..whole_file import whole_file
from .launch import start, tool
from .plan import Task, plain_name

__all__ = ['measure_costs']

#: Columns of the table that tools/benchmark.py has, too.
COLUMNS = ('saved_bytes', 'peak_bytes', 'step_s', 'latency_s',
           'latency_merged_s')


def measure_costs(task: Task, rows: Sequence[Dict[str, Any]], folder: str,
                  tell: Callable[[str], None]) -> Dict[str, Dict[str, Any]]:
    """What the methods of a task cost, side by side in one process.

    One with options of its own, such as another head, is measured alone. What
    was measured before is read; it does not change with the seed.

    Args:
        task (Task): From the plan.
        rows (Sequence[dict]): Of its final cells that are done.
        folder (str): Of the results.
        tell (Callable): Gets what is not measured, and why.

    Returns:
        dict[str, dict]: Name of a method -> columns. A method that cannot be
        measured has none.
    """
    own = task.method_options
    groups = {
        f'costs_{task.name}': [r for r in rows if r['method'] not in own]
    }
    for row in rows:
        if row['method'] in own:
            name = f'costs_{task.name}_{plain_name(row["method"])}'
            groups.setdefault(name, []).append(row)
    costs: Dict[str, Dict[str, Any]] = {}
    for name, group in groups.items():
        if group:
            costs.update(_of_group(task, group, folder, name, tell))
    return costs


def _of_group(task: Task, rows: Sequence[Dict[str, Any]], folder: str,
              name: str, tell: Callable[[str],
                                        None]) -> Dict[str, Dict[str, Any]]:
    """Costs of methods that share a config."""
    import torch
    specs = {row['method']: row['spec'] for row in rows}
    config = osp.join(folder, rows[0]['work_dir'], 'cell.py')
    device = 'cuda:0' if torch.cuda.is_available() else 'cpu'
    height, width = task.costs['image_size']
    arguments = [
        config, '--image-size',
        str(height),
        str(width), '--batch-size',
        str(task.costs.get('batch_size', 2)), '--repeats',
        str(task.costs.get('repeats', 5)), '--device', device, '--json'
    ]
    if device == 'cpu':
        # Whatever else runs on the machine.
        arguments += ['--clock', 'cpu']
    if task.costs.get('backbone_only'):
        arguments += ['--backbone-only']
    if task.at:
        arguments += ['--at', task.at]
    content = json.dumps([sorted(specs.items()), arguments[1:], device])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    file = osp.join(folder, f'{name}.json')
    try:
        with open(file) as found:
            kept = json.load(found)
        if kept['digest'] == digest:
            return kept['costs']
    except (OSError, ValueError, KeyError):
        pass
    costs = _benchmark(specs, arguments, file)
    if isinstance(costs, str) and len(specs) > 1:
        # One that cannot be measured leaves the others alone.
        together, costs = costs, {}
        for method, spec in specs.items():
            alone = _benchmark({method: spec}, arguments, file)
            if isinstance(alone, str):
                tell(f'{task.name}, {method}: costs are not measured: '
                     f'{alone or together}')
            else:
                costs.update(alone)
    elif isinstance(costs, str):
        tell(f'{task.name}: costs are not measured: {costs}')
        costs = {}
    with whole_file(file) as temporary, open(temporary, 'w') as out:
        json.dump(dict(digest=digest, costs=costs), out, indent=1)
    return costs


def _benchmark(specs: Dict[str, str], arguments: List[str], file: str) -> Any:
    """Columns by method, or why there are none."""
    chosen = [f'--method={spec}' for spec in specs.values()]
    out, log = file + '.out', file + '.log'
    open(out, 'w').close()
    command = [sys.executable, tool('benchmark.py'), *arguments, *chosen]
    status = start(command, log, {}, out=out).wait()
    if status:
        with open(log, errors='replace') as said:
            lines = [line.strip() for line in said if line.strip()]
        return (lines or ['it said nothing'])[-1].replace('Error: ', '')
    with open(out) as found:
        rows = {row['method']: row for row in json.load(found)}
    os.remove(out)
    os.remove(log)
    return {
        method: {
            name: rows[spec][name]
            for name in COLUMNS
        }
        for method, spec in specs.items()
    }
