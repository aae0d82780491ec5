"""Files that would run something, if anybody let them."""
import io
import pickle
import struct
import zipfile

import torch


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def touch(marker):
    """An object that makes a file when it is unpickled."""
    return Call(open, str(marker), 'w')


class Global:
    """Pickles as a mere name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class _Pickler(pickle._Pickler):
    dispatch = dict(pickle._Pickler.dispatch)

    def save_named(self, obj):
        """Write the name."""
        self.write(f'c{obj.module}\n{obj.name}\n'.encode())
        self.memoize(obj)

    dispatch[Global] = save_named


def dumps(obj, protocol=2):
    """Pickle, with names that need not exist."""
    file = io.BytesIO()
    _Pickler(file, protocol).dump(obj)
    return file.getvalue()


def call(function, *args):
    """Opcodes of a call of a :class:`Global`, for :func:`raw`."""
    return Call(function, *args)


def write_zip(path, data, **more):
    """A file in torch's zip format with this ``data.pkl``."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    root = next(iter(records)).split('/')[0]
    records[f'{root}/data.pkl'] = data
    records.update({f'{root}/{k}': v for k, v in more.items()})
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def by_getattr(marker):
    """Opcodes that come from a harmless class to open(), by getattr alone.

    What a list of names that has getattr on it lets through.
    """
    name = struct.pack('<I', len(str(marker))) + str(marker).encode()

    def text(value):
        return b'X' + struct.pack('<I', len(value)) + value.encode()

    get = b'c__builtin__\ngetattr\n'
    history = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
    mean = get + b'(' + history + text('mean') + b'tR'
    scope = get + b'(' + mean + text('__globals__') + b'tR'
    builtins = get + b'(' + scope + text('get') + b'tR(' + text(
        '__builtins__') + b'tR'
    opened = get + b'(' + builtins + text('get') + b'tR(' + text('open') + \
        b'tR'
    return b'\x80\x02' + opened + b'(X' + name + text('w') + b'tR.'
