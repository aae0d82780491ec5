"""What a block family declares."""
import re
from typing import Dict, List, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from ..errors import SiteError
from ..following import follow, follow_activations, unfollow
from ..methods.side import TrunkBlock
from ..registry import SITE_MAPS
from ..sites import (INPUT_SITES, LINEAR_SITES, PART_SITES, SITES, TOKEN_SITES,
                     Site, TokenLayout)
from ..stream import Stream, join_output
from .attached import BlockPEFT, disconnect, peft_class
from .places import Block, Part
from .prenorm import JoinedAttention, PreNormForward
from .recognise import class_path, makes_other_blocks

__all__ = [
    'Block', 'Part', 'SiteMap', 'class_path', 'family_names', 'find_family'
]


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
    #: Block path inside the host module: stage path, stage (0 if the pattern
    #: has none), block number.
    block_pattern: str = r'(?:(?P<host>.+?)\.)?(?P<stage_path>stages\.' \
                         r'(?P<stage>\d+))\.blocks\.\d+'
    #: Whether other modules use its block class, too; those are left alone.
    roams: bool = False
    #: Sites this family has no place for, and why.
    refused: Dict[str, str] = {}
    #: Sites that are one with another, as the block calls one module in both
    #: places; what is attached to both stands there once.
    aliases: Dict[str, str] = {}
    #: Whether its tokens form a grid.
    has_grid: bool = True
    #: Class whose ``forward`` calls the stream sites; bases of the new class.
    mixin: type = object
    #: The same for the attention, where tokens can join it.
    attention_mixin: type = JoinedAttention
    #: Sites that only this attention has.
    attention_sites: Tuple[str, ...] = TOKEN_SITES

    @classmethod
    def recognises(cls, backbone: type, cfg: dict) -> bool:
        """Whether a config of such a backbone is of this family, as far as
        can be told without building it.

        Args:
            backbone (type): The stock class.
            cfg (dict): Its arguments.
        """
        for base in backbone.__mro__:
            if class_path(base) in cls.backbone_types:
                return True
            if makes_other_blocks(base, cls.block_pattern, cls.block_types):
                return False
        return False

    @classmethod
    def hosts(cls, module: nn.Module) -> bool:
        """Whether a module that has such blocks is a backbone of this
        family."""
        return True

    @classmethod
    def locate(cls, root: nn.Module,
               path: str) -> Optional[Tuple[str, str, int]]:
        """Where a block below ``root`` is.

        Returns:
            tuple, optional: Path of its backbone, path and number of its
            stage in there. None if it is not in a backbone of this family.
        """
        match = re.fullmatch(cls.block_pattern, path)
        host = (match['host'] or '') if match else ''
        if match is None or not cls.hosts(root.get_submodule(host)):
            return None
        return host, match['stage_path'], int(match.groupdict().get('stage')
                                              or 0)

    @classmethod
    def left_alone(cls, backbone: nn.Module) -> List[str]:
        """Paths of what is in the backbone's module but no part of it, such
        as a head; it is neither frozen nor counted."""
        return []

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
    def attention(cls, block: nn.Module) -> nn.Module:
        """The submodule that :attr:`attention_mixin` is for."""
        raise NotImplementedError

    @classmethod
    def open_attention(cls, block: nn.Module) -> None:
        """Give a block the attention that has its sites."""
        module = cls.attention(block)
        if not isinstance(module, JoinedAttention):
            module.__class__ = peft_class(cls.attention_mixin, type(module))
            module.prepare()

    @classmethod
    def close_attention(cls, block: nn.Module) -> None:
        """Undo :meth:`open_attention`."""
        if set(TOKEN_SITES) <= set(cls.refused):
            return
        module = cls.attention(block)
        if isinstance(module, JoinedAttention):
            module.forget()
            module.__class__ = type(module).stock_class

    @classmethod
    def drop_path(cls, block: nn.Module) -> float:
        """Rate of the block's drop-path."""
        raise NotImplementedError

    @classmethod
    def stem(cls, backbone: nn.Module) -> Tuple[int, int]:
        """Width of the stem's tokens, and the side of its patches."""
        raise NotImplementedError

    @classmethod
    def parts(cls, backbone: nn.Module) -> List[Part]:
        """The sites outside the blocks that this backbone has."""
        return []

    @classmethod
    def trunk_block(cls, block: Block) -> TrunkBlock:
        """A block, as a side network sees it."""
        raise SiteError(f'{cls.__name__} has no trunk_block, so no network '
                        'can run beside its blocks.')

    @classmethod
    def no_trunk(cls, backbone: nn.Module) -> Optional[str]:
        """Why no network can join its outputs; None if one can."""
        return None

    @classmethod
    def mergings(cls, backbone: nn.Module) -> Dict[int, nn.Module]:
        """By stage, the patch merging that leads into it."""
        return {}

    @classmethod
    def merge_map(cls, merging: nn.Module, layout: TokenLayout,
                  tokens: Tensor) -> Tensor:
        """Pass a token map through a patch merging."""
        raise NotImplementedError

    @classmethod
    def merge_tokens(cls, merging: nn.Module, tokens: Tensor) -> Tensor:
        """Pass tokens that are no map through a patch merging."""
        raise NotImplementedError

    @classmethod
    def outputs(cls, backbone: nn.Module) -> Dict[int, Optional[str]]:
        """By stage that is an output, the path of its norm, if it has one."""
        raise NotImplementedError

    @classmethod
    def has_stages(cls) -> bool:
        """Whether its maps get smaller from stage to stage."""
        return '(?P<stage>' in cls.block_pattern

    @classmethod
    def out_paths(cls, backbone: nn.Module) -> List[str]:
        """Paths of what nothing but the outputs passes."""
        return [p.path for p in cls.parts(backbone) if p.name == 'out_norm']

    @classmethod
    def join_outputs(cls, backbone: nn.Module, stream: Stream,
                     stages: Sequence[int]) -> list:
        """Let side networks join the outputs of some stages.

        Returns:
            list: Handles of the hooks this takes.
        """
        handles = []
        for stage, path in cls.outputs(backbone).items():
            if stage in stages and path is not None:
                norm = backbone.get_submodule(path)
                norm._peft_output = (stream, stage)
                handles.append(norm.register_forward_pre_hook(join_output))
        return handles

    @classmethod
    def watch(cls, backbone: nn.Module, blocks: Sequence[Block]) -> list:
        """Let blocks with something attached know what the stock forward
        does not tell them.

        Returns:
            list: Handles of the hooks this takes.
        """
        return []

    @classmethod
    def release(cls, backbone: nn.Module) -> None:
        """Undo what :meth:`join_outputs` and :meth:`watch` did to the
        backbone, besides hooks."""

    @classmethod
    def grid_ends(cls, block: Block) -> bool:
        """Whether no output depends on the grid behind the attention of this
        block, but on class tokens alone."""
        return False

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
        return tuple(s for s in SITES
                     if s not in cls.refused and s not in cls.aliases)

    @classmethod
    def site(cls, block: Block, name: str) -> Site:
        """Describe one site of one block.

        Raises:
            SiteError: If the family does not offer it.
        """
        name = cls.aliases.get(name, name)
        if name not in cls.offered() or name in PART_SITES:
            reason = cls.refused.get(name, 'there is no site of that name')
            raise SiteError(
                f'Site {name!r} is not offered by {cls.__name__}: {reason}. '
                f'Offered: {", ".join(cls.offered())}.')
        dims = cls.embed_dims(block.module)
        stem_dims, patch_size = cls.stem(block.backbone)
        module = block.layer(name)
        in_dims = out_dims = dims
        rows = {}
        if name in LINEAR_SITES + INPUT_SITES:
            # Of a linear layer, or of a 1 x 1 convolution.
            out_dims, in_dims = module.weight.shape[:2]
            if name in INPUT_SITES:
                out_dims = in_dims
        if name == 'qkv':
            size = out_dims // 3
            rows = {
                p: (i * size, i * size + size)
                for i, p in enumerate('qkv')
            }
        return Site(
            name,
            in_dims,
            out_dims,
            block.path,
            block.stage,
            rows,
            index=block.index,
            stem_dims=stem_dims,
            patch_size=patch_size,
            drop_path=cls.drop_path(block.module))

    @classmethod
    def blocks(cls, root: nn.Module) -> List[Tuple[str, Block]]:
        """All blocks of this family below ``root``, with their host's path."""
        found = []
        for path, module in root.named_modules():
            stock = getattr(type(module), 'stock_class', type(module))
            if class_path(stock) not in cls.block_types:
                continue
            place = cls.locate(root, path)
            if place is None:
                if cls.roams:
                    continue
                raise SiteError(
                    f'A {stock.__name__} sits at {path!r}, where '
                    f'{cls.__name__} does not expect one; pass the backbone '
                    'itself.')
            host, stage_path, stage = place
            inner = path[len(host) + 1:] if host else path
            index = sum(h == host for h, _ in found)
            backbone = root.get_submodule(host)
            found.append((host,
                          Block(inner, index, stage, stage_path, module,
                                backbone, cls)))
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
        block.__class__ = peft_class(cls.mixin, stock)
        cls.stream(block)
        block.peft = BlockPEFT()

    @classmethod
    def save_memory(cls, block: nn.Module) -> None:
        """Prepare a block, with everything attached, for ``memory``."""
        modules = cls.modules(block)
        if issubclass(cls.mixin, PreNormForward):
            for site, output in (('qkv', False), ('fc1', True)):
                if site in modules:
                    follow(modules[site], site, output)
        follow_activations(block)

    @classmethod
    def restore(cls, block: nn.Module) -> None:
        """Undo :meth:`swap` and remove everything attached."""
        if not hasattr(type(block), 'stock_class'):
            return
        for module in block.modules():
            disconnect(module)
            unfollow(module)
        del block.peft
        cls.close_attention(block)
        cls.unstream(block)
        block.__class__ = type(block).stock_class


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
