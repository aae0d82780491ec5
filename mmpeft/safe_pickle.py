"""Which pickles may be opened: those that hold data, and nothing to call.

A ``.pth`` file is a pickle, and a pickle is a program: it may import and call
whatever it names. Before anybody opens one, :func:`check_pickle` runs that
program with stand-ins: every name it imports becomes an empty class that
accepts whatever is done with it and does nothing. Names that are not on the
list below end it. Tensors are not read, so that this takes milliseconds,
whatever the size of the file.
"""
import _compat_pickle
import os
import os.path as osp
import pickle
import re
import tarfile
import zipfile
import zlib
from io import BytesIO
from typing import Any, BinaryIO, Dict, List, Tuple

import torch

from .errors import PEFTError

__all__ = ['check_pickle', 'TRUST']

#: Environment variable: files, separated as in PATH, that are opened whatever
#: they hold.
TRUST = 'MMPEFT_TRUST'

# By module: what makes data of data, and has no other effect. Nothing that
# calls one of its arguments, finds an attribute by name, opens or imports.
ALLOWED: Dict[str, Tuple[str, ...]] = {
    'argparse': ('Namespace', ),
    'builtins':
    ('bool', 'bytearray', 'bytes', 'complex', 'dict', 'float', 'frozenset',
     'int', 'list', 'object', 'range', 'set', 'slice', 'str', 'tuple'),
    'collections': ('Counter', 'OrderedDict', 'defaultdict', 'deque'),
    'datetime': ('date', 'datetime', 'time', 'timedelta', 'timezone'),
    'decimal': ('Decimal', ),
    'fractions': ('Fraction', ),
    'pathlib': ('Path', 'PosixPath', 'PurePath', 'PurePosixPath',
                'PureWindowsPath', 'WindowsPath'),
    'types': ('SimpleNamespace', ),
    'uuid': ('UUID', ),
    'addict.addict': ('Dict', ),
    'easydict': ('EasyDict', ),
    'yacs.config': ('CfgNode', ),
    'mmcv.utils.config': ('ConfigDict', ),
    'mmengine.config.config': ('ConfigDict', ),
    'mmengine.logging.history_buffer': ('HistoryBuffer', ),
    'numpy': ('bool', 'bool_', 'complex128', 'complex64', 'dtype', 'float16',
              'float32', 'float64', 'int16', 'int32', 'int64', 'int8',
              'ndarray', 'uint16', 'uint32', 'uint64', 'uint8'),
    'numpy.core.multiarray': ('_reconstruct', 'scalar'),
    'numpy.core.numeric': ('_frombuffer', ),
    'torch': ('BoolTensor', 'Size', 'Tensor', 'device'),
    'torch._tensor': ('Tensor', ),
    'torch._utils':
    ('_rebuild_parameter', '_rebuild_parameter_with_state', '_rebuild_qtensor',
     '_rebuild_sparse_tensor', '_rebuild_tensor', '_rebuild_tensor_v2',
     '_rebuild_tensor_v3'),
    'torch.nn.parameter': ('Buffer', 'Parameter'),
    'torch.serialization': ('_get_layout', ),
    'torch.storage': ('TypedStorage', 'UntypedStorage'),
}
STORAGE = re.compile(r'[A-Z]\w*Storage')
DTYPE = re.compile(r'[A-Z]\w*DType')
# The statistics that a HistoryBuffer refers to.
HISTORY = ('mmengine.logging.history_buffer', 'HistoryBuffer')
STATISTICS = ('min', 'max', 'current', 'mean')
METHODS = tuple(f'HistoryBuffer.{name}' for name in STATISTICS)


class Refused(Exception):
    """The name of something that is not on the list."""


class _StandIn:
    """Accepts everything that an unpickler does with an object."""

    def __new__(cls, *args: Any, **kwargs: Any) -> '_StandIn':
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """For subclasses of list, and deques."""

    def extend(self, values: Any) -> None:
        """For subclasses of list, and deques."""

    def add(self, value: Any) -> None:
        """For subclasses of set."""


class _Method:
    """What nothing may be done with but put it somewhere."""

    def __setstate__(self, state: Any) -> None:
        raise Refused('attributes of a method')


