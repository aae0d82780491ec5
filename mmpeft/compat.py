"""The two software stacks, told apart by what is installed."""
from importlib import metadata

from mmengine.config.utils import MODULE2PACKAGE

__all__ = ['map_package_names']


def map_package_names() -> None:
    """Make ``mmseg::`` and ``mmpeft::`` usable in ``_base_``.

    mmengine translates the prefix into a *distribution* name. The maintained
    fork of mmsegmentation is distributed under another name, so there every
    ``_base_ = 'mmseg::...'`` fails (mmengine ``config/utils.py``); with the
    import name in the table mmengine finds the installed package itself.
    """
    MODULE2PACKAGE['mmpeft'] = 'mmpeft'
    try:
        metadata.distribution('mmsegmentation')
    except metadata.PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'mmseg'
