"""Numbers that others printed, with their sources; none is ours.

Each ``.csv`` has one row per printed cell, every number in the digits of its
print: ``source`` (a row of ``sources.csv``, which has the address and the
table), ``model``, ``task``, ``metric``, ``name`` (as printed), ``method``
(the class here, if there is one), ``value`` (percent), ``params_m`` (trainable
parameters in millions), ``ppt``, ``memory_mb``. Empty: not printed.
"""
from .load import read_published, read_sources
from .ppt_cells import PPTCell, ppt_cells, render_cells

__all__ = [
    'PPTCell', 'ppt_cells', 'read_published', 'read_sources', 'render_cells'
]
