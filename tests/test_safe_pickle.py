"""Which pickles are opened, and that looking at one runs nothing."""
import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import subprocess
import tarfile
import zipfile

import numpy as np
import payloads
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from payloads import Call, Global, dumps, touch

from mmpeft.errors import PEFTError
from mmpeft.safe_pickle import TRUST, check_pickle

FORMATS = ['zip', 'old']


def save(value, path, layout='zip'):
    torch.save(value, path, _use_new_zipfile_serialization=layout == 'zip')
    return str(path)


def refused(path):
    with pytest.raises(PEFTError) as error:
        check_pickle(str(path))
    text = str(error.value)
    assert str(path) in text and '\n' not in text
    return text


def everything():
    """What checkpoints of the libraries hold, and people put in theirs."""
    hub = MessageHub('test_safe_pickle')
    for i in range(3):
        hub.update_scalar('train/loss', i / 3)
    hub.update_info('eta', np.float64(3))
    hub.update_info('best', dict(path=pathlib.Path('a'), score=np.float32(1)))
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    marked = torch.ones(2)
    marked.mark = 'of FSDP'
    return dict(
        state_dict=layer.state_dict(),
        marked=marked,
        parameter=layer.weight,
        view=torch.arange(12).view(3, 4)[:, 1:],
        dtypes=[
            torch.zeros(2, dtype=d)
            for d in (torch.float16, torch.bfloat16, torch.bool, torch.int8,
                      torch.uint8, torch.complex64, torch.float64)
        ],
        names=[torch.float32,
               torch.device('cpu'),
               torch.Size([1])],
        sparse=torch.eye(3).to_sparse(),
        optimizer=optimizer.state_dict(),
        message_hub=hub.state_dict(),
        history=HistoryBuffer([1, 2], [1, 1]),
        arrays=[
            np.arange(3),
            np.asfortranarray(np.ones((2, 3), 'f4')),
            np.array(['a', b'c'], dtype=object),
            np.int64(3),
            np.bool_(True),
            np.zeros(2, dtype=[('x', 'f4')])
        ],
        meta=dict(
            cfg='a = 1',
            classes=('a', 'b'),
            args=argparse.Namespace(lr=.1),
            config=ConfigDict(a=ConfigDict(b=1)),
            when=datetime.datetime(2020, 1, 1),
            more=[{1, 2},
                  frozenset([3]), b'\xff\x00', 1j,
                  slice(1),
                  range(3),
                  collections.defaultdict(list, a=[1]),
                  collections.Counter('aa'),
                  collections.deque([1]), 2**80, ..., None][:-2]))


