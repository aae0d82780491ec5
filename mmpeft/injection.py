"""Join methods and block families: build stock, freeze, attach, guard."""
import inspect
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

import torch.nn as nn

from .backbones.attached import disconnect
from .backbones.base import Block, family_names, find_family
from .build import Build, attach
from .errors import PEFTError, SiteError
from .frozen_warnings import collapse_frozen_warnings
from .methods.base import Selector
from .methods.full import Frozen, Full
from .plan import MethodPlan, parse_methods
from .recompute import MEMORY
from .registry import MODELS
from .state import PEFTState, guard
from .stock import build_stock

__all__ = ['PEFTBackbone', 'Prepared', 'eject', 'inject', 'prepare']

DEFAULT_MEMORY = 'fast'
MethodCfg = Union[dict, str, Sequence[Union[dict, str]]]


@MODELS.register_module()
def PEFTBackbone(stock: Union[str, type, None] = None,
                 method: Optional[MethodCfg] = None,
                 freeze: Sequence[str] = (),
                 allow_random_base: bool = False,
                 eval_frozen: bool = False,
                 memory: str = DEFAULT_MEMORY,
                 **kwargs: Any) -> nn.Module:
    """Build a stock backbone and make it parameter-efficient.

    A registered function, not a wrapper: what it returns *is* the stock
    backbone, with its keys, its class and its behaviour, frozen, with small
    modules attached to its blocks.

    Args:
        stock (str | type): The stock backbone: ``'mmdet.SwinTransformer'``, a
            bare name in the scope of the config, a full path, or a class.
        method (dict | str | list): What to attach or train, such as
            ``dict(type='Mona', dim=64)``, ``'LoRA:rank=8+LNTune'``, or a list
            of such. Besides its own arguments every method takes ``name``
            (part of its keys, by default the snake-case type), ``layers``
            (block numbers, negative from the end, ``'stage:2'`` or a regular
            expression matching a whole block path) and ``overrides``
            (``{pattern: {argument: value}}``).
        freeze (Sequence[str]): Paths of stock parts that stay frozen whatever
            the method says. Defaults to none.
        allow_random_base (bool): Train on frozen weights that were never
            loaded. Defaults to False: the first training forward refuses.
        eval_frozen (bool): Keep the frozen stock modules in evaluation mode,
            which turns drop-path off. Defaults to False, the released recipe.
        memory (str): What blocks keep for backward; results agree up to
            rounding. ``'stock'``: what stock code keeps. ``'fast'``: norms,
            softmax and activations are computed again where that is cheap, no
            GEMM of the base is. ``'lean'``: the first GEMM of each MLP, too.
            Defaults to 'fast'.
        **kwargs: Arguments of the stock backbone.

    Returns:
        nn.Module: The stock backbone.

    Raises:
        PEFTError: For an unsupported backbone, an unknown method or argument,
            or a pattern that matches nothing.
        SiteError: If the backbone lacks a site that the method needs.
    """
    if stock is None:
        raise PEFTError('PEFTBackbone needs the stock backbone, such as '
                        "stock='mmdet.SwinTransformer'.")
    if method is None:
        raise PEFTError('PEFTBackbone needs a method, such as '
                        "method=dict(type='Mona'); method='Full' trains "
                        'everything.')
    if kwargs.get('frozen_stages', -1) >= 0:
        raise PEFTError(
            f'frozen_stages={kwargs["frozen_stages"]} would freeze the '
            'attached modules again at every train(); remove it (the backbone '
            "is frozen already), or use PEFTBackbone(freeze=('patch_embed', "
            "'stages.0')) to keep stock parts frozen.")
    ours = inspect.signature(PEFTBackbone).parameters
    backbone = build_stock(stock, kwargs, list(ours))
    # timm-style backbones load while they are built.
    loaded = bool(getattr(backbone, '_is_init', False))
    return inject(
        backbone,
        method,
        freeze=freeze,
        allow_random_base=allow_random_base or loaded,
        eval_frozen=eval_frozen,
        memory=memory)


def inject(backbone: nn.Module,
           method: MethodCfg,
           freeze: Sequence[str] = (),
           allow_random_base: bool = False,
           eval_frozen: bool = False,
           memory: str = DEFAULT_MEMORY) -> nn.Module:
    """Freeze a built stock backbone and attach methods to it, in place.

    Arguments and errors are those of :func:`PEFTBackbone`.
    """
    prepared = prepare(backbone, method, allow_random_base, eval_frozen,
                       memory)
    frozen = _expand(backbone, freeze)
    alone = prepared.build.family.left_alone(backbone)
    for name, parameter in backbone.named_parameters():
        if not _below(name, alone):
            parameter.requires_grad = (
                name in prepared.trained and name not in frozen)
    attach(backbone, prepared.state, prepared.build)
    backbone.peft = prepared.state
    guard(backbone)
    collapse_frozen_warnings()
    return backbone


