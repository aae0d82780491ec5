from typing import Dict, List, Optional, Union

import torch
import torch.nn as nn
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor

from ...errors import PEFTError
from ...methods.ada_lora import AdaLoRA
from ...methods.base import check_positive, check_rate
from ...registry import HOOKS

__all__ = ['RankBudgetHook']

ORTHOGONALITY = ('norm', 'squared')


@HOOKS.register_module()
class RankBudgetHook(Hook):
    """Share a falling budget of triplets among all AdaLoRA modules.

    The second half of `Adaptive Budget Allocation for Parameter-Efficient
    Fine-Tuning <https://arxiv.org/abs/2303.10512>`_ (ICLR 2023). For every
    entry ``w`` of P, E and Q, at each step of the optimizer::

        I = |w * dL/dw|
        I_mean <- beta1 * I_mean + (1 - beta1) * I
        U_mean <- beta2 * U_mean + (1 - beta2) * |I - I_mean|
        score of a triplet = s(E_i) + mean s(P_i) + mean s(Q_i),
                             s = I_mean * U_mean

    Every ``interval`` iterations the singular values of all but the ``b``
    best triplets of the model are set to 0, with ``b`` falling from all by
    ``(1 - progress)^3``, and those that are not for good may come back. Over
    the last ``t_final`` iterations the choice is fixed. P and Q are kept near
    orthogonal by ``loss_orth``, which joins the losses of the model.

    Entries and gradients are those that the step uses, as in the paper
    (averaged over ranks and accumulated, unscaled and clipped); the released
    code reads the gradients of before and the weights of after the step. It
    keeps exactly ``b`` triplets, also where scores are equal. The exponent's
    base is that of the released code; the printed one is not 1 at the start.

    With several ranks each computes the same. Its state is part of the
    checkpoint, and resuming continues it exactly.

    Args:
        target_rank (float, optional): Triplets of each target at the end, on
            average over the model. None means two thirds of those at the
            start. Defaults to None.
        t_init (int | float): Iterations before the first cut; a float below 1
            is a share of the whole training. Defaults to 0.1.
        t_final (int | float): Iterations after the last one. Defaults to 0.5.
        interval (int | float): Iterations between cuts. Defaults to 0.001.
        beta1 (float): Smoothing of the sensitivity, in [0, 1). Defaults to
            0.85.
        beta2 (float): Smoothing of its uncertainty, in [0, 1). Defaults to
            0.85.
        orth_weight (float): Weight of ``loss_orth``; 0 leaves it out. peft
            uses 0.5. Defaults to 0.1.
        orthogonality (str): ``'norm'``, the mean of ``|P'P - I|`` and
            ``|QQ' - I|`` over all, which the paper's experiments ran with, or
            ``'squared'``, the sum of their squares, which it prints. Defaults
            to ``'norm'``.

    Raises:
        PEFTError: If nothing of AdaLoRA is in the model, the phases are
            longer than the training, or an argument is out of range.
    """

    # Checkpoints and EMA see the model after the cut.
    priority = 'ABOVE_NORMAL'

    def __init__(self,
                 target_rank: Optional[float] = None,
                 t_init: Union[int, float] = 0.1,
                 t_final: Union[int, float] = 0.5,
                 interval: Union[int, float] = 0.001,
                 beta1: float = 0.85,
                 beta2: float = 0.85,
                 orth_weight: float = 0.1,
                 orthogonality: str = 'norm') -> None:
        owner = 'RankBudgetHook'
        if target_rank is not None:
            check_positive(owner, 'target_rank', target_rank)
        for name, value in dict(
                t_init=t_init, t_final=t_final, interval=interval).items():
            whole = type(value) is int and value >= 0
            share = type(value) is float and 0 <= value < 1
            if not (whole or share):
                raise PEFTError(f'{owner}: {name} must be a whole number of '
                                'iterations or a share in [0, 1), but got '
                                f'{value!r}.')
        if orth_weight != 0:
            check_positive(owner, 'orth_weight', orth_weight)
        if orthogonality not in ORTHOGONALITY:
            raise PEFTError(f'{owner}: unknown orthogonality '
                            f'{orthogonality!r}; use one of '
                            f'{", ".join(ORTHOGONALITY)}.')
        self.target_rank = target_rank
        self.times = (t_init, t_final, interval)
        self.beta1 = check_rate(owner, 'beta1', beta1)
        self.beta2 = check_rate(owner, 'beta2', beta2)
        self.orth_weight = orth_weight
        self.squared = orthogonality == 'squared'
        self._modules: Dict[str, AdaLoRA] = {}
        self._handles: list = []
        # By the name of the parameter: (I_mean, U_mean).
        self._means: Dict[str, tuple] = {}
        # The final choice, True for what is kept, over all triplets.
        self._kept: Optional[Tensor] = None

    def before_train(self, runner) -> None:
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        self._modules = {
            name: m
            for name, m in model.named_modules() if isinstance(m, AdaLoRA)
        }
        if not self._modules:
            raise PEFTError('RankBudgetHook finds no AdaLoRA in the model; '
                            "use it with method=dict(type='AdaLoRA').")
        modules = self._modules.values()
        targets = sum(len(m.rows) for m in modules)
        self._total = sum(m.lora_E.numel() for m in modules)
        rank = self.target_rank or 2 / 3 * self._total / targets
        self._target = round(rank * targets)
        if not 1 <= self._target <= self._total:
            raise PEFTError(
                f'RankBudgetHook: target_rank={self.target_rank} asks for '
                f'{self._target} triplets in {targets} targets, which have '
                f'{self._total}; use at most {self._total / targets:g}, or '
                'give AdaLoRA a higher rank.')
        self._plan(runner.max_iters)
        wrappers = runner.optim_wrapper
        # Several optimizers come as a dict of wrappers.
        wrappers = wrappers.values() if hasattr(wrappers,
                                                'values') else [wrappers]
        self._handles = [
            w.optimizer.register_step_pre_hook(self._before_step)
            for w in wrappers
        ]
        if self.orth_weight:
            self._handles.append(
                model.register_forward_hook(self._add_loss, with_kwargs=True))

    def _plan(self, max_iters: int) -> None:
        t_init, t_final, interval = (
            t if isinstance(t, int) else int(t * max_iters)
            for t in self.times)
        self._interval = max(interval, 1)
        self._start, self._stop = t_init, max_iters - t_final
        if self._start >= self._stop:
            raise PEFTError(f'RankBudgetHook: t_init={t_init} and t_final='
                            f'{t_final} leave none of {max_iters} iterations '
                            'for the budget to fall; make them shorter.')

    def budget(self, step: int) -> int:
        """Triplets that are kept after so many iterations."""
        if step <= self._start:
            return self._total
        if step >= self._stop:
            return self._target
        left = 1 - (step - self._start) / (self._stop - self._start)
        return self._target + int((self._total - self._target) * left**3)

    def after_train_iter(self,
                         runner,
                         batch_idx: int,
                         data_batch=None,
                         outputs=None) -> None:
        step = runner.iter + 1
        kept = self._kept
        if step >= self._stop and kept is None and self._means:
            self._kept = kept = self._choose(self._target)
            runner.logger.info(f'AdaLoRA keeps {self._target} of '
                               f'{self._total} triplets, by target:\n' +
                               self._table())
        elif step > self._start and step % self._interval == 0 and (
                kept is None and self._means):
            kept = self._choose(self.budget(step))
        if kept is not None:
            self._cut(kept)
        runner.message_hub.update_scalar('train/rank_budget',
                                         self.budget(step))

    def after_train(self, runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['rank_budget'] = dict(
            means={
                name: tuple(m.cpu() for m in means)
                for name, means in self._means.items()
            },
            kept=None if self._kept is None else self._kept.cpu())

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        # A run that only starts from these weights has a budget of its own.
        if runner._resume and 'rank_budget' in checkpoint:
            state = checkpoint['rank_budget']
            self._means, self._kept = dict(state['means']), state['kept']

    @torch.no_grad()
    def _before_step(self, optimizer, *args) -> None:
        if self._kept is not None:
            return
        # A fused optimizer is given scaled gradients, and drops the step
        # itself if they overflowed.
        found, scale = (
            getattr(optimizer, name, None)
            for name in ('found_inf', 'grad_scale'))
        if found is not None and found.item():
            return
        mine = {id(p) for g in optimizer.param_groups for p in g['params']}
        for name, module in self._modules.items():
            for leaf in ('lora_A', 'lora_B', 'lora_E'):
                p = getattr(module, leaf)
                if p.grad is None or id(p) not in mine:
                    continue
                grad = p.grad if scale is None else p.grad / scale
                self._smooth(f'{name}.{leaf}', (p * grad).abs().float())

    def _smooth(self, name: str, now: Tensor) -> None:
        zero = torch.zeros_like(now)
        # Those of a checkpoint may be on another device.
        mean, spread = (m.to(now) for m in self._means.get(name, (zero, zero)))
        mean = self.beta1 * mean + (1 - self.beta1) * now
        gap = (now - mean).abs()
        spread = self.beta2 * spread + (1 - self.beta2) * gap
        self._means[name] = (mean, spread)

    def _choose(self, count: int) -> Tensor:
        """Mark the best triplets of the model."""
        scores = []
        for name, module in self._modules.items():
            entries = {}
            for leaf in ('lora_A', 'lora_B', 'lora_E'):
                p = getattr(module, leaf).detach().float()
                means = self._means.get(f'{name}.{leaf}')
                entries[leaf] = torch.zeros_like(p) if means is None else (
                    means[0] * means[1]).to(p)
            scores.append(module.triplet_scores(entries))
        scores = torch.cat(scores)
        # Stable, so that all ranks break ties alike.
        order = torch.sort(scores, descending=True, stable=True).indices
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[order[:count]] = True
        return kept

    @torch.no_grad()
    def _cut(self, kept: Tensor) -> None:
        for module, part in zip(self._modules.values(), self._split(kept)):
            module.lora_E.masked_fill_(~part.to(module.lora_E.device), 0)

    def _split(self, kept: Tensor) -> List[Tensor]:
        """What was chosen, for each module."""
        sizes = [m.lora_E.numel() for m in self._modules.values()]
        return list(kept.split(sizes))

    def _table(self) -> str:
        lines = []
        for (name, module), part in zip(self._modules.items(),
                                        self._split(self._kept)):
            ranks = [int(k.sum()) for k in part.split(module.rank)]
            lines.append(f'{name}: {", ".join(map(str, ranks))}')
        return '\n'.join(lines)

    def _add_loss(self, model: nn.Module, args: tuple, kwargs: dict,
                  losses) -> Optional[dict]:
        """Forward hook of the model: one more loss."""
        mode = kwargs.get('mode', args[2] if len(args) > 2 else None)
        if mode != 'loss' or not isinstance(losses, dict):
            return None
        gaps = [gap for m in self._modules.values() for gap in m.gaps()]
        if self.squared:
            value = sum(gap**2 for gap in gaps)
        else:
            value = sum(gaps) / len(gaps)
        return dict(losses, loss_orth=self.orth_weight * value)
