"""Deltas of every format there was still load, and compute the same."""
import os.path as osp
from dataclasses import asdict

import pytest
import torch

import mmpeft
from mmpeft.delta_file import FORMAT_VERSION, read_delta, read_header
from mmpeft.errors import PEFTError

pytest.importorskip('mmdet')

import golden  # noqa: E402

DATA = osp.join(osp.dirname(osp.abspath(__file__)), 'data')
#: What ``golden.py`` printed when it wrote the file.
RECORDED = {
    1: [
        -0.8472988605499268, -0.6592915058135986, 0.5151251279265565,
        0.5062938290571162
    ],
}


def path(version):
    return osp.join(DATA, f'delta_v{version}.safetensors')


def test_every_format_has_a_file():
    """Whoever raises FORMAT_VERSION adds one."""
    versions = list(range(1, FORMAT_VERSION + 1))
    assert sorted(RECORDED) == versions, 'see tests/data/README.md'
    assert sorted(golden.MODELS) == versions
    assert [read_header(path(v)).format_version for v in versions] == versions


@pytest.mark.parametrize('version', RECORDED)
def test_loads_and_computes_the_same(version):
    model = golden.MODELS[version](trained=False)
    assert golden.features(model) != pytest.approx(RECORDED[version], abs=.01)
    header = mmpeft.load_delta(model, path(version))
    assert golden.features(model) == pytest.approx(RECORDED[version], abs=1e-5)
    assert header.meta == golden.META
    assert header.base['sources'] == [golden.SOURCE]


@pytest.mark.parametrize('version', RECORDED)
def test_is_put_on_the_stock_model(version):
    """By the methods of the header, built with their arguments of then."""
    stock = golden.MODELS[version](trained=False)
    mmpeft.injection.eject(stock.backbone)
    mmpeft.attach(stock, path(version), 'old')
    assert golden.features(stock) == pytest.approx(RECORDED[version], abs=1e-5)


def test_is_what_is_written_today(tmp_path):
    """Else the format changed, and its number did not."""
    file = str(tmp_path / 'x_delta.safetensors')
    model = golden.MODELS[FORMAT_VERSION](trained=True)
    mmpeft.save_delta(model, file, [golden.SOURCE], golden.META)
    tensors, header = read_delta(file)
    recorded, then = read_delta(path(FORMAT_VERSION))
    assert tensors.keys() == recorded.keys()
    assert all(torch.equal(v, recorded[k]) for k, v in tensors.items())
    now, then = asdict(header), asdict(then)
    for entry in (now, then):
        entry.pop('packages')
    assert now == then


def test_arguments_that_came_later_have_their_defaults(tmp_path):
    """A delta from before they were there is one with the default."""
    file = str(tmp_path / 'x_delta.safetensors')
    tensors, header = read_delta(path(1))
    method = header.backbones['backbone']['method'][0]
    del method['init'], method['rslora']
    mmpeft.delta_file.write_delta(file, tensors, header)
    model = golden.MODELS[1](trained=False)
    mmpeft.load_delta(model, file)
    assert golden.features(model) == pytest.approx(RECORDED[1], abs=1e-5)
    del method['alpha']
    mmpeft.delta_file.write_delta(file, tensors, header)
    with pytest.raises(PEFTError, match='holds LoRA.*backbone has LoRA'):
        mmpeft.load_delta(golden.MODELS[1](trained=False), file)


def test_headers_of_every_length(tmp_path):
    """The first bytes of a file are the length of its header, and may be
    those of another kind of file."""
    tensors, header = read_delta(path(1))
    first = set()
    for number in range(0, 256, 8):
        file = str(tmp_path / f'{number}_delta.safetensors')
        header.meta = dict(padding='x' * number)
        mmpeft.delta_file.write_delta(file, tensors, header)
        with open(file, 'rb') as content:
            first.add(content.read(1)[0])
        found, _ = read_delta(file)
        assert found.keys() == tensors.keys()
    assert first == set(range(0, 256, 8))
