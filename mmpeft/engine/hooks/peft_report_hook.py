from functools import partial
from typing import List, Optional

import torch.nn as nn
from mmengine.hooks import Hook
from torch import Tensor

from ...backbones.base import find_family
from ...config_checks import check_config
from ...counting import count_params, part_counts
from ...delta_parts import unwrap
from ...errors import PEFTError
from ...frozen_warnings import collapse_frozen_warnings
from ...readers import check_readers
from ...registry import HOOKS
from ...state import PEFTState, attached_modules

__all__ = ['PEFTReportHook']


@HOOKS.register_module()
class PEFTReportHook(Hook):
    """Say what trains, and stop a run in which part of it does not.

    Before training it logs a table of what trains and what is frozen, by
    part, and gives the counts to the visualiser. After ``check_after``
    iterations it names every attached module that never ran and every
    trainable parameter of the backbone that never received a gradient, and
    stops. Heads are left alone: they may well have parts that a batch does
    not use.

    Args:
        check_after (int): Iterations after which to check; 0 never checks.
            Defaults to 20.

    Raises:
        PEFTError: After ``check_after`` iterations, as above; and before the
            first one if a neck or head is made for other channels than a
            method's outputs have.
    """

    # After the hooks that change the model, before the first iteration.
    priority = 'VERY_LOW'

    def __init__(self, check_after: int = 20) -> None:
        self.check_after = check_after
        self._handles: list = []
        self._left: Optional[int] = None
        self._silent_modules: set = set()
        self._silent_parameters: set = set()
        # The logger may be younger than the model.
        collapse_frozen_warnings()

    def before_run(self, runner) -> None:
        # Our tools have done this already; stock ones have not.
        check_config(runner.cfg)
        check_readers(unwrap(runner.model))

    def before_train(self, runner) -> None:
        model = unwrap(runner.model)
        counts = count_params(model)
        runner.logger.info('Trainable parameters\n' + _table(model, counts))
        skipped = [
            path for m in model.modules() if isinstance(m, PEFTState)
            for path in m.skipped
        ]
        if skipped:
            runner.logger.info('No output depends on these blocks, so nothing '
                               f'is attached to them: {", ".join(skipped)}.')
        for state in model.modules():
            if isinstance(state, PEFTState):
                for name, paths in state.gridless.items():
                    runner.logger.info(
                        f'{name} reads the grid of tokens, and no output '
                        f'depends on that of {", ".join(paths)}: the head '
                        'reads the class token alone. It is not attached '
                        'there.')
        if runner.visualizer is not None:
            runner.visualizer.add_scalars(
                {
                    'peft/backbone_trainable': counts['backbone_trainable'],
                    'peft/model_trainable': counts['model_trainable'],
                    'peft/ppt_factor': counts['ppt_factor'],
                },
                step=runner.iter)
        if self.check_after > 0:
            self._watch(model)

    def after_train_iter(self,
                         runner,
                         batch_idx: int,
                         data_batch=None,
                         outputs=None) -> None:
        if self._left is None:
            return
        self._left -= 1
        if self._left > 0:
            return
        self._release()
        problems = _problem('attached modules never ran', self._silent_modules)
        problems += _problem(
            'trainable parameters of the backbone never '
            'received a gradient', self._silent_parameters)
        if problems:
            raise PEFTError(
                f'After {self.check_after} iterations ' +
                ' and '.join(problems) + ': the model does not use them, so '
                'they would stay as they are. Leave these blocks out with '
                '`layers`, or check that this backbone calls its layers.')

    def after_train(self, runner) -> None:
        self._release()

    def _watch(self, model: nn.Module) -> None:
        self._left = self.check_after
        hosts = {host
                 for host, block in find_family(model) or ()
                 } or ({'backbone'} if hasattr(model, 'backbone') else set())
        for host in hosts:
            backbone = model.get_submodule(host)
            names = {id(m): n for n, m in backbone.named_modules()}
            for module in attached_modules(backbone):
                name = names[id(module)]
                self._silent_modules.add(name)
                self._handles.append(
                    module.register_forward_hook(partial(self._ran, name)))
            for name, parameter in backbone.named_parameters():
                if parameter.requires_grad:
                    self._silent_parameters.add(name)
                    self._handles.append(
                        parameter.register_hook(partial(self._received, name)))

    def _ran(self, name: str, *args) -> None:
        self._silent_modules.discard(name)

    def _received(self, name: str, grad: Tensor) -> None:
        self._silent_parameters.discard(name)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._left = None


def _problem(what: str, names: set) -> List[str]:
    if not names:
        return []
    some = ', '.join(sorted(names)[:3])
    return [f'{len(names)} {what} ({some}{", ..." if len(names) > 3 else ""})']


def _table(model: nn.Module, counts: dict) -> str:
    rows = [('part', 'parameters', 'trainable', '%')]
    for part, count in part_counts(model).items():
        rows.append(_row(part, count['total'], count['trainable']))
    rows.append(
        _row('model', counts['model_total'], counts['model_trainable']))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        '  '.join([row[0].ljust(widths[0])] +
                  [c.rjust(w) for c, w in zip(row[1:], widths[1:])])
        for row in rows
    ]
    share = counts['backbone_trainable'] / max(counts['backbone_total'], 1)
    lines.append(f'backbone: {counts["backbone_trainable"]:,} trainable '
                 f'({share:.2%} of the stock backbone), PPT factor '
                 f'{counts["ppt_factor"]:.4f}')
    return '\n'.join(lines)


def _row(part: str, total: int, trainable: int) -> tuple:
    return (part, f'{total:,}', f'{trainable:,}',
            f'{100 * trainable / max(total, 1):.2f}')
