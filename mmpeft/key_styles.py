"""What the parameters of Swin and ViT are called in different libraries."""
import re
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional, Tuple

from torch import Tensor

from .errors import PEFTError

__all__ = [
    'STYLES', 'SWIN', 'MM_SWIN', 'Report', 'Style', 'convert', 'hint',
    'rename', 'reorder', 'style_of'
]

#: What may stand before the names of the backbone in a file.
PREFIXES = ('backbone.', 'module.backbone.', 'module.', 'model.', '')
#: Fields of a name: blocks, stages, one of two norms or outputs, a parameter,
#: and anything.
FIELDS = dict(
    i=r'\d+', s=r'\d+', n='[12]', o=r'\d', p=r'\w+', q='qkv|proj', x='.+')

Names = Tuple[Tuple[str, str], ...]

# Pairs of a name in the other library and in mmpretrain, read in order.
TIMM_VIT: Names = (
    ('cls_token', 'cls_token'),
    ('dist_token', 'dist_token'),
    ('pos_embed', 'pos_embed'),
    ('patch_embed.proj.{p}', 'patch_embed.projection.{p}'),
    ('blocks.{i}.norm{n}.{p}', 'layers.{i}.ln{n}.{p}'),
    ('blocks.{i}.attn.{q}.{p}', 'layers.{i}.attn.{q}.{p}'),
    ('blocks.{i}.ls1.gamma', 'layers.{i}.attn.gamma1.weight'),
    ('blocks.{i}.ls2.gamma', 'layers.{i}.ffn.gamma2.weight'),
    ('blocks.{i}.mlp.fc1.{p}', 'layers.{i}.ffn.layers.0.0.{p}'),
    ('blocks.{i}.mlp.fc2.{p}', 'layers.{i}.ffn.layers.1.{p}'),
    # DINOv2 with SwiGLU, as released
    ('blocks.{i}.mlp.w12.{p}', 'layers.{i}.ffn.w12.{p}'),
    ('blocks.{i}.mlp.w3.{p}', 'layers.{i}.ffn.w3.{p}'),
    ('norm_pre.{p}', 'pre_norm.{p}'),
    ('norm.{p}', 'ln1.{p}'),
    ('fc_norm.{p}', 'ln2.{p}'),
)
MMSEG_VIT: Names = (
    ('layers.{i}.attn.attn.in_proj_{p}', 'layers.{i}.attn.qkv.{p}'),
    ('layers.{i}.attn.attn.out_proj.{p}', 'layers.{i}.attn.proj.{p}'),
    ('layers.{i}.ln{n}.{p}', 'layers.{i}.ln{n}.{p}'),
    ('layers.{i}.ffn.{x}', 'layers.{i}.ffn.{x}'),
    ('cls_token', 'cls_token'),
    ('pos_embed', 'pos_embed'),
    ('patch_embed.{x}', 'patch_embed.{x}'),
    ('ln1.{p}', 'ln1.{p}'),
)
MMPRETRAIN_VIT: Names = (
    ('cls_token', 'cls_token'),
    ('dist_token', 'dist_token'),
    ('pos_embed', 'pos_embed'),
    ('patch_embed.{x}', 'patch_embed.{x}'),
    ('layers.{i}.{x}', 'layers.{i}.{x}'),
    ('pre_norm.{p}', 'pre_norm.{p}'),
    ('ln{n}.{p}', 'ln{n}.{p}'),
)
SWIN: Names = (
    ('patch_embed.proj.{p}', 'patch_embed.projection.{p}'),
    ('patch_embed.norm.{p}', 'patch_embed.norm.{p}'),
    ('layers.{s}.blocks.{i}.norm{n}.{p}', 'stages.{s}.blocks.{i}.norm{n}.{p}'),
    ('layers.{s}.blocks.{i}.attn.{x}', 'stages.{s}.blocks.{i}.attn.w_msa.{x}'),
    ('layers.{s}.blocks.{i}.mlp.fc1.{p}',
     'stages.{s}.blocks.{i}.ffn.layers.0.0.{p}'),
    ('layers.{s}.blocks.{i}.mlp.fc2.{p}',
     'stages.{s}.blocks.{i}.ffn.layers.1.{p}'),
    ('layers.{s}.downsample.{x}', 'stages.{s}.downsample.{x}'),
    ('norm.{p}', 'norm3.{p}'),
    ('norm{o}.{p}', 'norm{o}.{p}'),
)
MM_SWIN: Names = (
    ('patch_embed.{x}', 'patch_embed.{x}'),
    ('stages.{s}.{x}', 'stages.{s}.{x}'),
    ('norm{o}.{p}', 'norm{o}.{p}'),
)


