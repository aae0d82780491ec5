import glob
import os
import os.path as osp
import re
from dataclasses import asdict
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from ...delta import make_header, save_delta
from ...delta_file import SUFFIX
from ...delta_parts import delta_names, missing_in, peft_states, unwrap
from ...errors import PEFTError
from ...registry import HOOKS
from ...whole_file import whole_file
from ..checkpoint import KEPT_META
from ..delta_loading import (check_whole, complete, expect_model,
                             recorded_base, register, sources_of)
from ..randomness import gather_randomness, restore_randomness

__all__ = ['PEFTCheckpointHook']


@HOOKS.register_module()
class PEFTCheckpointHook(Hook):
    """Beside every stock checkpoint, a delta: what trains, and nothing else.

    ``epoch_3.pth`` gets ``epoch_3_delta.safetensors``, and so do the best
    ones; not where all of the model trains. Where an average over time (EMA)
    is published, the delta has that. It is removed when its checkpoint is.

    Files are complete or not there at all, and an old one is deleted after
    the new one is complete; the stock hook deletes first. With
    ``max_keep_ckpts=1`` two are kept: a run that dies before
    ``last_checkpoint`` names the new one goes on from the old.

    It also lets the Runner read deltas (``load_from``, ``--resume``), and
    stores the state of the random numbers of every rank, so that a resumed
    run goes on as if it had not stopped.

    Args:
        keep (str): 'both', or 'delta': the ``.pth`` then lacks the frozen
            weights, too; to resume from it, the base must be where the
            config says. Defaults to 'both'.
        base (str, optional): File with the base of a delta that is loaded,
            if it is not where the config says. Defaults to None.

    Raises:
        PEFTError: For another value of ``keep``.
    """

    # After EMAHook has put the averages into the checkpoint.
    priority = 'LOWEST'

    def __init__(self, keep: str = 'both', base: Optional[str] = None) -> None:
        if keep not in ('both', 'delta'):
            raise PEFTError(f"keep={keep!r} is neither 'both' nor 'delta'.")
        self.keep = keep
        self.base = base
        self.sources: List[dict] = []
        self._published: Optional[Dict[str, Any]] = None
        self._gathered: list = []
        # Frozen tensors that no source has; found at the first checkpoint.
        self._extra: Optional[List[str]] = None
        self._save = None
        self._backends: List[_DeletesLater] = []

    def before_run(self, runner) -> None:
        register()
        expect_model(True)
        # Registering a hook below calls this one again.
        if self._save is not None or not peft_states(unwrap(runner.model)):
            return
        self.sources = sources_of(runner.cfg)
        self._save = runner.save_checkpoint
        runner.save_checkpoint = partial(self._save_both, runner)
        runner.register_hook(_LoadHook(self))
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.max_keep_ckpts == 1:
                hook.max_keep_ckpts = 2
                runner.logger.info(
                    'max_keep_ckpts=1 would delete the only checkpoint before '
                    'the next one is written; two are kept.')

    def before_train(self, runner) -> None:
        if self._save is not None and in_shards(runner.model):
            self._no_deltas(runner)
        # After CheckpointHook has made its own.
        for hook in runner.hooks:
            if self._save is not None and isinstance(hook, CheckpointHook):
                hook.file_backend = _DeletesLater(hook.file_backend)
                self._backends.append(hook.file_backend)

    def _no_deltas(self, runner) -> None:
        way_out = ("with state_dict_cfg='full' of FSDPStrategy, "
                   'tools/extract_peft.py takes one from a checkpoint')
        if self.keep == 'delta':
            raise PEFTError("keep='delta' needs whole parameters, but those "
                            "of this run are shards; use keep='both': "
                            f'{way_out}.')
        runner.logger.info('The parameters of this run are shards, so no '
                           f'delta is written; {way_out}.')

    def after_run(self, runner) -> None:
        expect_model(False)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        model = unwrap(runner.model)
        if not peft_states(model):
            return
        checkpoint['peft_randomness'] = self._gathered
        if 'state_dict' not in checkpoint:  # DeepSpeed writes its own
            return
        if in_shards(runner.model):
            # The base of the delta is on no rank. FSDP marks tensors, and a
            # marked one is no plain data, which is all that we read.
            state = checkpoint['state_dict']
            state.update((k, v.detach()) for k, v in state.items()
                         if type(v) is torch.Tensor)
            return
        if all(p.requires_grad for p in model.parameters()):
            # Full: the delta would be the checkpoint once more.
            return
        if self._extra is None:
            frozen = {n for n, p in model.named_parameters()}
            self._extra = missing_in(model,
                                     recorded_base(self.sources, frozen))
        names = delta_names(model) | set(self._extra)
        self._published = dict(
            state={
                k: v
                for k, v in checkpoint['state_dict'].items() if k in names
            },
            meta={
                k: v
                for k, v in checkpoint['meta'].items() if k in KEPT_META
            })
        checkpoint['peft_sources'] = self.sources
        if self.keep == 'delta':
            about = dict(
                path='This checkpoint',
                tensors=sorted(names),
                header=asdict(make_header(model, self.sources)))
            checkpoint['peft_delta'] = about
            checkpoint['state_dict'] = self._published['state']
            averages = checkpoint.get('ema_state_dict', {})
            for name in set(model.state_dict()) - names:
                averages.pop(f'module.{name}', None)

    def _save_both(self, runner, out_dir: str, filename: str, *args,
                   **kwargs) -> None:
        """The stock ``save_checkpoint``, then the delta beside the file."""
        # Every rank takes part in this, only the first one writes.
        self._gathered = gather_randomness()
        self._published = None
        stock = isinstance(runner, Runner) and not any(args) \
            and not kwargs.get('backend_args')
        if stock and is_main_process():
            # Stock writes over what is there, bit by bit.
            with whole_file(osp.join(out_dir, filename)) as temporary:
                self._save(out_dir, osp.basename(temporary), *args, **kwargs)
        else:
            self._save(out_dir, filename, *args, **kwargs)
        if not is_main_process():
            return
        for backend in self._backends:
            backend.delete()
        # What a process left that was killed while it wrote.
        for old in glob.glob(osp.join(glob.escape(out_dir), '*.*.tmp')):
            if re.search(r'\.(pth|safetensors)\.\d+\.tmp$', old):
                os.remove(old)
        if self._published is None:
            return
        path = osp.join(out_dir, osp.splitext(filename)[0] + SUFFIX)
        save_delta(
            unwrap(runner.model),
            path,
            sources=self.sources,
            meta=self._published['meta'],
            state=self._published['state'],
            extra=self._extra or ())
        self._published = None
        for old in glob.glob(osp.join(glob.escape(out_dir), f'*{SUFFIX}')):
            if not osp.exists(old[:-len(SUFFIX)] + '.pth'):
                os.remove(old)


