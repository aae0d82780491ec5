"""Count the parameters of a config's model, built without its weights."""
import logging
from contextlib import contextmanager
from typing import Any, Dict, List, Optional

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

from ..config import add_method, load_config, method_title
from ..counting import count_params
from .run import parse_options

__all__ = ['count_config', 'build_model']


def count_config(config: str,
                 method: Optional[str] = None,
                 at: Optional[str] = None,
                 metric: Optional[float] = None,
                 options: Optional[List[str]] = None) -> Dict[str, Any]:
    """One row of ``tools/count_params.py``."""
    cfg = load_config(config)
    if method:
        cfg, at = add_method(cfg, method, at)
    parsed = parse_options(options)
    if parsed:
        cfg.merge_from_dict(parsed)
    row = dict(config=config, method=method or method_title(cfg) or 'stock')
    with without_init():
        model = build_model(cfg)
    row.update(count_params(model, metric))
    return row


def build_model(cfg: Config) -> torch.nn.Module:
    """Build the model of a config as the Runner does, without weights."""
    if not MMLogger.check_instance_created('mmpeft'):
        MMLogger.get_instance('mmpeft', log_level=logging.WARNING)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return MODELS.build(cfg.model)


@contextmanager
def without_init():
    """Skip drawing random weights: nobody looks at them.

    Building a Swin-L spends most of its time there.
    """
    names = [n for n in dir(torch.nn.init) if n.endswith('_')]
    names = [n for n in names if not n.startswith('_')]
    saved = {n: getattr(torch.nn.init, n) for n in names}
    try:
        for name in names:
            setattr(torch.nn.init, name, _keep)
        yield
    finally:
        for name, function in saved.items():
            setattr(torch.nn.init, name, function)


def _keep(tensor, *args, **kwargs):
    return tensor
