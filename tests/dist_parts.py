"""Runs on several ranks that are compared with one process.

    torchrun dist_parts.py FOLDER START

In a config by ``custom_imports``; also a script for torchrun, which trains
with each of FEATURES in one process group.
"""
import contextlib
import os
import os.path as osp
import sys
import traceback

import segmentor
import torch
from conftest import perturb
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS, DefaultScope
from mmseg.models import EncoderDecoder

from mmpeft.cli import leave_ranks
from mmpeft.engine.hooks import peft_checkpoint_hook
from mmpeft.engine.run import add_hooks, build_runner

METHOD = 'LoRA:rank=4+Mona:dim=4,drop_rate=0'


@MODELS.register_module(force=True)
class DoubleSegmentor(EncoderDecoder):
    """In float64, where sums in another order agree in 14 digits: what is left
    between one process and several is a mistake, on any CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.double()


@OPTIM_WRAPPERS.register_module(force=True)
class BFloat16OptimWrapper(OptimWrapper):
    """What AmpOptimWrapper does on a GPU, for a CPU."""

    @contextlib.contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast(
                'cpu', torch.bfloat16):
            yield


@HOOKS.register_module(force=True)
class RecordHook(Hook):
    """Writes what a rank has trained, with which gradients, to
    ``rank*.pth``."""
    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.model = runner.model
        if is_model_wrapper(self.model):
            self.model = self.model.module
        self.names = {id(p): n for n, p in self.model.named_parameters()}
        self.first = self._weights()
        self.gradients, self.losses, self.deltas = [], [], []
        self.optimizer = runner.optim_wrapper.optimizer
        self.optimizer.register_step_pre_hook(self._before_step)
        self.save_delta = peft_checkpoint_hook.save_delta
        peft_checkpoint_hook.save_delta = self._save_delta

    def _weights(self):
        return {k: v.clone() for k, v in self.model.state_dict().items()}

    def _before_step(self, *args):
        self.gradients.append({
            n: p.grad.clone()
            for n, p in self.model.named_parameters() if p.grad is not None
        })

    def _save_delta(self, model, path, **kwargs):
        self.deltas.append(osp.basename(path))
        return self.save_delta(model, path, **kwargs)

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(outputs['loss'].item())

    def after_train(self, runner):
        peft_checkpoint_hook.save_delta = self.save_delta
        averages = [
            hook.ema_model.state_dict() for hook in runner.hooks
            if isinstance(hook, EMAHook)
        ]
        seen = dict(
            first=self.first,
            weights=self._weights(),
            averages=averages[0] if averages else {},
            gradients=self.gradients,
            losses=self.losses,
            deltas=self.deltas,
            with_cp=any(
                getattr(m, 'with_cp', False) for m in self.model.modules()),
            trained=sorted(n for n, p in self.model.named_parameters()
                           if p.requires_grad),
            with_state=sorted(self.names[id(p)] for p in self.optimizer.state))
        torch.save(seen, osp.join(runner.work_dir, f'rank{runner.rank}.pth'))


def config(work_dir, batch_size, method=METHOD, **changes):
    """A run of a segmentor that draws no random number."""
    cfg = segmentor.config(
        method, str(work_dir), batch_size=batch_size, allow_random_base=True)
    cfg.model.type = 'DoubleSegmentor'
    cfg.optim_wrapper.optimizer.update(lr=.1, momentum=.9)
    cfg.custom_hooks = [dict(type='RecordHook')]
    cfg.custom_imports = dict(imports=['segmentor', 'dist_parts'])
    cfg.launcher = 'none'
    cfg.merge_from_dict(changes)
    return cfg


def write_start(path):
    """Weights to load, where no zero hides a mistake."""
    cfg = config(osp.dirname(path), 1)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    torch.manual_seed(3)
    model.init_weights()
    perturb(model, only='')
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


# Parameters of FSDP on the CPU; its default of a full state moves them there
# once more, and torch 2.11 dies of a segmentation fault then, without mmpeft
# as well.
FULL = dict(
    state_dict_type='FULL_STATE_DICT',
    state_dict_config=dict(
        type='FullStateDictConfig', offload_to_cpu=False, rank0_only=False),
    optim_state_dict_config=dict(
        type='FullOptimStateDictConfig',
        offload_to_cpu=False,
        rank0_only=False))
FSDP = dict(
    type='FSDPStrategy',
    state_dict_cfg=FULL,
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        use_orig_params=True,
        device_id='cpu'))
SHARDS = dict(
    runner_type='FlexibleRunner',
    env_cfg=dict(dist_cfg=dict(backend='gloo')),
    strategy=FSDP)
#: What changes in a config.
FEATURES = dict(
    accumulation={'optim_wrapper.accumulative_counts': 2},
    with_cp={'model.backbone.with_cp': True},
    ema={
        'custom_hooks':
        [dict(type='RecordHook'),
         dict(type='EMAHook', momentum=.3)]
    },
    # autocast leaves float64 alone
    bfloat16={
        'model.type': 'EncoderDecoder',
        'optim_wrapper.type': 'BFloat16OptimWrapper'
    },
    supernet={
        'model.backbone.method':
        'NOAH:num_tokens=4,rank=4,dim=4,drop_rate=0',
        'custom_hooks': [
            dict(type='RecordHook'),
            dict(
                type='mmpeft.SubnetHook',
                num_tokens=(1, 4),
                rank=(1, 4),
                dim=(1, 4))
        ]
    },
    fsdp=SHARDS,
    fsdp_delta={
        **SHARDS, 'default_hooks.peft_checkpoint':
        dict(type='mmpeft.PEFTCheckpointHook', keep='delta')
    })


def main():
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    for name, changes in FEATURES.items():
        work_dir = osp.join(sys.argv[1], name)
        cfg = config(work_dir, 2, load_from=sys.argv[2], **changes)
        add_hooks(cfg)
        cfg.launcher = 'pytorch'
        try:
            build_runner(cfg).train()
        except Exception:
            os.makedirs(work_dir, exist_ok=True)
            with open(osp.join(work_dir, 'error.txt'), 'w') as file:
                file.write(traceback.format_exc())
    leave_ranks()


if __name__ == '__main__':
    main()
