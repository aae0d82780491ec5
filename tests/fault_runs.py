"""What test_faults starts in processes of their own, and kills there.

Named to a fork server, which imports it once: each of these processes starts
in a moment.
"""
import builtins
import errno
import os
import random
import signal
import sys
from argparse import Namespace

import mmseg.utils
import segmentor
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

import mmpeft.engine.hooks  # noqa: F401
from mmpeft.cli import run
from mmpeft.engine.merge import merge_checkpoint
from mmpeft.engine.run import build_runner, prepare
from mmpeft.registry import METHODS, SITE_MAPS

ITERS = 6
# All that a run imports.
mmseg.utils.register_all_modules(init_default_scope=False)
for registry in (METHODS, SITE_MAPS):
    registry.import_from_location()


class Writes:
    """Counts what is written below a folder, and at a byte acts.

    Args:
        folder (str): Writes elsewhere are let alone.
        at (int): The byte.
        act (callable): Called before that byte is written.
    """

    def __init__(self, folder, at, act):
        self.folder, self.left, self.act = folder, at, act
        self.open = builtins.open
        builtins.open = self

    def __call__(self, file, mode='r', *args, **kwargs):
        opened = self.open(file, mode, *args, **kwargs)
        path = os.path.abspath(str(file))
        data = path.endswith(('.tmp', '.pth', '.safetensors', '_checkpoint'))
        if 'w' in mode and data and path.startswith(self.folder):
            return _Counted(opened, self)
        return opened


class _Counted:

    def __init__(self, file, writes):
        self.file, self.writes = file, writes

    def write(self, data):
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        if size > self.writes.left:
            self.file.write(data[:self.writes.left])
            self.file.flush()
            self.writes.act()
        self.writes.left -= size
        return self.file.write(data)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)

    def __getattr__(self, name):
        return getattr(self.file, name)


def die():
    """As kill -9 does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    """As a full disk does it."""
    raise OSError(errno.ENOSPC, 'No space left on device')


def at_byte(folder, byte, act):
    """Let something happen at a byte of what is written."""
    if byte is not None:
        Writes(os.path.abspath(folder), byte, act)


def quiet():
    """Loggers and threads as in a fresh process."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    MMLogger._instance_dict.clear()
    # To lay out the text of the config, for each checkpoint, takes longer
    # than all the rest.
    Config.pretty_text = property(lambda self: repr(self.to_dict()))


def train(config, folder, byte=None, act=die, limit=None):
    """``tools/train.py CONFIG --work-dir FOLDER --resume``."""
    sys.argv = ['train.py']
    quiet()
    at_byte(folder, byte, act)
    if limit is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    random.seed(os.getpid())  # a resumed run has to bring its own numbers
    torch.manual_seed(os.getpid())
    args = Namespace(
        config=config,
        method=None,
        at=None,
        base=None,
        cfg_options=[],
        launcher='none',
        work_dir=folder,
        no_validate=False,
        amp=False,
        auto_scale_lr=False,
        resume='auto',
        lr_scale=1.,
        no_pin_memory=False,
        no_persistent_workers=False)
    run(lambda: build_runner(prepare(args)).train())


def merge(config, checkpoint, out, byte=None, act=die):
    """``tools/merge_peft.py CONFIG CHECKPOINT OUT --force``."""
    sys.argv = ['merge_peft.py']
    quiet()
    at_byte(os.path.dirname(out), byte, act)
    args = Namespace(
        config=config,
        checkpoint=checkpoint,
        out=out,
        method=None,
        at=None,
        base=None,
        force=True,
        cfg_options=[])
    run(lambda: merge_checkpoint(args))


def write_config(folder, base, keep='both', method='Mona:dim=4,drop_rate=0.5'):
    """Config of a run with everything that has to be resumed."""
    cfg = segmentor.config(
        method, iters=ITERS, init_cfg=dict(type='Pretrained', checkpoint=base))
    cfg.pop('work_dir')
    cfg.custom_imports = dict(imports=['mmpeft', 'segmentor'])
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_dataloader.batch_size = 2
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=.01)
    cfg.param_scheduler = [
        dict(type='PolyLR', eta_min=0, begin=0, end=ITERS, by_epoch=False)
    ]
    cfg.custom_hooks = [dict(type='EMAHook', momentum=.3)]
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=2)
    cfg.default_hooks.peft_checkpoint = dict(
        type='mmpeft.PEFTCheckpointHook', keep=keep)
    path = os.path.join(folder, f'{keep}.py')
    cfg.dump(path)
    return path
