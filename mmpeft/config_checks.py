"""What is wrong with a config, before half a model is built from it."""
from mmengine.config import Config

from .config import find_backbones, find_peft_backbones
from .errors import PEFTError
from .plan import parse_methods

__all__ = ['check_config']


def check_config(cfg: Config) -> None:
    """Refuse what a run of a PEFT config cannot work with.

    Raises:
        PEFTError: For an unknown method or argument, a method under a stock
            type, or a setting of the run that would go past the adapters.
    """
    ours = find_peft_backbones(cfg)
    for node in ours.values():
        parse_methods(node.get('method') or [])
    for path, node in find_backbones(cfg).items():
        if path not in ours and 'method' in node:
            raise PEFTError(
                f"{path} has a method, but its type is {node['type']!r}; "
                f"write type='mmpeft.PEFTBackbone', stock={node['type']!r}.")
    if ours and cfg.get('activation_checkpointing'):
        raise PEFTError(
            'activation_checkpointing wraps the forward of blocks, and what '
            'is attached to them would get no gradient; set with_cp=True on '
            'the backbone instead.')
