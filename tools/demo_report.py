"""Measure the demo's models, and write its table and its picture."""
import contextlib
import io
import json
import statistics
import time
from argparse import Namespace
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from demo_measure import BATCH_SIZE, fixed_batch, saved_bytes, step_seconds
from demo_picture import ROWS, draw, ground_truth
from demo_predict import build, image_files, predict
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

import mmpeft

#: More columns than these make a picture that nobody can read.
PICTURED = 6


def measure(configs: Sequence[str], checkpoints: Sequence[str],
            files: Sequence[Path],
            pictured: int) -> Tuple[List[Dict], List[List[Dict]]]:
    """Counts, memory, time and predictions of trained models.

    LoRA predicts all ``files``, to be compared with its merged form; the
    others those that are ``pictured``.
    """
    cfgs = [Config.fromfile(config) for config in configs]
    with contextlib.redirect_stdout(io.StringIO()):  # notes of imports
        models = [build(cfg.model, c) for cfg, c in zip(cfgs, checkpoints)]
    found = [
        predict(model, files if 'lora' in config else files[:pictured])
        for model, config in zip(models, configs)
    ]
    batches = [fixed_batch(cfg, model) for cfg, model in zip(cfgs, models)]
    rows = []
    for model, batch in zip(models, batches):
        counts = mmpeft.count_params(model)
        names = ('backbone_trainable', 'backbone_total', 'model_trainable')
        rows.append(
            dict({name: counts[name]
                  for name in names},
                 saved_bytes=saved_bytes(model, batch)))
    for row, seconds in zip(rows, step_seconds(models, batches)):
        row['step_cpu_seconds'] = seconds
    return rows, found


def _spread(values: List[float], digits: int) -> str:
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' ± {statistics.stdev(values):.{digits}f}'
    return text


def _ppt(result: Dict) -> float:
    """The mean mask mAP, weighted by the size of what trains."""
    score = statistics.mean(100 * s['segm'] for s in result['runs'])
    return score * mmpeft.ppt_factor(result['backbone_trainable'])


def table_rows(results: List[Dict]) -> Tuple[List[str], List[List[str]]]:
    """Header and cells, one row per method."""
    header = [
        'Method', 'Trains in backbone', '%', 'Box mAP', 'Mask mAP', 'PPT',
        'CPU s / step', 'Kept for backward'
    ]
    rows = []
    for r in results:
        share = 100 * r['backbone_trainable'] / r['backbone_total']
        rows.append([
            r['name'], f'{r["backbone_trainable"]:,}', f'{share:.1f}',
            _spread([100 * s['bbox'] for s in r['runs']], 1),
            _spread([100 * s['segm'] for s in r['runs']],
                    1), f'{_ppt(r):.1f}', f'{r["step_cpu_seconds"]:.2f}',
            f'{r["saved_bytes"] / 2**20:.0f} MiB'
        ])
    return header, rows


def write_table(results: List[Dict], caption: str, out: Path,
                console: Console) -> None:
    """Prints the table and writes it as Markdown."""
    header, rows = table_rows(results)
    table = Table(caption=caption, caption_justify='left')
    for i, name in enumerate(header):
        table.add_column(name, justify='right' if i else 'left')
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [header, ['---'] + ['--:'] * (len(header) - 1), *rows]
    text = '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
    out.write_text(f'{text}\n\n{caption}\n')


def difference(first: List[Dict], second: List[Dict]) -> Dict:
    """Largest differences between two sets of predictions.

    ``other_objects`` counts images whose lists of labels differ; rounding can
    do that to a detection at the threshold of score or overlap.
    """
    found = dict(
        images=len(first), other_objects=0, boxes=0., scores=0., mask_pixels=0)
    for a, b in zip(first, second):
        if a['labels'].tolist() != b['labels'].tolist():
            found['other_objects'] += 1
        elif len(a['labels']):
            for name in ('boxes', 'scores'):
                found[name] = max(found[name],
                                  float(np.abs(a[name] - b[name]).max()))
            found['mask_pixels'] += int((a['masks'] != b['masks']).sum())
    return found


def report(args: Namespace, runs: Dict[str, List[Dict]], names: Dict[str, str],
           configs: Dict[str, str], data: str, source: Dict,
           merged: Optional[Dict], began: float, console: Console) -> None:
    """Measures the trained models; writes table, picture and JSON.

    Args:
        args (Namespace): Of ``demo.py``.
        runs (dict): Results of the trainings by method, one per seed.
        names (dict): What a method is called.
        configs (dict): Config by method.
        data (str): Folder of the embedded data.
        source (dict): Result of the source training.
        merged (dict, optional): Predictions and scores of the merged LoRA.
        began (float): When the demo was started, seconds.
        console (Console): Where the table goes.
    """
    annotations = f'{data}/target_val.json'
    files = image_files(annotations, f'{data}/images/target_val')
    checkpoints = [own[0]['checkpoint'] for own in runs.values()]
    rows, found = measure([configs[m] for m in runs], checkpoints, files, ROWS)
    results, columns, check = [], [], None
    for method, row, its in zip(runs, rows, found):
        results.append(dict(name=names[method], runs=runs[method], **row))
        columns.append((f'{names[method]}, mask mAP '
                        f'{100 * runs[method][0]["segm"]:.1f}', its[:ROWS]))
        if method == 'lora' and merged:
            check = dict(
                difference(its, merged['results']), **merged['scores'])
    seeds = list(range(args.seed, args.seed + args.seeds))
    heads = results[0]['model_trainable'] - results[0]['backbone_trainable']
    caption = (f'Seeds {seeds}, target validation. Neck and heads ({heads:,} '
               'parameters) start fresh and train in every row. PPT: of mask '
               'mAP. CPU s / step '
               'and kept for backward: a step on one core, and what is alive '
               f'behind its forward, batch {BATCH_SIZE}, whole detector.')
    if args.fast:
        caption = f'A smoke test (--fast), meaningless numbers. {caption}'
    write_table(results, caption, args.work_dir / 'table.md', console)
    if check:
        console.print(
            '  LoRA merged, in the stock model without mmpeft: box mAP '
            f'{100 * check["bbox"]:.1f}, mask mAP {100 * check["segm"]:.1f}. '
            f'{check["images"] - check["other_objects"]} of {check["images"]} '
            'images give the same objects as before merging; their scores '
            f'differ by at most {check["scores"]:.1e}, their boxes by '
            f'{check["boxes"]:.1e} pixels, their masks in '
            f'{check["mask_pixels"]} pixels.')
    truth, classes = ground_truth(annotations, ROWS)
    draw(truth, columns[:PICTURED], files[:ROWS], classes,
         args.work_dir / 'predictions.png')
    facts = dict(
        source=source,
        seeds=seeds,
        fast=args.fast,
        torch=torch.__version__,
        mmpeft=mmpeft.__version__,
        target=results,
        merged_lora=check)
    (args.work_dir / 'results.json').write_text(json.dumps(facts, indent=2))
    console.print(
        '  table.md, results.json and predictions.png are in '
        f'{args.work_dir}; {(time.time() - began) / 60:.1f} minutes.')
