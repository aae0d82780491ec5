"""Parameter-efficient fine-tuning for dense prediction, on OpenMMLab.

Importing this package needs torch and mmengine only; everything that needs
more is imported on first use.
"""
import importlib
import sys

from .compat import map_package_names
from .version import __version__

# Where each public name lives; resolved on first access (PEP 562), so that
# `import mmpeft` adds nothing to the start of a stock tool.
_PUBLIC = {
    'PEFTBackbone': '.injection',
    'apply': '.api',
    'calibrate': '.calibration',
    'merge': '.merging',
    'merged_state_dict': '.merging',
    'unmerge': '.engine.merge',
    'fold': '.folding',
    'attach': '.tasks',
    'active': '.tasks',
    'detach': '.tasks',
    'disable': '.tasks',
    'merge_tasks': '.tasks',
    'set_active': '.tasks',
    'list_tasks': '.tasks',
    'save_delta': '.delta',
    'load_delta': '.delta',
    'count_params': '.counting',
    'out_channels': '.readers',
    'ppt_factor': '.counting',
    'config_path': '.config',
    'register_family': '.backbones.register',
    'PEFTError': '.errors',
    'SiteError': '.errors',
    'MergeError': '.errors',
    'MissingFileError': '.errors',
}
__all__ = ['__version__', *_PUBLIC]

map_package_names()
if 'mmengine.runner.checkpoint' in sys.modules:
    # Inferencers read a checkpoint before they build what it is for.
    importlib.import_module('.engine.delta_loading', __name__).register()


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted(set(globals()) | set(_PUBLIC))
