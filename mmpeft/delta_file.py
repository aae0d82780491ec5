"""The file of a delta: safetensors with a header, and nothing that runs.

The tensors carry the names they have in the model. The metadata of the file
has an entry ``mmpeft``, a JSON object, and ``mmpeft_sha256`` of its text:

============== ============================================================
format_version 1
backbones      by path: ``stock`` (class) and ``method`` (list of configs)
base           ``fingerprint`` of the frozen weights, their ``names``, and
               ``sources``: where they came from
tensors        by name: dtype, shape and sha256 of its bytes
packages       versions of what wrote it
meta           of the checkpoint: epoch, iter, dataset_meta, ...
============== ============================================================
"""
import hashlib
import json
import os.path as osp
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from .errors import MissingFileError, PEFTError
from .whole_file import whole_file

__all__ = [
    'FORMAT_VERSION', 'SUFFIX', 'Header', 'digest', 'is_safetensors',
    'parse_header', 'read_delta', 'read_header', 'write_delta'
]

FORMAT_VERSION = 1
SUFFIX = '_delta.safetensors'
KEY = 'mmpeft'
CHECK = 'mmpeft_sha256'
# What a checkpoint of torch begins with.
ZIP = b'PK\x03\x04'
#: Bytes of header beyond which a file is not looked at: the largest model
#: here has some thousand tensors, 100 bytes each.
MAX_HEADER = 32 * 2**20