@dataclass(frozen=True)
class Style:
    """How one library calls the parameters of one architecture.

    Attributes:
        family (str): 'ViT' or 'Swin'; conversion is inside one.
        names (tuple): Its names, and those in mmpretrain.
        sign (str): A key that only this style has; styles are tried in order.
        unfolds (bool): Whether patch merging gathers its four patches channel
            by channel, as mmcv does, and not one after the other.
        early (bool): Whether patch merging opens a stage and does not close
            the one before.
    """

    family: str
    names: Names
    sign: str
    unfolds: bool = True
    early: bool = False


STYLES = {
    'timm-vit':
    Style('ViT', TIMM_VIT, 'blocks.0.attn.qkv.weight'),
    'mmseg-vit':
    Style('ViT', MMSEG_VIT, 'layers.0.attn.attn.in_proj_weight'),
    'mmpretrain-vit':
    Style('ViT', MMPRETRAIN_VIT, 'layers.0.attn.qkv.weight'),
    'official-swin':
    Style('Swin', SWIN, 'layers.0.downsample.norm.weight', unfolds=False),
    'timm-swin':
    Style(
        'Swin',
        SWIN,
        'layers.0.blocks.0.attn.qkv.weight',
        unfolds=False,
        early=True),
    'mm-swin':
    Style('Swin', MM_SWIN, 'stages.0.blocks.0.attn.w_msa.qkv.weight'),
}


