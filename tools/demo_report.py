"""Measure the demo's models, and write its table and its picture."""
import contextlib
import io
import statistics
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
import torch
from demo_predict import build, image_files, predict
from mmengine.config import Config
from mmengine.registry import DATASETS
from rich.console import Console
from rich.table import Table

import mmpeft

# Okabe and Ito's colours, told apart by everybody.
COLOURS = ('#E69F00', '#56B4E9', '#F0E442', '#CC79A7', '#009E73')
ROWS = 4
SCORE = 0.3
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


def draw(truth: List[Dict], columns: List[Tuple[str, List[Dict]]],
         files: List[Path], classes: List[str], out: Path) -> None:
    """Predictions beside the ground truth, one column per method."""
    import cv2
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    columns = [('Ground truth', truth), *columns]
    figure, axes = plt.subplots(
        len(files),
        len(columns),
        figsize=(2.4 * len(columns), 2.4 * len(files) + .9),
        squeeze=False)
    for row, file in zip(range(len(files)), files):
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        for axis, (title, found) in zip(axes[row], columns):
            axis.set_axis_off()
            # Grey, so that the colours of the classes stand out.
            shown = np.repeat(image.mean(2, keepdims=True), 3, 2) / 255
            shown = .35 + .6 * shown
            objects = found[row]
            for mask, label, score in zip(objects['masks'], objects['labels'],
                                          objects['scores']):
                if score >= SCORE:
                    mask = np.asarray(mask, bool)
                    colour = np.array(to_rgb(COLOURS[label]))
                    shown[mask] = .25 * shown[mask] + .75 * colour
            axis.imshow(shown, interpolation='nearest')
            for mask, label, score in zip(objects['masks'], objects['labels'],
                                          objects['scores']):
                if score >= SCORE and np.any(mask):
                    axis.contour(mask, [.5], colors='black', linewidths=.9)
            if row == 0:
                axis.set_title(title, fontsize=11)
    figure.legend(
        handles=[
            Patch(facecolor=c, edgecolor='black', label=name)
            for c, name in zip(COLOURS, classes)
        ],
        loc='lower center',
        ncol=len(classes),
        frameon=False,
        fontsize=11)
    figure.tight_layout(rect=(0, .45 / figure.get_figheight(), 1, 1), pad=.4)
    figure.savefig(out, dpi=110)
    plt.close(figure)
