"""Families that live in another package."""
import re
import sys
from types import FunctionType
from typing import Iterator, Tuple, Type

from ..errors import PEFTError
from ..registry import SITE_MAPS
from ..sites import SITES, STREAM_SITES, TOKEN_SITES
from .base import SiteMap, class_path

__all__ = ['check_family', 'register_family']


def register_family(cls: Type[SiteMap]) -> Type[SiteMap]:
    """Make the backbones of another package known, as a class decorator.

    Examples:
        >>> @mmpeft.register_family
        ... class MySites(mmpeft.backbones.SiteMap):
        ...     block_types = ('my_package.models.Block', )

    From then on every method, tool and config treats them as it does stock
    ones. The module with the family has to be imported before a model is
    built, which ``custom_imports`` of a config does.
    ``docs/en/add_a_backbone.md`` has a complete example.

    Args:
        cls (type): A subclass of ``SiteMap``.

    Returns:
        type: The same class.

    Raises:
        PEFTError: If a member is missing or wrong, or the blocks belong to
            another family.
    """
    check_family(cls)
    SITE_MAPS.import_from_location()
    for other in SITE_MAPS.module_dict.values():
        taken = set(cls.block_types) & set(other.block_types)
        if taken and class_path(other) != class_path(cls):
            raise PEFTError(
                f'{cls.__name__}: the blocks {", ".join(sorted(taken))} '
                f'belong to the family {class_path(other)} already; a block '
                'class of your own needs its own block_types.')
    # By its full path: two packages may use one name, and a notebook cell may
    # run twice.
    SITE_MAPS.register_module(name=class_path(cls), force=True, module=cls)
    return cls


def check_family(cls: Type[SiteMap]) -> None:
    """Raise if a family cannot work, whatever the backbone.

    Raises:
        PEFTError: Names the member, and what it should be.
    """
    if not (isinstance(cls, type) and issubclass(cls, SiteMap)):
        raise PEFTError(
            f'register_family takes a subclass of mmpeft.backbones.SiteMap, '
            f'but got {cls!r}.')
    for member, problem in _problems(cls):
        raise PEFTError(f'{cls.__name__}.{member} {problem}.')


def _problems(cls: Type[SiteMap]) -> Iterator[Tuple[str, str]]:
    for member in ('block_types', 'backbone_types'):
        paths = getattr(cls, member)
        if not isinstance(paths, tuple) or not paths or any(
                not isinstance(p, str) or '.' not in p for p in paths):
            yield member, ('must be a tuple of full class paths, such as '
                           f"('my_package.models.Block', ); it is {paths!r}")
        for path in paths:
            if _absent(path):
                yield member, (f'names {path!r}, but that module has no such '
                               'class; class_path(Block) of mmpeft.backbones '
                               'gives the path of a class')
    groups = set(re.compile(cls.block_pattern).groupindex)
    if not _overrides(cls, 'locate') and not {'host', 'stage_path'} <= groups:
        yield 'block_pattern', ('needs the groups (?P<host>...) and '
                                f'(?P<stage_path>...); it has {groups or {}}')
    unknown = sorted(set(cls.refused) - set(SITES))
    if unknown:
        yield 'refused', (f'names {", ".join(unknown)}, which are no sites; '
                          f'sites are {", ".join(SITES)}')
    if not set(STREAM_SITES) <= set(cls.refused) and not hasattr(
            cls.mixin, 'forward'):
        yield 'mixin', ('must be a class whose forward is that of the block '
                        'and calls the sites of the stream; '
                        'mmpeft.backbones.prenorm.PreNormForward has most of '
                        'it')
    yield from _missing(cls, ('modules', 'embed_dims', 'drop_path', 'stem'))
    if not set(TOKEN_SITES) <= set(cls.refused):
        yield from _missing(
            cls, ('attention', ),
            f', or refused the sites {", ".join(TOKEN_SITES)}')
    if not _overrides(cls, 'no_trunk'):
        yield from _missing(cls, ('trunk_block', 'outputs'),
                            ', or no_trunk with the reason')


def _absent(path: str) -> bool:
    """Whether a module that is completely imported lacks a class."""
    name, _, attribute = path.rpartition('.')
    module = sys.modules.get(name)
    spec = getattr(module, '__spec__', None)
    return (module is not None and not getattr(spec, '_initializing', False)
            and not hasattr(module, attribute))


def _missing(cls: type, members: tuple, way_out: str = '') -> Iterator:
    for member in members:
        if isinstance(_static(cls, member), FunctionType):
            yield member, 'must be a classmethod'
        if not _overrides(cls, member):
            what = (getattr(SiteMap, member).__doc__ or '').split('.')[0]
            yield member, f'is missing ({what}); define it{way_out}'


def _static(cls: type, member: str) -> object:
    """A member as it was written, not yet bound."""
    return next((vars(c)[member] for c in cls.__mro__ if member in vars(c)),
                None)


def _overrides(cls: type, member: str) -> bool:
    return _static(cls, member) is not _static(SiteMap, member)
