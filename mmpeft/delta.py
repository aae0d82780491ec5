"""From a model to a delta, and back onto the same base."""
import importlib
from typing import Dict, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from .delta_checks import check_base, check_methods, check_tensors
from .delta_file import Header, read_delta, write_delta
from .delta_parts import (backbones_of, base_of, delta_names, fingerprint,
                          peft_states, plain, unwrap)
from .errors import PEFTError
from .version import __version__

__all__ = ['apply_delta', 'load_delta', 'make_header', 'save_delta']

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain',
            'timm')


def save_delta(
    model: nn.Module,
    path: str,
    sources: Sequence[dict] = (),
    meta: Optional[dict] = None,
    state: Optional[Dict[str, Tensor]] = None,
    extra: Sequence[str] = ()
) -> Header:
    """Write what a model learned, without its frozen base.

    Args:
        model (nn.Module): A model or backbone with methods attached.
        path (str): File to write; ``mmengine`` knows it as a delta if its
            name ends in ``.safetensors``.
        sources (Sequence[dict]): Where the base came from, each with
            ``checkpoint``, ``at`` (path in the model) and ``prefix`` (in the
            file).
        meta (dict, optional): Goes into the header.
        state (dict, optional): State dict to take the tensors from, such as
            that of an average over time. Defaults to the model's own.
        extra (Sequence[str]): Frozen parameters to write all the same,
            because no source has them, such as output norms.

    Returns:
        Header: The header of the file.

    Raises:
        PEFTError: If nothing is attached.
    """
    model = unwrap(model)
    header = make_header(model, sources, meta)
    names = delta_names(model) | set(extra)
    state = model.state_dict() if state is None else state
    write_delta(path, {k: v for k, v in state.items() if k in names}, header)
    return header


def load_delta(model: nn.Module, path: str) -> Header:
    """Load a delta into a model that holds its base.

    Everything is checked before the first tensor is written.

    Args:
        model (nn.Module): Built with the methods of the delta, its base
            weights loaded.
        path (str): The file.

    Raises:
        PEFTError: If the file is damaged, or of another method, base or
            architecture; then the model is unchanged.
    """
    model = unwrap(model)
    tensors, header = read_delta(path)
    extra = set(header.base['names'])
    check_methods(model, header, path)
    check_tensors(model, {
        k: v
        for k, v in tensors.items() if k not in extra
    }, path)
    check_base(model, header, path, {
        k: v
        for k, v in tensors.items() if k in extra
    })
    apply_delta(model, tensors)
    return header


def apply_delta(model: nn.Module, tensors: Dict[str, Tensor]) -> None:
    """Write checked tensors into a model; its base counts as loaded."""
    model.load_state_dict(tensors, strict=False)
    for state in peft_states(model).values():
        state.base_checked = True


def make_header(model: nn.Module,
                sources: Sequence[dict] = (),
                meta: Optional[dict] = None) -> Header:
    """The header of a delta of a model.

    Raises:
        PEFTError: If nothing is attached.
    """
    if not peft_states(model):
        raise PEFTError(f'{type(model).__name__} has no method attached, so '
                        'there is no delta of it.')
    base = base_of(model)
    return Header(
        backbones=backbones_of(model),
        base=dict(
            fingerprint=fingerprint(base),
            names=sorted(base),
            sources=list(sources)),
        packages=_versions(),
        meta=plain(meta or {}))


def _versions() -> Dict[str, str]:
    found = dict(mmpeft=__version__)
    for name in PACKAGES:
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except ImportError:
            continue
    return found
