"""A hook that writes what a run of a benchmark was like."""
import json
import os
import os.path as osp
import resource
import time
from statistics import median
from typing import Optional

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader

from ..counting import count_params
from ..delta_parts import unwrap
from ..registry import HOOKS
from ..whole_file import whole_file

__all__ = ['CellRecordHook']


@HOOKS.register_module()
class CellRecordHook(Hook):
    """Write seconds per step, parameter counts and metrics to a JSON file.

    The machine may be shared, so besides the wall clock it takes the CPU
    time of the process: with one thread and the data loaded in the process,
    that is what a step costs on an idle core.

    Args:
        out (str, optional): The file to write. Defaults to ``record.json``
            in the work_dir.
        checkpoint (str, optional): The pre-trained backbone; before
            training, its tensors are compared with those of the model.
            Defaults to None.
    """

    # After the hooks that may still change a metric or a weight.
    priority = 'LOWEST'

    def __init__(self,
                 out: Optional[str] = None,
                 checkpoint: Optional[str] = None) -> None:
        self.out = out
        self.checkpoint = checkpoint
        self.cpu: list = []
        self.wall: list = []
        self.metrics: dict = {}
        self.base: dict = {}

    def before_train(self, runner) -> None:
        if self.checkpoint is not None:
            self._compare(unwrap(runner.model).backbone.state_dict())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start = self._now()

    def _compare(self, own: dict) -> None:
        base = CheckpointLoader.load_checkpoint(self.checkpoint, 'cpu')
        base = {
            key[len('backbone.'):]: value
            for key, value in base['state_dict'].items()
            if key.startswith('backbone.')
        }
        self.base = dict(
            tensors=len(base),
            differ=[
                key for key, value in base.items()
                if key not in own or not torch.equal(own[key].cpu(), value)
            ],
            new=[
                key for key in own if key not in base and '.peft.' not in key
            ])

    @staticmethod
    def _now() -> tuple:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def after_train_iter(self,
                         runner,
                         batch_idx: int,
                         data_batch=None,
                         outputs=None) -> None:
        # From the end of one step to the end of the next: data included.
        now = self._now()
        self.cpu.append(now[0] - self.start[0])
        self.wall.append(now[1] - self.start[1])
        self.start = now

    def after_val_epoch(self, runner, metrics: Optional[dict] = None) -> None:
        # numpy numbers are not JSON.
        self.metrics = {k: float(v) for k, v in (metrics or {}).items()}

    def after_train(self, runner) -> None:
        if not self.metrics and runner.val_loop is not None:
            # Resumed behind the last step, where no loop validates.
            runner.val_loop.run()
        if not is_main_process():
            return
        model = unwrap(runner.model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        counts = count_params(model)
        record = dict(
            metrics=self.metrics,
            cpu_s_per_step=median(self.cpu) if self.cpu else None,
            wall_s_per_step=median(self.wall) if self.wall else None,
            steps=len(self.cpu),
            backbone_trainable=counts['backbone_trainable'],
            model_trainable=counts['model_trainable'],
            model_total=counts['model_total'],
            finite=all(bool(torch.isfinite(p).all()) for p in trainable),
            base=self.base,
            threads=torch.get_num_threads(),
            cores=os.cpu_count(),
            device=torch.cuda.get_device_name()
            if torch.cuda.is_available() else 'cpu',
            peak_bytes=torch.cuda.max_memory_allocated()
            if torch.cuda.is_available() else None,
            torch=torch.__version__,
            # Kibibytes on Linux.
            max_rss_bytes=1024 *
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        out = self.out or osp.join(runner.work_dir, 'record.json')
        with whole_file(out) as temporary, open(temporary, 'w') as file:
            json.dump(record, file, indent=1)
