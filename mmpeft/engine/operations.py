"""Where the seconds of a step go."""
from collections import defaultdict
from typing import Any, Callable, Dict

from torch.utils._python_dispatch import TorchDispatchMode

from .flops import FUSED_ATTENTION
from .measure import TrainStep

__all__ = ['GROUPS', 'seconds_by_group']

#: Operations of PyTorch (without ``aten.``) by what limits them; what is not
#: here is ``others``, what an optimizer calls is ``optimizer``.
GROUPS: Dict[str, tuple] = {
    'products': ('mm', 'addmm', 'bmm', 'baddbmm', 'addmv', 'mv', 'dot'),
    'filters': ('convolution', 'convolution_backward'),
    'norms': ('native_layer_norm', 'native_layer_norm_backward'),
    'attention': ('_softmax', '_softmax_backward_data', *FUSED_ATTENTION,
                  *(f'{name}_backward' for name in FUSED_ATTENTION)),
    'GELU': ('gelu', 'gelu_backward'),
    'dropout': ('bernoulli_', 'native_dropout', 'native_dropout_backward'),
    'copies': ('clone', 'copy_', '_to_copy', 'index', 'index_select', 'cat',
               'roll', 'gather', 'im2col', 'col2im', 'constant_pad_nd',
               'zeros', 'zeros_like', 'new_zeros', 'fill_', 'slice_backward',
               'select_backward', 'index_put', 'index_put_', 'index_add_'),
    'sums': ('add', 'add_', 'sub', 'sub_', 'mul', 'mul_', 'div', 'div_', 'neg',
             'addcmul', 'addcmul_', 'sum', 'mean', 'pow', 'where',
             'masked_fill', 'masked_fill_')
}
_GROUP_OF = {
    f'aten.{name}': group
    for group, names in GROUPS.items()
    for name in names
}


class _Timer(TorchDispatchMode):
    """Seconds of all operations below autograd, by name of the group."""

    def __init__(self, clock: Callable[[], float],
                 synchronize: Callable[[], None]) -> None:
        super().__init__()
        self.clock, self.synchronize = clock, synchronize
        self.seconds: Dict[str, float] = defaultdict(float)
        self.in_optimizer = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.synchronize()
        start = self.clock()
        out = func(*args, **(kwargs or {}))
        self.synchronize()
        name = 'optimizer' if self.in_optimizer else _GROUP_OF.get(
            str(func.overloadpacket), 'others')
        self.seconds[name] += self.clock() - start
        return out

    def enters(self, *args: Any) -> None:
        self.in_optimizer = True

    def leaves(self, *args: Any) -> None:
        self.in_optimizer = False


def seconds_by_group(step: TrainStep, clock: Callable[[], float],
                     synchronize: Callable[[], None]) -> Dict[str, float]:
    """Seconds of the operations of a training step.

    ``torch.profiler`` does not say this: of what is computed again in a
    backward it lists some operations ten times and some not at all (torch
    2.11), so each operation is timed by itself.

    Args:
        step (TrainStep): Is called twice; the second time counts.
        clock (Callable): Gives seconds.
        synchronize (Callable): Waits for the device.

    Returns:
        dict[str, float]: Of each of :data:`GROUPS`, of the ``optimizer`` and
        of ``others``: small operations, Python and autograd itself. The sum
        is that of the whole step.
    """
    step()
    timer = _Timer(clock, synchronize)
    hooks = [] if step.optimizer is None else [
        step.optimizer.register_step_pre_hook(timer.enters),
        step.optimizer.register_step_post_hook(timer.leaves)
    ]
    synchronize()
    start = clock()
    with timer:
        step()
    synchronize()
    whole = clock() - start
    for hook in hooks:
        hook.remove()
    names = (*GROUPS, 'optimizer')
    seconds = {name: timer.seconds[name] for name in names}
    return dict(seconds, others=whole - sum(seconds.values()))