@dataclass
class Header:
    """What a delta says about itself.

    Attributes:
        backbones (dict): By path in the model: ``stock``, the full name of
            the class, and ``method``, the configs of what is attached.
        base (dict): ``fingerprint``, ``names`` and ``sources`` of the frozen
            weights.
        tensors (dict): By name, ``[dtype, shape, sha256]``.
        packages (dict): Versions.
        meta (dict): Of the checkpoint it was taken from.
        format_version (int): Of the format.
    """

    backbones: Dict[str, dict]
    base: Dict[str, Any]
    tensors: Dict[str, list] = field(default_factory=dict)
    packages: Dict[str, str] = field(default_factory=dict)
    meta: Dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def digest(tensor: Tensor) -> str:
    """sha256 of the bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A view of bytes also for types that numpy has not, such as bfloat16.
    return hashlib.sha256(
        flat.view(torch.uint8).numpy() if flat.numel() else b'').hexdigest()


def is_safetensors(path: str) -> bool:
    """Whether a file is laid out as safetensors, whatever its name."""
    with open(path, 'rb') as file:
        start = file.read(9)
    return _has_layout(start)


def _has_layout(start: bytes) -> bool:
    """By the first nine bytes: the length of a header, which is JSON."""
    return len(start) == 9 and start[8:] == b'{' and start[:4] != ZIP


def write_delta(path: str, tensors: Dict[str, Tensor], header: Header) -> None:
    """Write a delta completely or not at all."""
    from safetensors.torch import save
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header.tensors = {
        k: [str(v.dtype)[6:], list(v.shape),
            digest(v)]
        for k, v in tensors.items()
    }
    text = json.dumps(asdict(header))
    content = save(tensors, metadata={KEY: text, CHECK: _sha256(text)})
    with whole_file(path) as temporary, open(temporary, 'wb') as file:
        file.write(content)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_header(path: str) -> Header:
    """The header of a delta, without its tensors.

    Raises:
        PEFTError: If the file is none, is damaged, or is of a newer format.
    """
    return _read(path, tensors=False)[1]


def read_delta(path: str) -> Tuple[Dict[str, Tensor], Header]:
    """Tensors and header of a delta, all of it checked, nothing executed.

    Raises:
        PEFTError: One sentence, for whatever is wrong with the file.
    """
    tensors, header = _read(path, tensors=True)
    _compare(path, tensors, header)
    return tensors, header


def _read(path: str, tensors: bool) -> Tuple[Dict[str, Tensor], Header]:
    from safetensors import SafetensorError, safe_open
    _check_start(path)
    try:
        with safe_open(path, framework='pt', device='cpu') as file:
            metadata = file.metadata() or {}
            found = {
                k: file.get_tensor(k)
                for k in file.keys()
            } if tensors else {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PEFTError(f'{path} is damaged: {error}.') from error
    if KEY not in metadata:
        raise PEFTError(f'{path} is a safetensors file, but no delta of '
                        f'mmpeft: its metadata has no {KEY!r}.')
    # Not there in what is written by hand; a flipped bit is the concern, and
    # it may be one in a name.
    changed = metadata.get(CHECK,
                           _sha256(metadata[KEY])) != _sha256(metadata[KEY])
    if changed or set(metadata) - {KEY, CHECK, 'format'}:
        raise PEFTError(f'{path} is damaged: its header changed since it was '
                        'written.')
    return found, _parse(path, metadata[KEY])


def _check_start(path: str) -> None:
    if not osp.isfile(path):
        raise MissingFileError(f'There is no delta {path!r}; looked at '
                               f'{osp.abspath(path)}.')
    size = osp.getsize(path)
    with open(path, 'rb') as file:
        start = file.read(9)
    # The length of a header may well begin with the byte of a pickle.
    if not _has_layout(start) and (start[:4] == ZIP or start[:1] == b'\x80'):
        raise PEFTError(f'{path} is a pickle and no safetensors file, '
                        'whatever its name says; it was not opened.')
    length = int.from_bytes(start[:8], 'little')
    if len(start) < 9 or start[8:] != b'{' or length > size - 8:
        raise PEFTError(f'{path} is damaged or no safetensors file: '
                        f'{size} bytes, of which the header claims {length}.')
    if length > MAX_HEADER:
        raise PEFTError(f'{path} has a header of {length} bytes; more than '
                        f'{MAX_HEADER} are not read.')


def _parse(path: str, text: str) -> Header:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PEFTError(f'{path} has a header that cannot be read '
                        f'({error}).') from error
    return parse_header(path, content)


def parse_header(path: str, content: Any) -> Header:
    """A header from what JSON, or a checkpoint, has of it.

    Args:
        path (str): The file, for messages.
        content (Any): What should be a dict with the fields of a header.

    Raises:
        PEFTError: If it is of a newer format, or of none.
    """
    try:
        version = content['format_version']
        if type(version) is not int or version < 1:
            raise TypeError('format_version is no number')
    except (TypeError, KeyError) as error:
        raise PEFTError(f'{path} has a header that cannot be read '
                        f'({type(error).__name__}: {error}).') from error
    if version > FORMAT_VERSION:
        raise PEFTError(
            f'{path} is of format {version}, and this mmpeft reads up to '
            f'{FORMAT_VERSION}; use a newer mmpeft.')
    try:
        header = Header(**content)
        _check_types(header)
    except (TypeError, KeyError, ValueError) as error:
        raise PEFTError(f'{path} has a header that is not of format '
                        f'{version} ({error}).') from error
    return header


def _check_types(header: Header) -> None:
    for name in ('backbones', 'base', 'tensors', 'packages', 'meta'):
        if not isinstance(getattr(header, name), dict):
            raise TypeError(f'{name} is no object')
    if not isinstance(header.base['fingerprint'], str):
        raise TypeError('the fingerprint is no text')
    for name, kind in (('names', str), ('sources', dict)):
        found = header.base[name]
        if not isinstance(found, list) or not all(
                isinstance(item, kind) for item in found):
            raise TypeError(f'{name} of the base are no list of '
                            f'{kind.__name__}')
    for source in header.base['sources']:
        for name in ('checkpoint', 'at', 'prefix'):
            if not isinstance(source.get(name), (str, type(None))):
                raise TypeError(f'{name} of a source is no text')
    for path, backbone in header.backbones.items():
        if not isinstance(backbone, dict) or not isinstance(
                backbone['stock'], str) or not isinstance(
                    backbone['method'], list) or not backbone['method']:
            raise TypeError(f'backbone {path!r} has no stock or no method')
        for method in backbone['method']:
            if not isinstance(method, dict) or not isinstance(
                    method.get('type'), str):
                raise TypeError(f'a method of {path!r} has no type')
    for name, about in header.tensors.items():
        if not isinstance(about, list) or len(about) != 3:
            raise TypeError(f'{name!r} is not said to be [dtype, shape, '
                            'sha256]')


def _compare(path: str, tensors: Dict[str, Tensor], header: Header) -> None:
    """Every tensor is there as it was written."""
    missing = sorted(set(header.tensors) - set(tensors))
    extra = sorted(set(tensors) - set(header.tensors))
    for what, names in (('lacks', missing), ('has besides', extra)):
        if names:
            raise PEFTError(
                f'{path} {what} {len(names)} of {len(header.tensors)} '
                f'tensors of its header, such as {names[0]!r}.')
    broken: List[str] = []
    for name, value in tensors.items():
        dtype, shape, sha = header.tensors[name]
        if [str(value.dtype)[6:], list(value.shape)] != [dtype, shape]:
            raise PEFTError(
                f'{path}: {name!r} is {str(value.dtype)[6:]} '
                f'{list(value.shape)}, its header says {dtype} {shape}.')
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise PEFTError(f'{path}: {name!r} is not finite.')
        if digest(value) != sha:
            broken.append(name)
    if broken:
        raise PEFTError(f'{path} is damaged: the bytes of {len(broken)} of '
                        f'{len(tensors)} tensors changed since it was '
                        f'written, such as {broken[0]!r}.')
