"""A hook that writes what a cell of the study measured."""

import json
import os
import resource
import time
from statistics import median
from typing import Optional

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader


@HOOKS.register_module()
class StepRecordHook(Hook):
    """Writes seconds per step, parameter counts and metrics to a JSON file.

    The machine may be shared, so besides the wall clock it takes the CPU
    time of the process: with one thread and the data loaded in the process,
    that is what a step costs on an idle core.

    Args:
        out (str): The file to write.
        checkpoint (str): The pre-trained backbone; before training, its
            tensors are compared with those of the model.
    """

    def __init__(self, out: str, checkpoint: str) -> None:
        self.out = out
        self.checkpoint = checkpoint
        self.cpu, self.wall = [], []
        self.metrics, self.base = {}, {}

    def before_train(self, runner) -> None:
        base = CheckpointLoader.load_checkpoint(self.checkpoint, 'cpu')
        base = {
            key[len('backbone.'):]: value
            for key, value in base['state_dict'].items()
            if key.startswith('backbone.')
        }
        own = runner.model.backbone.state_dict()
        self.base = dict(
            tensors=len(base),
            differ=[
                key for key, value in base.items()
                if key not in own or not torch.equal(own[key].cpu(), value)
            ],
            new=[
                key for key in own if key not in base and '.peft.' not in key
            ])
        self.start = time.process_time(), time.perf_counter()

    def after_train_iter(self,
                         runner,
                         batch_idx: int,
                         data_batch: Optional[dict] = None,
                         outputs: Optional[dict] = None) -> None:
        # From the end of one step to the end of the next: data included.
        now = time.process_time(), time.perf_counter()
        self.cpu.append(now[0] - self.start[0])
        self.wall.append(now[1] - self.start[1])
        self.start = now

    def after_val_epoch(self, runner, metrics: Optional[dict] = None) -> None:
        # numpy numbers are not JSON.
        self.metrics = {k: float(v) for k, v in (metrics or {}).items()}

    def after_train(self, runner) -> None:
        backbone = runner.model.backbone
        trainable = [p for p in runner.model.parameters() if p.requires_grad]
        record = dict(
            metrics=self.metrics,
            cpu_s_per_step=median(self.cpu),
            wall_s_per_step=median(self.wall),
            steps=len(self.cpu),
            backbone_trainable=sum(p.numel() for p in backbone.parameters()
                                   if p.requires_grad),
            model_trainable=sum(p.numel() for p in trainable),
            finite=all(bool(torch.isfinite(p).all()) for p in trainable),
            base=self.base,
            threads=torch.get_num_threads(),
            cores=os.cpu_count(),
            torch=torch.__version__,
            # Kibibytes on Linux.
            max_rss_bytes=1024 *
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        with open(self.out, 'w') as file:
            json.dump(record, file, indent=1)
