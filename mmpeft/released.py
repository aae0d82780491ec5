"""Checkpoints of the released repository of Mona.

https://github.com/Leiyi-Hu/mona trains with mmdet 2, mmseg 0 and mmcls 0. The
names of its Swin are Microsoft's; what a method adds is called ``my_module_1``
and ``my_module_2``, or ``lora_A`` and ``lora_B`` in ``attn.qkv``. Necks and
heads have the names they have today.
"""
import re
from typing import Dict, Iterable, Tuple

from torch import Tensor

from .errors import PEFTError
from .key_styles import SWIN, Report, rename, reorder

__all__ = ['METHODS', 'convert_released', 'method_of']

_BLOCK, _OURS = 'layers.{s}.blocks.{i}.', 'stages.{s}.blocks.{i}.peft.'


def _bottleneck(module: str, site: str) -> Tuple:
    return tuple(
        (f'{_BLOCK}{module}.{old}.{{p}}', f'{_OURS}{site}.{new}.{{p}}')
        for old, new in (('project1', 'down'), ('project2', 'up')))


#: By method of ours, its names there and here.
METHODS = {
    'Mona':
    ((f'{_BLOCK}my_module_1.{{x}}', f'{_OURS}mona.attn_residual.{{x}}'),
     (f'{_BLOCK}my_module_2.{{x}}', f'{_OURS}mona.ffn_residual.{{x}}')),
    'Adapter':
    _bottleneck('my_module_1', 'adapter.attn_branch') +
    _bottleneck('my_module_2', 'adapter.ffn_branch'),
    'AdaptFormer':
    _bottleneck('my_module_1', 'adaptformer.ffn_residual'),
    'LoRA':
    ((f'{_BLOCK}attn.qkv.lora_{{p}}', f'{_OURS}lora.qkv.lora_{{p}}'), ),
    # Full, Frozen, BitFit, LNTune and Partial add nothing.
    'stock': (),
}
# There the released setting differs from our default.
SETTINGS = dict(LoRA='LoRA:rank=64,alpha=1')


def method_of(keys: Iterable[str]) -> str:
    """The method that the keys of a checkpoint belong to."""
    added = {
        m[1]
        for m in (re.search(
            r'blocks\.\d+\.(my_module_\d(?:\.\w+)?|'
            r'attn\.qkv\.lora)', key) for key in keys) if m
    }
    if 'attn.qkv.lora' in added:
        return 'LoRA'
    if 'my_module_1.adapter_conv' in added:
        return 'Mona'
    if 'my_module_2.project1' in added:
        return 'Adapter'
    return 'AdaptFormer' if 'my_module_1.project1' in added else 'stock'


def convert_released(
        state: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], Report]:
    """A whole checkpoint of that repository, with our names.

    Args:
        state (dict): Its state dict, with ``backbone.`` before the names of
            the backbone.

    Returns:
        tuple: The state dict of the model of today with the method attached,
        and the :class:`Report`, whose source names the method.

    Raises:
        PEFTError: If it is no such checkpoint, or a key of its backbone is
            not known.
    """
    sign = 'backbone.layers.0.blocks.0.attn.qkv.weight'
    if sign not in state:
        raise PEFTError(f'This is no checkpoint of the released Mona '
                        f'repository: it has no {sign!r}.')
    method = method_of(state)
    report = Report(f'mona, {SETTINGS.get(method, method)}', 'mm-swin')
    out, strange = {}, []
    for key, value in state.items():
        new = key
        if key.startswith('backbone.'):
            own = key[len('backbone.'):]
            new = None if own.endswith('attn_mask') else rename(
                own, METHODS[method] + SWIN)
            if new is None:
                (report.dropped
                 if own.endswith('attn_mask') else strange).append(key)
                continue
            if '.downsample.' in new:
                value = reorder(value, to_unfold=True)
            new = f'backbone.{new}'
        if new == key:
            report.kept.append(key)
        else:
            report.renamed[key] = new
        out[new] = value
    if strange:
        raise PEFTError(
            f'{len(strange)} keys of the backbone are of no method '
            f'of that repository, such as {strange[0]!r}.')
    return out, report
