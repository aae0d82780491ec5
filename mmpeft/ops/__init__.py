"""Exact rearrangements that keep less for backward, or take less time."""
from .add_rows import add_rows
from .dropped import activate
from .filtered_bottleneck import filtered_bottleneck
from .low_rank_linear import low_rank_linear
from .scale_shift import scale_shift
from .window_attention import window_attention
from .windows import from_windows, plan_windows, to_windows

__all__ = [
    'activate', 'add_rows', 'filtered_bottleneck', 'from_windows',
    'low_rank_linear', 'plan_windows', 'scale_shift', 'to_windows',
    'window_attention'
]