class Prepared(NamedTuple):
    """Methods for a backbone, built and checked, but not attached.

    Attributes:
        build (Build): What will be attached, and where.
        state (PEFTState): What the backbone will remember.
        trained (set[str]): Names of the stock parameters that train.
    """

    build: Build
    state: PEFTState
    trained: set


def prepare(backbone: nn.Module,
            method: MethodCfg,
            allow_random_base: bool = False,
            eval_frozen: bool = False,
            memory: str = DEFAULT_MEMORY) -> Prepared:
    """Build methods for a backbone, which is only read.

    Arguments and errors are those of :func:`PEFTBackbone`.
    """
    if memory not in MEMORY:
        raise PEFTError(f'memory={memory!r} is not one of '
                        f'{", ".join(map(repr, MEMORY))}.')
    blocks = _blocks_of(backbone)
    plans = parse_methods(method)
    if all(p.cls in (Full, Frozen) for p in plans):
        # What full fine-tuning costs is what others are compared with.
        memory = 'stock'
    if isinstance(getattr(backbone, 'peft', None), PEFTState):
        raise PEFTError('This backbone has methods attached already; give '
                        'all of them as one list.')
    unreached = blocks[0].family.unreached(backbone)
    reached = [b for b in blocks if not _below(b.path, unreached)]
    build = Build(backbone, plans, reached)
    trained = _selected(backbone, plans, reached, [*unreached, *build.unread])
    trained |= build.trained
    state = PEFTState(
        plans=[p.cfg for p in plans],
        skipped=[b.path for b in blocks if b not in reached],
        allow_random_base=allow_random_base,
        eval_frozen=eval_frozen,
        gridless=build.gridless,
        stream=build.stream,
        memory=memory)
    return Prepared(build, state, trained)


def eject(backbone: nn.Module) -> nn.Module:
    """Take everything off again; the backbone is stock, in place.

    Which parameters require gradients stays as it is.
    """
    blocks = [b for _, b in find_family(backbone) or ()]
    for block in blocks:
        block.family.restore(block.module)
    for part in blocks[0].family.parts(backbone) if blocks else ():
        disconnect(part.module)
        part.module._modules.pop('peft', None)
    for module in backbone.modules():
        # Of a norm, which is no part if it has no weight, or of a neck.
        module.__dict__.pop('_peft_output', None)
    if isinstance(getattr(backbone, 'peft', None), PEFTState):
        blocks[0].family.release(backbone)
        backbone.peft.release(backbone)
        del backbone.peft
    return backbone


def _blocks_of(backbone: nn.Module) -> List[Block]:
    found = find_family(backbone)
    if not found:
        raise SiteError(
            f'{_title(backbone)} has no block mmpeft knows. '
            f'Supported: {family_names()} blocks; those of your own join by '
            'mmpeft.register_family.')
    hosts = {host for host, _ in found}
    if hosts != {''}:
        raise SiteError(
            f'{type(backbone).__name__} is not the backbone itself: its '
            f'blocks are below {", ".join(sorted(hosts))}.')
    return [block for _, block in found]


def _title(backbone: nn.Module) -> str:
    """Class of a backbone, and the name of the timm model in it."""
    model = getattr(backbone, 'timm_model', backbone)
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    return type(backbone).__name__ + (f' of {name!r}' if name else '')


def _below(name: str, roots: Sequence[str]) -> bool:
    return any(name == r or name.startswith(r + '.') for r in roots)


def _selected(backbone: nn.Module, plans: Sequence[MethodPlan],
              blocks: Sequence[Block], unreached: Sequence[str]) -> set:
    """Names of the stock parameters that train."""
    names: set = set()
    owners: Dict[str, str] = {}
    for plan in plans:
        selector: Optional[Selector] = plan.selector()
        if selector is None:
            continue
        chosen = set(
            selector.select(backbone, plan.choose(blocks), plan.restricted))
        if not isinstance(selector, Full):
            # They would train without ever getting a gradient, which
            # DistributedDataParallel takes for an error.
            chosen = {n for n in chosen if not _below(n, unreached)}
        both = sorted(chosen & set(owners))
        if both:
            raise PEFTError(
                f'{owners[both[0]]} and {plan.cls.__name__} would both train '
                f'{len(both)} stock parameters, such as {both[0]!r}; leave '
                'one of them out, or give them other blocks with `layers`.')
        owners.update(dict.fromkeys(chosen, plan.cls.__name__))
        names |= chosen
    return names


def _expand(backbone: nn.Module, freeze: Sequence[str]) -> set:
    """Parameter names at or below the given paths."""
    if isinstance(freeze, str):
        freeze = (freeze, )
    names = set()
    for path in freeze:
        below = [
            n for n, _ in backbone.named_parameters() if _below(n, [path])
        ]
        if not below:
            parts = ', '.join(n for n, _ in backbone.named_children())
            raise PEFTError(f'freeze: {path!r} names no part of '
                            f'{type(backbone).__name__}; it has {parts}.')
        names.update(below)
    return names
