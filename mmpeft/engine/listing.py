"""What methods and families there are, and which pairs are refused."""
from typing import Dict, List, Optional

from ..backbones.base import SiteMap
from ..beside import HAS_STAGES
from ..methods.base import PEFTModule
from ..methods.side import SideNetwork
from ..plan import MethodPlan
from ..registry import METHODS, SITE_MAPS

__all__ = ['list_methods', 'refusal']


def refusal(method: type, family: type) -> Optional[str]:
    """Why a method cannot go on a family of blocks; None if it can.

    Args:
        method (type): A registered method, with its default arguments.
        family (type[SiteMap]): A registered family.
    """
    if issubclass(method, PEFTModule):
        if method.needs_grid and not family.has_grid:
            return 'it needs a grid of tokens'
        for site in method.sites_for():
            if site in family.refused:
                return f'{site}: {family.refused[site]}'
    if issubclass(method, SideNetwork) and method.needs_grid and \
            not family.has_grid:
        return 'it needs a grid of tokens'
    if issubclass(method, SideNetwork):
        if method.one_stage and family.has_stages():
            return HAS_STAGES
        for site in (*method.attached, *method.trained_norms):
            if site in family.refused:
                return f'{site}: {family.refused[site]}'
    return None


def list_methods() -> List[Dict]:
    """One row per method: ``method``, ``name`` (in keys), ``what`` (first
    line of its docstring), ``sites``, ``merges`` (True, or the reason why
    not), ``families`` (name of a family -> None, or the reason why not)."""
    METHODS.import_from_location()
    SITE_MAPS.import_from_location()
    return [_row(cls) for cls in METHODS.module_dict.values()]


def _row(cls: type) -> Dict:
    families: Dict[str, type] = {
        f.__name__.replace('Sites', ''): f
        for f in SITE_MAPS.module_dict.values() if issubclass(f, SiteMap)
    }
    sites: List[str] = []
    merges = True
    if issubclass(cls, PEFTModule):
        sites = [*cls.sites_for(), *cls.parts]
    elif issubclass(cls, SideNetwork):
        sites = [
            *cls.taps, *cls.trained_norms, *['block_in'] * cls.enters,
            *['block_out'] * cls.writes,
            *['stage_out'] * (cls.joins_outputs or cls.replaces_outputs)
        ]
    if getattr(cls, 'no_merge', None) is not None:
        merges = cls.no_merge
    return dict(
        method=cls.__name__,
        name=MethodPlan(dict(type=cls)).name,
        what=(cls.__doc__ or '').strip().split('\n')[0],
        sites=sites,
        merges=merges,
        families={
            n: refusal(cls, f)
            for n, f in families.items()
        })