@dataclass
class Report:
    """What became of every key of a file.

    Attributes:
        source (str): Style of the file.
        target (str): Style it was converted to.
        renamed (dict): Old key -> new key.
        kept (list): Keys that stay as they are.
        dropped (list): Keys that are no parameter of such a backbone.
    """

    source: str
    target: str
    renamed: Dict[str, str] = field(default_factory=dict)
    kept: List[str] = field(default_factory=list)
    dropped: List[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (f'{self.source} to {self.target}: {len(self.renamed)} keys '
                f'renamed, {len(self.kept)} kept, {len(self.dropped)} '
                'dropped')


def style_of(keys: Iterable[str]) -> Optional[Tuple[str, str]]:
    """Style and prefix of the keys of a checkpoint; None if unknown."""
    keys = set(keys)
    for prefix in PREFIXES:
        for name, style in STYLES.items():
            if prefix + style.sign in keys:
                return name, prefix
    return None


def convert(state: Dict[str, Tensor],
            target: str) -> Tuple[Dict[str, Tensor], Report]:
    """The backbone in a state dict, with the names of another library.

    Args:
        state (dict): Any state dict that holds a Swin or a ViT.
        target (str): A key of :data:`STYLES` of the same architecture.

    Returns:
        tuple: ``{name: tensor}`` without a prefix, and the :class:`Report`.

    Raises:
        PEFTError: If the names are of no known style, or of an architecture
            that ``target`` is not for.
    """
    found = style_of(state)
    if found is None:
        raise PEFTError(
            f'The keys ({next(iter(state), None)!r} and '
            f'{max(len(state) - 1, 0)} others) are in no style that is known: '
            f'{", ".join(STYLES)}.')
    source, prefix = found
    family = STYLES[source].family
    if target not in STYLES or STYLES[target].family != family:
        near = [name for name, s in STYLES.items() if s.family == family]
        raise PEFTError(f'The keys are in the style {source}; they can be '
                        f'converted to {", ".join(near)}, not to {target!r}.')
    report, out = Report(source, target), {}
    for key, value in state.items():
        new = key.startswith(prefix) and _convert_key(
            key[len(prefix):], STYLES[source], STYLES[target])
        if not new:
            report.dropped.append(key)
            continue
        if key == new:
            report.kept.append(key)
        else:
            report.renamed[key] = new
        if 'downsample.' in new and STYLES[source].unfolds != STYLES[
                target].unfolds:
            value = reorder(value, STYLES[target].unfolds)
        out[new] = value
    return out, report


def hint(strangers: Iterable[str], known: Iterable[str]) -> str:
    """What helps a user whose file has names that the model has not.

    Args:
        strangers (Iterable[str]): Keys of the file that are not in the model.
        known (Iterable[str]): Keys of the model.
    """
    strangers = list(strangers)
    text = (f'The file has {len(strangers)} tensors besides, such as '
            f'{strangers[0]!r}')
    found, wanted = style_of(strangers), style_of(known)
    if wanted and 'model' in strangers:
        # Microsoft's and Meta's files keep their tensors one level deeper.
        return (f'{text}, which holds tensors; take them out with `python '
                f'tools/convert_checkpoint.py IN OUT --to {wanted[0]}`.')
    if not found or not wanted or found == wanted:
        return f'{text}.'
    if found[0] == wanted[0]:
        return (f'{text}: these are the names of this backbone behind '
                f'{found[1]!r}; give init_cfg prefix={found[1]!r}.')
    if STYLES[found[0]].family != STYLES[wanted[0]].family:
        return (f'{text}: that is a {STYLES[found[0]].family}, and the model '
                f'is a {STYLES[wanted[0]].family}.')
    return (f'{text}: these are names of {found[0]}, and the model has those '
            f'of {wanted[0]}; convert the file with `python '
            f'tools/convert_checkpoint.py IN OUT --to {wanted[0]}`.')


def _convert_key(key: str, source: Style, target: Style) -> Optional[str]:
    """A name in another style; None if it is no parameter."""
    if key.endswith(
        ('attn_mask', 'relative_position_index', 'relative_coords_table')):
        return None  # every library computes them itself
    key = _move_merging(key, -1) if source.early else key
    common = rename(key, [(own, mm) for own, mm in source.names])
    key = common and rename(common, [(mm, own) for own, mm in target.names])
    return key and (_move_merging(key, 1) if target.early else key)


def rename(key: str, pairs: Iterable[Tuple[str, str]]) -> Optional[str]:
    """A key by the first pair of names that fits it; None if none does."""
    for old, new in pairs:
        pattern = re.sub(r'\\{(\w)\\}',
                         lambda m: f'(?P<{m[1]}>{FIELDS[m[1]]})',
                         re.escape(old))
        match = re.fullmatch(pattern, key)
        if match:
            return new.format(**match.groupdict())
    return None


def _move_merging(key: str, by: int) -> str:
    match = re.fullmatch(r'layers\.(\d+)\.(downsample\..+)', key)
    return f'layers.{int(match[1]) + by}.{match[2]}' if match else key


def reorder(value: Tensor, to_unfold: bool) -> Tensor:
    """Input channels of a patch merging: (..., 4 C) -> (..., 4 C).

    Microsoft's and timm's concatenate the patches (0, 0), (1, 0), (0, 1), (1,
    1) of (row, column); mmcv's unfold has, for each channel, the four in
    reading order.
    """
    swap = [0, 2, 1, 3]
    if to_unfold:
        value = value.unflatten(-1, (4, -1))[..., swap, :].transpose(-1, -2)
    else:
        value = value.unflatten(-1, (-1, 4))[..., swap].transpose(-1, -2)
    return value.flatten(-2)
