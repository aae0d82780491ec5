"""Make the backbone of a config small enough for a sweep of all configs.

Widths and the number of heads go down; depths, windows, outputs, tokens and
drop-path stay, as they are what configs differ in.
"""
import copy
import inspect
from typing import Any, Tuple

__all__ = ['shrink']

# Channels of a head: RoPE wants a multiple of four, LoRA a rank below.
HEAD_DIMS = 8
# Side of the grid of tokens of a ViT: more than a window of SAM, 14.
GRID = 16
# For backbones that take images of any size; no multiple of a window.
IMAGE_SIZE = (64, 96)


def shrink(node: dict, cls: type) -> Tuple[dict, Tuple[int, int, int]]:
    """A small copy of the config of a backbone, and the shape of its image.

    Args:
        node (dict): Config of the backbone.
        cls (type): The stock class it is about.
    """
    node = copy.deepcopy(dict(node))
    for key in ('init_cfg', 'pretrained'):
        # Flamingo takes `pretrained` out before it builds the encoder.
        node.pop(key, None)
    arch = node.get('arch', default(cls, 'arch'))
    if arch is not None:
        node['arch'] = widths = dict(
            cls.arch_zoo[arch.lower()] if isinstance(arch, str) else arch)
    else:
        widths = node
        for key in ('embed_dims', 'num_heads'):
            node.setdefault(key, default(cls, key))
    staged = isinstance(widths['num_heads'], (list, tuple))
    _narrow(widths, staged)
    channels = node.get('in_channels', 3)
    size = node.get('img_size', default(cls, 'img_size'))
    if size is None:
        return node, (channels, *IMAGE_SIZE)
    size = (size, size) if isinstance(size, int) else tuple(size)
    if not staged:
        patch = _patch_size(node, cls)
        size = tuple(min(s, GRID * patch) for s in size)
        node['img_size'] = size[0] if size[0] == size[1] else size
    return node, (channels, *size)


def _narrow(widths: dict, staged: bool) -> None:
    heads, dims = widths['num_heads'], widths['embed_dims']
    # Swin-B's 4, 8, 16, 32 heads become 1, 2, 4, 8; MiT begins with one.
    widths['num_heads'] = [h // heads[0] for h in heads] if staged else 2
    narrow = HEAD_DIMS if staged else 2 * HEAD_DIMS
    widths['embed_dims'] = narrow
    hidden = widths.get('feedforward_channels')
    if isinstance(hidden, int):
        widths['feedforward_channels'] = int(hidden / dims * narrow)


def _patch_size(node: dict, cls: type) -> int:
    patch = node.get('patch_size', default(cls, 'patch_size'))
    return patch if isinstance(patch, int) else max(patch)


def default(cls: type, name: str) -> Any:
    """The default of an argument, passed on by ``**kwargs`` or not."""
    for base in cls.__mro__:
        init = vars(base).get('__init__')
        parameter = init and inspect.signature(init).parameters.get(name)
        if parameter:
            value = parameter.default
            return None if value is inspect.Parameter.empty else value
    return None