class _Unpickler(pickle.Unpickler):
    """Runs a pickle without importing or calling anything."""

    def __init__(self, file: BinaryIO) -> None:
        # As torch.load reads them.
        super().__init__(file, encoding='utf-8')
        self.known: Dict[Tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for an allowed name.

        Raises:
            Refused: For any other.
        """
        key = (module.replace('numpy._core.', 'numpy.core.'), name)
        if module == '__builtin__':
            # Its name in Python 2, which protocols below 3 still write.
            key = _compat_pickle.NAME_MAPPING.get(key, ('builtins', name))
        if key not in self.known:
            self.known[key] = self._stand_in(*key)
        return self.known[key]

    def _stand_in(self, module: str, name: str) -> Any:
        if (module, name) == ('builtins', 'getattr'):
            return self._getattr
        if (module, name) == ('_codecs', 'encode'):
            return _encode
        if (module, name) == ('torch._tensor', '_rebuild_from_type_v2'):
            return self._rebuild
        if module == HISTORY[0] and name in METHODS:  # since protocol 4
            return _Method()
        allowed = name in ALLOWED.get(module, ()) or (
            module in ('torch', 'torch.cuda', 'torch.storage')
            and STORAGE.fullmatch(name)
        ) or (module == 'numpy.dtypes'
              and DTYPE.fullmatch(name)) or (module == 'torch' and isinstance(
                  getattr(torch, name, None),
                  (torch.dtype, torch.layout, torch.memory_format)))
        if not allowed:
            raise Refused(f'{module}.{name}')
        return type(name, (_StandIn, ), {})

    def _getattr(self, owner: Any, name: Any = None, *default: Any) -> _Method:
        if owner is not self.known.get(HISTORY) or name not in STATISTICS:
            raise Refused('builtins.getattr')
        return _Method()

    def _rebuild(self, function: Any, kind: Any, *rest: Any) -> _StandIn:
        """A tensor with attributes; it calls the first argument."""
        makers = [
            c for (module, name), c in self.known.items()
            if module == 'torch._utils' and name.startswith('_rebuild')
        ]
        if not any(function is maker for maker in makers):
            raise Refused('torch._tensor._rebuild_from_type_v2')
        return _StandIn()

    def persistent_load(self, saved: Any) -> _StandIn:
        """Where torch refers to a tensor."""
        kind = saved[0] if isinstance(saved, tuple) and saved else saved
        if kind not in ('storage', b'storage'):
            raise Refused(f'a reference to {str(kind)[:40]!r}')
        return _StandIn()


def _encode(text: Any, encoding: Any = None, *errors: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != 'latin1' or errors:
        raise Refused('_codecs.encode')
    return text.encode('latin1')


def check_pickle(path: str, content: bool = False) -> None:
    """Refuse a file that would run code when torch opens it.

    Nothing is asked about files named in :data:`TRUST`.

    Args:
        path (str): A local file as ``torch.save`` writes it, in its zip
            format or the older one.
        content (bool): Whether to read all of it, and compare the checksums
            of its parts, which torch does not. Defaults to False.

    Raises:
        PEFTError: If it names anything that is not on the list, or is no such
            file.
    """
    if _trusted(path):
        return
    if not osp.isfile(path):
        raise PEFTError(f'{path} is no file.')
    try:
        with open(path, 'rb') as file:
            if file.read(4) == b'PK\x03\x04':
                pickles = _in_zip(path)
                for data in pickles:
                    _Unpickler(BytesIO(data)).load()
                if content:
                    _compare_checksums(path)
            else:
                file.seek(0)
                _check_old(path, file)
    except PEFTError:
        raise
    except Refused as error:
        raise PEFTError(
            f'{path} was not opened: it is a pickle that refers to {error}, '
            'which is not among the types of data that checkpoints hold, and '
            'might run code; if you trust whoever made it, set the '
            f'environment variable {TRUST}={path}.') from None
    # Whatever a broken pickle may bring about.
    except Exception as error:
        text = str(error).partition('\n')[0]
        raise PEFTError(f'{path} cannot be read as a checkpoint: it is '
                        f'damaged, or none ({type(error).__name__}'
                        f'{": " if text else ""}{text}).') from error


def _trusted(path: str) -> bool:
    named = os.environ.get(TRUST, '')
    return any(
        osp.realpath(name) == osp.realpath(path)
        for name in named.split(os.pathsep) if name)


def _in_zip(path: str) -> List[bytes]:
    """The pickle of a file in the zip format.

    Taken out by the very reader that torch.load uses: another one may see
    other records in a file that is made to deceive it.
    """
    reader = torch._C.PyTorchFileReader(path)
    records = reader.get_all_records()
    if 'constants.pkl' in records:
        raise Refused('a TorchScript program')
    if records.count('data.pkl') != 1:
        raise ValueError('there is no data.pkl in it')
    return [reader.get_record('data.pkl')]


def _compare_checksums(path: str) -> None:
    with zipfile.ZipFile(path) as archive:
        try:
            broken = archive.testzip()
        except (zipfile.BadZipFile, zlib.error) as error:
            broken = str(error)
    if broken:
        raise PEFTError(
            f'{path} is damaged: the checksum of its part {broken!r} is '
            'another one; take a copy that is whole.')


def _check_old(path: str, file: BinaryIO) -> None:
    """The format of torch before 1.6: pickles one after another."""
    try:
        tarfile.open(path, mode='r:').close()
    except (tarfile.TarError, OSError):
        pass
    else:
        # Of torch 0.1; torch.load would look into it first.
        raise ValueError('a tar archive')
    # Magic number, version, system; then the content, and what it refers to.
    magic = _Unpickler(file).load()
    if magic != torch.serialization.MAGIC_NUMBER:
        raise ValueError('torch.save did not write it')
    for _ in range(4):
        _Unpickler(file).load()