@pytest.mark.parametrize('layout', FORMATS)
def test_checkpoints_are_opened(tmp_path, layout):
    path = save(everything(), tmp_path / 'a.pth', layout)
    check_pickle(path)
    check_pickle(path, content=True)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_any_protocol(tmp_path, protocol):
    torch.save(everything(), tmp_path / 'a.pth', pickle_protocol=protocol)
    check_pickle(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('layout', FORMATS)
@pytest.mark.parametrize(
    'function,args', [(os.system, ('true', )),
                      (subprocess.Popen, (['true'], )), (eval, ('1', )),
                      (exec, ('1', )), (__import__, ('os', )),
                      (getattr, (HistoryBuffer, '__init__')),
                      (getattr, ('', 'join')), (torch.load, ('x', )),
                      (torch.hub.load, ('x', 'y')),
                      (torch.storage._load_from_bytes, (b'x', )),
                      (np.load, ('x', )), (pickle.loads, (b'x', )),
                      (map, (str, [])), (type, ('A', (), {})),
                      (torch.nn.Linear, (1, 1))],
    ids=lambda v: getattr(v, '__name__', None))
def test_callables_are_refused(tmp_path, layout, function, args):
    """Wherever they are, and whatever else is there."""
    value = everything()
    value['meta']['more'].append(Call(function, *args))
    text = refused(save(value, tmp_path / 'a.pth', layout))
    assert function.__name__ in text and TRUST in text


def test_looking_runs_nothing(tmp_path):
    marker = tmp_path / 'ran'
    for layout in FORMATS:
        path = save([touch(marker)], tmp_path / 'a.pth', layout)
        assert 'open' in refused(path)
        assert not marker.exists()
        # It would have.
        try:
            torch.load(path, weights_only=False)
        finally:
            assert marker.exists()
            marker.unlink()


def test_not_through_getattr(tmp_path):
    """Logs of mmengine refer to it, and it leads everywhere."""
    marker, path = tmp_path / 'ran', str(tmp_path / 'a.pth')
    payloads.write_zip(path, payloads.by_getattr(marker))
    assert 'getattr' in refused(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    'data', [
        dumps(Global('os', 'system')),
        dumps([
            Global('torch', 'load'),
            Global('collections', 'OrderedDict.__init__')
        ]),
        b'\x80\x04' + b'\x8c\x0bcollections' +
        b'\x8c\x14OrderedDict.__init__' + b'\x93.',
        b'(S\'true\'\nios\nsystem\n.',
        b'\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n}'
        b'X\x04\x00\x00\x00meanK\x01sb.',
        b'\x80\x02c__builtin__\ngetattr\n(cmmengine.logging.history_buffer\n'
        b'HistoryBuffer\nX\x04\x00\x00\x00meantR}X\x01\x00\x00\x00aK\x01sb.',
        b'\x80\x02\x82\x01.',
        b'\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\n'
        b'getattr\nctorch\nTensor\n))tR.',
        b'\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zlib'
        b'tR.',
        b'\x80\x02(X\x06\x00\x00\x00moduleX\x01\x00\x00\x00atQ.',
    ],
    ids=[
        'name', 'names', 'dotted', 'inst', 'build-class', 'build-method',
        'extension', 'rebuild', 'codec', 'module'
    ])
def test_odd_ways_to_a_name(tmp_path, data):
    payloads.write_zip(str(tmp_path / 'a.pth'), data)
    refused(tmp_path / 'a.pth')


def test_other_files_are_refused(tmp_path):
    path = tmp_path / 'a.pth'
    whole = open(save(everything(), tmp_path / 'b.pth'), 'rb').read()
    for content in (b'', b'x', whole[:1000], whole[:-30], b'PK\x03\x04' * 99,
                    pickle.dumps({}), pickle.dumps(touch(tmp_path / 'ran'))):
        path.write_bytes(content)
        refused(path)
    (tmp_path / 'folder').mkdir()
    assert 'is no file' in refused(tmp_path / 'folder')
    with tarfile.open(path, 'w') as archive:
        archive.addfile(tarfile.TarInfo('storages'), io.BytesIO())
    assert 'tar archive' in refused(path)
    scripted = torch.jit.script(torch.nn.Linear(1, 1))
    torch.jit.save(scripted, str(path))
    assert 'TorchScript' in refused(path)
    assert not (tmp_path / 'ran').exists()


def test_the_reader_is_the_one_of_torch(tmp_path):
    """A second pickle of the same name, that only some would see."""
    marker, path = tmp_path / 'ran', str(tmp_path / 'a.pth')
    good, bad = dumps({}), payloads.by_getattr(marker)
    for first, second in ((good, bad), (bad, good)):
        payloads.write_zip(path, first)
        with zipfile.ZipFile(path, 'a') as archive:
            name = next(n for n in archive.namelist()
                        if n.endswith('/data.pkl'))
            with pytest.warns(UserWarning, match='Duplicate'):
                archive.writestr(name, second)
        refused(path)
    assert not marker.exists()


def test_flipped_bits_of_tensors(tmp_path):
    """torch does not compare the checksums in its own files."""
    path = save(dict(a=torch.zeros(1000)), tmp_path / 'a.pth')
    content = bytearray(open(path, 'rb').read())
    content[content.index(bytes(4000)) + 2000] ^= 1
    open(path, 'wb').write(content)
    assert torch.load(path)['a'].any()
    check_pickle(path)
    with pytest.raises(PEFTError, match='is damaged: the checksum'):
        check_pickle(path, content=True)


def test_trust(tmp_path, monkeypatch):
    path = save([touch(tmp_path / 'ran')], tmp_path / 'a.pth')
    other = save([touch(tmp_path / 'ran')], tmp_path / 'b.pth')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TRUST, f'x{os.pathsep}./a.pth')
    check_pickle(path)
    refused(other)


def test_size_does_not_matter(tmp_path):
    """Of a file of 3 GiB, most of it a hole, little is read."""
    path, size = save(dict(a=torch.zeros(10)), tmp_path / 'a.pth'), 3 * 2**30
    with zipfile.ZipFile(path, 'a') as archive:
        info = zipfile.ZipInfo(archive.namelist()[0].split('/')[0] + '/data/9')
        info.CRC, info.file_size, info.compress_size = 0, size, size
        info.header_offset = archive.start_dir
        archive.fp.seek(archive.start_dir)
        archive.fp.write(info.FileHeader(zip64=True))
        archive.start_dir = archive.fp.tell() + size
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info
        archive._didModify = True
    assert os.path.getsize(path) > size

    def read():
        with open('/proc/self/io') as counts:
            return int(counts.readline().split()[1])

    before = read()
    check_pickle(path)
    assert read() - before < 2**20
