"""For a notebook or another codebase."""
from typing import Any, Optional, Union

import torch.nn as nn
from mmengine.config import Config

from .backbones.base import find_family
from .config import add_method
from .errors import PEFTError, SiteError
from .injection import eject, inject
from .readers import check_readers

__all__ = ['apply']


def apply(cfg_or_model: Union[Config, dict, nn.Module],
          method: Any,
          at: Optional[str] = None,
          **kwargs: Any) -> Union[Config, nn.Module]:
    """Make a config or a built model parameter-efficient.

    Examples:
        >>> cfg = mmpeft.apply(Config.fromfile('mask-rcnn_swin.py'), 'Mona')
        >>> model = mmpeft.apply(model, dict(type='LoRA', rank=8))

    Args:
        cfg_or_model (Config | dict | nn.Module): A config gives a changed
            copy. A model is changed in place: the weights it holds count as
            loaded, its supported backbone is frozen and gets the method, all
            else (neck, head) is left alone.
        method (dict | str | list): As for :func:`mmpeft.PEFTBackbone`.
        at (str, optional): Path of the backbone, in the config
            (``model.backbone``) or in the model (``backbone``). None takes
            the only supported one.
        **kwargs: ``freeze``, ``eval_frozen`` and ``allow_random_base`` of
            :func:`mmpeft.PEFTBackbone`.

    Raises:
        PEFTError: If there is no supported backbone, or more than one, or if
            the model's neck or head is made for other channels than the
            method gives.
    """
    if isinstance(cfg_or_model, nn.Module):
        kwargs.setdefault('allow_random_base', True)
        backbone = _backbone_of(cfg_or_model, at)
        trains = [(p, p.requires_grad) for p in backbone.parameters()]
        inject(backbone, method, **kwargs)
        try:
            check_readers(cfg_or_model)
        except PEFTError:
            eject(backbone)
            for parameter, trained in trains:
                parameter.requires_grad = trained
            raise
        return cfg_or_model
    if not isinstance(cfg_or_model, dict) and not isinstance(
            cfg_or_model, Config):
        raise PEFTError('apply() takes a Config, a dict or a model, but got '
                        f'{type(cfg_or_model).__name__}.')
    is_config = isinstance(cfg_or_model, Config)
    cfg = cfg_or_model if is_config else Config(dict(cfg_or_model))
    cfg, at = add_method(cfg, method, at)
    if kwargs:
        node = cfg
        for key in at.split('.'):
            node = node[int(key) if key.isdigit() else key]
        node.update(kwargs)
    return cfg if is_config else cfg.to_dict()


def _backbone_of(model: nn.Module, at: Optional[str]) -> nn.Module:
    if at is not None:
        try:
            return model.get_submodule(at)
        except AttributeError:
            parts = ', '.join(n for n, _ in model.named_children())
            raise PEFTError(f'at={at!r} names no part of '
                            f'{type(model).__name__}; it has '
                            f'{parts}.') from None
    hosts = list(dict.fromkeys(host for host, _ in find_family(model) or ()))
    if not hosts:
        raise SiteError(f'{type(model).__name__} contains no supported '
                        'backbone.')
    if len(hosts) > 1:
        raise PEFTError(f'{len(hosts)} supported backbones are in '
                        f'{type(model).__name__}, at {", ".join(hosts)}; '
                        'choose one with `at`.')
    return model.get_submodule(hosts[0])
