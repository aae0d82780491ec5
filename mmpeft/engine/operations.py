"""Where the seconds of a step go."""
from typing import Any, Callable, Dict

from torch.profiler import ProfilerActivity, profile

__all__ = ['GROUPS', 'seconds_by_group']

#: Operations of PyTorch (without ``aten::``) by what limits them; what is not
#: here is ``others``, what an optimizer calls is ``optimizer``.
GROUPS: Dict[str, tuple] = {
    'products': ('mm', 'addmm', 'bmm', 'baddbmm', 'addmv', 'mv', 'dot'),
    'filters': ('mkldnn_convolution', 'mkldnn_convolution_backward',
                'convolution_backward', 'thnn_conv2d', '_conv_depthwise2d',
                '_slow_conv2d_forward', '_slow_conv2d_backward'),
    'norms': ('native_layer_norm', 'native_layer_norm_backward'),
    'attention': ('_softmax', '_softmax_backward_data',
                  '_scaled_dot_product_flash_attention_for_cpu',
                  '_scaled_dot_product_flash_attention_for_cpu_backward'),
    'GELU': ('gelu', 'gelu_', 'gelu_backward'),
    'dropout': ('bernoulli_', 'native_dropout', 'native_dropout_backward'),
    'copies': ('copy_', 'index', 'index_select', 'cat', 'roll', 'gather',
               'index_add_', 'index_put_', '_index_put_impl_', 'fill_',
               'constant_pad_nd'),
    'sums': ('add', 'add_', 'sub', 'sub_', 'mul', 'mul_', 'div', 'div_',
             'addcmul', 'addcmul_', 'sum', 'mean', 'pow', 'neg', 'where',
             'masked_fill', 'masked_fill_')
}
_GROUP_OF = {
    f'aten::{name}': group
    for group, names in GROUPS.items()
    for name in names
}


def seconds_by_group(step: Callable[[], None]) -> Dict[str, float]:
    """Seconds of the operations of a step on a CPU, without those of what
    they call, added up.

    Args:
        step (Callable): Is called twice; the second time counts.

    Returns:
        dict[str, float]: Of each of :data:`GROUPS`, of the ``optimizer`` and
        of all ``others``.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds = dict.fromkeys((*GROUPS, 'optimizer', 'others'), 0.)
    for event in profiler.events():
        # Microseconds.
        seconds[_group_of(event)] += event.self_cpu_time_total / 1e6
    return seconds


def _group_of(event: Any) -> str:
    above = event
    while above is not None:
        if above.name.startswith('Optimizer.step'):
            return 'optimizer'
        above = above.cpu_parent
    return _GROUP_OF.get(event.name, 'others')
