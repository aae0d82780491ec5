"""Measure the demo's trained models, all in one process."""
import contextlib
import io
import statistics
import time
from functools import partial
from typing import Dict, List

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS

from mmpeft.engine.measure import kept_by_forward

BATCH_SIZE = 8
STEPS = 7


def fixed_batch(cfg: Config, model: torch.nn.Module) -> Dict:
    """The first training images, the same for every method."""
    from mmengine.dataset import pseudo_collate
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    np.random.seed(0)
    samples = [dataset[i % len(dataset)] for i in range(BATCH_SIZE)]
    return model.data_preprocessor(pseudo_collate(samples), True)


def loss_of(model: torch.nn.Module, batch: Dict) -> torch.Tensor:
    """The training loss, with the same draws at every call."""
    torch.manual_seed(0)
    np.random.seed(0)
    return model.parse_losses(model(**batch, mode='loss'))[0]


def saved_bytes(model: torch.nn.Module, batch: Dict) -> int:
    """Bytes that one training forward keeps for the backward.

    Every storage it makes that is alive behind it, whoever holds it. Another
    machine gives the same number.
    """
    model.train()
    loss_of(model, batch)
    return kept_by_forward(partial(loss_of, model), batch).saved


def step_seconds(models: List[torch.nn.Module],
                 batches: List[Dict]) -> List[float]:
    """CPU seconds of a training step on one core, median over steps.

    The models take turns, and time spent on other programs does not count:
    on a busy machine the clock would measure the others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizers = []
    for model in models:
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(trained, lr=0.))
    times: List[List[float]] = [[] for _ in models]
    for _ in range(STEPS + 1):
        for i, (model, batch) in enumerate(zip(models, batches)):
            began = time.process_time()
            optimizers[i].zero_grad()
            loss_of(model, batch).backward()
            optimizers[i].step()
            times[i].append(time.process_time() - began)
    torch.set_num_threads(threads)
    return [statistics.median(t[1:]) for t in times]
