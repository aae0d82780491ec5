"""What a block family declares, and the block that calls its sites."""
import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple, Type

import torch.nn as nn
from torch import Tensor

from ..errors import SiteError
from ..registry import SITE_MAPS
from ..sites import MODULE_SITES, STREAM_SITES, Site, TokenLayout

__all__ = [
    'Block', 'BlockPEFT', 'SiteMap', 'class_path', 'family_names',
    'find_family', 'site_hook'
]


def class_path(cls: type) -> str:
    """Full path of a class; what families are told apart by."""
    return f'{cls.__module__}.{cls.__qualname__}'


@dataclass(frozen=True)
class Block:
    """One transformer block found in a backbone.

    Attributes:
        path (str): Path inside the backbone, such as ``stages.2.blocks.5``.
        index (int): Number over the whole backbone, from 0.
        stage (int): Number of its stage, from 0.
        stage_path (str): Path of its stage, such as ``stages.2``.
        module (nn.Module): The block itself.
        family (type): The site map of its family.
    """

    path: str
    index: int
    stage: int
    stage_path: str
    module: nn.Module
    family: Type['SiteMap']


class BlockPEFT(nn.ModuleDict):
    """``block.peft``: the attached modules, ``{name: {site: module}}``."""

    def run(self,
            site: str,
            x: Tensor,
            y: Tensor,
            layout: Optional[TokenLayout] = None) -> Tensor:
        """Pass ``y`` through the modules at a site, in order of attachment."""
        for modules in self.values():
            if site in modules:
                y = modules[site](x, y, layout)
        return y


def site_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a stock submodule that is a site.

    It reads its target from the module and closes over nothing, so that a
    deep copy (EMA) runs the copy's adapters.
    """
    peft, site = module._peft_site
    return peft.run(site, args[0], output)


class SiteMap:
    """One family of blocks: where its sites are. All members are class-level.

    A family is an exact block class. To add one, subclass this, give the
    class paths, the ``forward`` that calls the stream sites as a mixin, and
    the submodules that are sites.
    """

    #: Full paths of the stock block classes.
    block_types: Tuple[str, ...] = ()
    #: Full paths of the stock backbones, to recognise them in a config.
    backbone_types: Tuple[str, ...] = ()
    #: Block path inside the host module: stage path, stage, block number.
    block_pattern: str = r'(?:(?P<host>.+?)\.)?(?P<stage_path>stages\.' \
                         r'(?P<stage>\d+))\.blocks\.\d+'
    #: Sites this family has no place for, and why.
    refused: Dict[str, str] = {}
    #: Whether its tokens form a grid.
    has_grid: bool = True
    #: Class whose ``forward`` calls the stream sites; bases of the new class.
    mixin: type = object

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        """The stock submodules that are sites, by site name."""
        raise NotImplementedError

    @classmethod
    def stream(cls, block: nn.Module) -> None:
        """Prepare a block for the mixin's forward; keys must not change."""

    @classmethod
    def unstream(cls, block: nn.Module) -> None:
        """Undo :meth:`stream`."""

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        """Width of the token stream."""
        raise NotImplementedError

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        """Paths of parts whose output no requested feature depends on."""
        return []

    @classmethod
    def final_norm(cls, backbone: nn.Module) -> str:
        """Path of the norm of the last output."""
        raise NotImplementedError

    @classmethod
    def offered(cls) -> Tuple[str, ...]:
        """Names of the sites this family offers."""
        return tuple(s for s in MODULE_SITES + STREAM_SITES
                     if s not in cls.refused)

    @classmethod
    def site(cls, block: Block, name: str) -> Site:
        """Describe one site of one block.

        Raises:
            SiteError: If the family does not offer it.
        """
        if name not in cls.offered():
            reason = cls.refused.get(name, 'there is no site of that name')
            raise SiteError(
                f'Site {name!r} is not offered by {cls.__name__}: {reason}. '
                f'Offered: {", ".join(cls.offered())}.')
        dims = cls.embed_dims(block.module)
        if name in STREAM_SITES:
            return Site(name, dims, dims, block.path, block.stage)
        module = cls.modules(block.module)[name]
        if not isinstance(module, nn.Linear):
            return Site(name, dims, dims, block.path, block.stage)
        rows = {}
        if name == 'qkv':
            size = module.out_features // 3
            rows = {
                p: (i * size, i * size + size)
                for i, p in enumerate('qkv')
            }
        return Site(name, module.in_features, module.out_features, block.path,
                    block.stage, rows)

    @classmethod
    def blocks(cls, root: nn.Module) -> List[Tuple[str, Block]]:
        """All blocks of this family below ``root``, with their host's path."""
        found = []
        for path, module in root.named_modules():
            stock = getattr(type(module), 'stock_class', type(module))
            if class_path(stock) not in cls.block_types:
                continue
            match = re.fullmatch(cls.block_pattern, path)
            if match is None:
                raise SiteError(
                    f'A {stock.__name__} sits at {path!r}, where '
                    f'{cls.__name__} does not expect one; pass the backbone '
                    'itself.')
            host = match['host'] or ''
            inner = path[len(host) + 1:] if host else path
            index = sum(h == host for h, _ in found)
            found.append((host,
                          Block(inner, index, int(match['stage']),
                                match['stage_path'], module, cls)))
        return found

    @classmethod
    def swap(cls, block: nn.Module) -> None:
        """Give a stock block the forward that calls its sites.

        The class is swapped and not the module, so keys, buffers, hooks and
        ``isinstance`` stay as they were.
        """
        stock = type(block)
        if hasattr(stock, 'stock_class'):
            return
        block.__class__ = _peft_class(cls.mixin, stock)
        cls.stream(block)
        block.peft = BlockPEFT()

    @classmethod
    def restore(cls, block: nn.Module) -> None:
        """Undo :meth:`swap` and remove everything attached."""
        if not hasattr(type(block), 'stock_class'):
            return
        for module in cls.modules(block).values():
            disconnect(module)
        del block.peft
        cls.unstream(block)
        block.__class__ = type(block).stock_class


_CLASSES: Dict[Tuple[type, type], type] = {}


def _peft_class(mixin: type, stock: type) -> type:
    """``class PEFTX(mixin, X)``, made once per stock class."""
    key = (mixin, stock)
    if key not in _CLASSES:
        _CLASSES[key] = type(f'PEFT{stock.__name__}', (mixin, stock),
                             dict(stock_class=stock, __module__=__name__))
    return _CLASSES[key]


def connect(module: nn.Module, peft: BlockPEFT, site: str) -> None:
    """Make a stock submodule call the modules attached at its site."""
    if not hasattr(module, '_peft_site'):
        # A tuple, so that the reference is not registered as a child.
        module._peft_site = (peft, site)
        module._peft_handle = module.register_forward_hook(site_hook)


def disconnect(module: nn.Module) -> None:
    """Undo :func:`connect`."""
    if hasattr(module, '_peft_site'):
        module._peft_handle.remove()
        del module._peft_site, module._peft_handle


def family_names() -> str:
    """The supported families, for a message."""
    SITE_MAPS.import_from_location()
    return ', '.join(
        f.__name__.replace('Sites', '')
        for f in SITE_MAPS.module_dict.values())


def find_family(root: nn.Module) -> Optional[Sequence[Tuple[str, Block]]]:
    """Blocks of the one supported family below ``root``; None if there is
    none."""
    SITE_MAPS.import_from_location()
    for family in SITE_MAPS.module_dict.values():
        blocks = family.blocks(root)
        if blocks:
            return blocks
    return None
