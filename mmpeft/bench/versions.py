"""Versions of what a result depends on."""
import importlib.metadata
from functools import lru_cache
from typing import Dict

from ..version import __version__

__all__ = ['versions']

# Import names, and what their distributions are called.
_PACKAGES = dict(
    torch=('torch', ),
    mmengine=('mmengine', 'onedl-mmengine'),
    mmcv=('mmcv', 'onedl-mmcv'),
    mmdet=('mmdet', 'onedl-mmdetection'),
    mmseg=('mmsegmentation', 'onedl-mmsegmentation'),
    mmpretrain=('mmpretrain', 'onedl-mmpretrain'))


@lru_cache(maxsize=None)
def versions() -> Dict[str, str]:
    """Import name of a package -> its version, of what is installed."""
    found = dict(mmpeft=__version__)
    for package, names in _PACKAGES.items():
        for name in names:
            try:
                found[package] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
