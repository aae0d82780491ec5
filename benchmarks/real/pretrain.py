"""The pre-trained backbone, where the data does not bring one."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.real.tasks import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = CONFIGS / 'pretrain_swin-nano_tiny-imagenet.py'


def publish(checkpoint: Path, out: Path) -> None:
    """Backbone and head of a stock checkpoint, without the optimizer.

    ``EMAHook`` saves the averaged weights as ``state_dict``. Window indices
    are left out: every library makes its own.
    """
    import torch
    state = torch.load(checkpoint, map_location='cpu', weights_only=False)
    temporary = out.with_name(out.name + '.part')
    weights = {
        key: value
        for key, value in state['state_dict'].items()
        if not key.endswith('relative_position_index')
    }
    torch.save(
        dict(state_dict=weights, meta=dict(config=CONFIG.name)), temporary)
    os.replace(temporary, out)


def pretrain(images: Path, out: Path, options=()) -> None:
    """Trains the backbone on Tiny ImageNet-100, resuming where it stopped.

    Args:
        images (Path): Folder with ``train`` and ``val``.
        out (Path): The checkpoint to write.
        options (Sequence[str]): More ``--cfg-options``.
    """
    work_dir = out.parent / 'pretrain'
    print(
        f'pre-training a Swin on {images}, about an hour on two cores',
        flush=True)
    overrides = [
        f'{loader}.dataset.data_root={images}'
        for loader in ('train_dataloader', 'val_dataloader')
    ]
    subprocess.run([
        sys.executable,
        str(ROOT / 'tools' / 'train.py'),
        str(CONFIG), '--work-dir',
        str(work_dir), '--resume', '--cfg-options', *overrides, *options
    ],
                   check=True,
                   cwd=ROOT)
    last = (work_dir / 'last_checkpoint').read_text().strip()
    publish(Path(last), out)
