"""Measure the demo's models, and write its table and its picture."""
import contextlib
import io
import json
import statistics
import time
from argparse import Namespace
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from demo_picture import ROWS, draw, ground_truth
from demo_predict import build, image_files, predict
from mmengine.config import Config
from mmengine.registry import DATASETS
from rich.console import Console
from rich.table import Table

import mmpeft

MEMORY_BATCH = 8


def saved_bytes(model: torch.nn.Module, cfg: Config) -> int:
    """Bytes that one training forward keeps for the backward.

    Every storage autograd saves for a fixed batch, counted once; parameters
    and buffers are not counted. The same number on every machine.
    """
    from mmengine.dataset import pseudo_collate
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    np.random.seed(0)
    torch.manual_seed(0)
    batch = pseudo_collate([dataset[i] for i in range(MEMORY_BATCH)])
    model.train()
    batch = model.data_preprocessor(batch, True)
    own = {
        t.untyped_storage().data_ptr()
        for t in [*model.parameters(), *model.buffers()]
    }
    saved: Dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        # Kept alive, so that no address is used twice.
        losses = model(**batch, mode='loss')
        total = sum(saved.values())
    del losses
    model.eval()
    return total


def measure(config: str, checkpoint: str, annotations: str, images: str,
            all_images: bool) -> Tuple[Dict, List[Dict]]:
    """Counts, memory and predictions of one trained model."""
    cfg = Config.fromfile(config)
    with contextlib.redirect_stdout(io.StringIO()):  # notes of imports
        model = build(cfg.model, checkpoint)
    counts = mmpeft.count_params(model)
    found = predict(
        model,
        image_files(annotations, images, None if all_images else ROWS))
    return dict(
        backbone_trainable=counts['backbone_trainable'],
        backbone_total=counts['backbone_total'],
        model_trainable=counts['model_trainable'],
        saved_bytes=saved_bytes(model, cfg)), found


def _spread(values: List[float], digits: int) -> str:
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' ± {statistics.stdev(values):.{digits}f}'
    return text


def table_rows(results: List[Dict]) -> Tuple[List[str], List[List[str]]]:
    """Header and cells, one row per method."""
    header = [
        'Method', 'Trains in backbone', '%', 'Box mAP', 'Mask mAP',
        's / step', 'Kept for backward'
    ]
    rows = []
    for r in results:
        share = 100 * r['backbone_trainable'] / r['backbone_total']
        rows.append([
            r['name'], f'{r["backbone_trainable"]:,}', f'{share:.1f}',
            _spread([100 * s['bbox'] for s in r['runs']], 1),
            _spread([100 * s['segm'] for s in r['runs']], 1),
            _spread([s['step_seconds'] for s in r['runs']], 2),
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
        images=len(first),
        other_objects=0,
        boxes=0.,
        scores=0.,
        mask_pixels=0)
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
    annotations, images = f'{data}/target_val.json', f'{data}/images/target_val'
    results, columns, check = [], [], None
    for method, own_runs in runs.items():
        row, found = measure(configs[method], own_runs[0]['checkpoint'],
                             annotations, images, method == 'lora')
        results.append(dict(name=names[method], runs=own_runs, **row))
        columns.append((f'{names[method]}, mask mAP '
                        f'{100 * own_runs[0]["segm"]:.1f}', found[:ROWS]))
        if method == 'lora' and merged:
            check = dict(
                difference(found, merged['results']), **merged['scores'])
    seeds = list(range(args.seed, args.seed + args.seeds))
    heads = results[0]['model_trainable'] - results[0]['backbone_trainable']
    caption = (f'Seeds {seeds}; {args.jobs} run(s) at a time, one core each. '
               'Kept for backward: storages that autograd keeps for a batch of '
               f'{MEMORY_BATCH}, whole detector. Neck and heads ({heads:,} '
               'parameters) start fresh and train in every row.')
    if args.fast:
        caption = f'A smoke test (--fast), meaningless numbers. {caption}'
    write_table(results, caption, args.work_dir / 'table.md', console)
    if check:
        console.print(
            '  LoRA merged, in the stock model without mmpeft: box mAP '
            f'{100 * check["bbox"]:.1f}, mask mAP {100 * check["segm"]:.1f}. '
            f'The {check["images"]} images give the same objects as unmerged, '
            f'but for {check["other_objects"]} images; scores differ by at '
            f'most {check["scores"]:.1e}, boxes by {check["boxes"]:.1e} '
            f'pixels, masks in {check["mask_pixels"]} pixels.')
    truth, classes = ground_truth(annotations, ROWS)
    draw(truth, columns, image_files(annotations, images, ROWS), classes,
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
    console.print('  table.md, results.json and predictions.png are in '
                  f'{args.work_dir}; {(time.time() - began) / 60:.1f} minutes.')