class _DeletesLater:
    """A file backend that deletes when the next file is complete.

    Stock deletes the oldest checkpoint, or the best one, and then writes.
    """

    def __init__(self, backend) -> None:
        self.backend = backend
        self.waiting: List[Callable[[], None]] = []

    def remove(self, path: str) -> None:
        """Delete a file, later."""
        self.waiting.append(partial(self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        """Delete a folder, later."""
        self.waiting.append(partial(self.backend.rmtree, path))

    def delete(self) -> None:
        """Delete what waits for it."""
        while self.waiting:
            self.waiting.pop(0)()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


class _LoadHook(Hook):
    """Completes what was loaded with the base, before EMAHook looks at it."""

    priority = 'VERY_HIGH'

    def __init__(self, owner: PEFTCheckpointHook) -> None:
        self.owner = owner
        self._randomness: Optional[list] = None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if 'peft_delta' in checkpoint:
            if runner._resume and 'optimizer' not in checkpoint:
                raise PEFTError(
                    f'{checkpoint["peft_delta"]["path"]} holds no state of '
                    'the optimizer; resume from the .pth beside it, or start '
                    'from it with load_from.')
            complete(unwrap(runner.model), checkpoint, self.owner.base)
        elif in_shards(runner.model):
            pass  # no shape is that of the file
        elif runner._resume or runner._train_loop is None:
            # Where training starts, another head may be meant.
            check_whole(unwrap(runner.model), checkpoint.get('state_dict'))
        if runner._resume:
            self._randomness = checkpoint.get('peft_randomness')
            # load_from now names the checkpoint, and no longer the base.
            self.owner.sources = checkpoint.get('peft_sources',
                                                self.owner.sources)

    def before_train(self, runner) -> None:
        if self._randomness is not None:
            restore_randomness(runner, self._randomness)
            self._randomness = None


def in_shards(model) -> bool:
    """Whether FSDP has flattened parameters and cut them into pieces."""
    return any(isinstance(m, FSDP) for m in model.modules())
