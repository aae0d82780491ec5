"""``mim train mmpeft`` and ``mim download mmpeft``, with mmpeft from a wheel.

mim pins old packages, so no environment of ours has it: ``MMPEFT_MIM`` names
a folder with it, made as ``requirements/lock/mim.txt`` says.
"""
import functools
import http.server
import os
import threading

import pytest
import torch
import yaml
from downstream import DETECTOR, Repository, build_wheel, options
from mmengine.config import Config

pytest.importorskip('mmdet')
MIM = os.environ.get('MMPEFT_MIM', '')
if not MIM:
    pytest.importorskip(
        'mim', reason='mim is not installed, and MMPEFT_MIM names no folder')


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
    repo = Repository(
        tmp_path_factory.mktemp('mim'), build_wheel(tmp_path_factory))
    repo.add_data()
    repo.add_weights()
    repo.write(
        'configs/mine.py', "_base_ = 'mmpeft::mona/mask-rcnn_swin-b_coco.py'\n"
        'model = dict(backbone=dict(method=dict(dim=4)))\n')
    return repo


def mim(repository, *args):
    return repository.run('-m', 'mim', *args, path=[MIM] if MIM else [])


def test_train(repository):
    """A config of theirs that inherits by name."""
    out = mim(repository, 'train', 'mmpeft', 'configs/mine.py', '--gpus', '0',
              '--work-dir', 'run', *options(DETECTOR))
    assert str(repository.mim / 'tools' / 'train.py') in out
    checkpoint = torch.load(
        repository.folder / 'run' / 'epoch_1.pth', weights_only=False)
    assert any('.peft.mona.' in k for k in checkpoint['state_dict'])


def test_search_and_download(repository):
    """No weights are released yet, so one model gets some here."""
    names = mim(repository, 'search', 'mmpeft', '--valid-config')
    assert 'mona_mask-rcnn_swin-b_coco' in names
    folder = repository.folder / 'released'
    folder.mkdir()
    (folder / 'mona.pth').write_bytes(b'weights')
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    metafile = repository.mim / 'configs' / 'mona' / 'metafile.yml'
    content = yaml.safe_load(metafile.read_text())
    names = ('mona_mask-rcnn_swin-b_coco', 'mona_upernet_swin-l_ade20k')
    for model in content['Models']:
        if model['Name'] in names:
            port = server.server_address[1]
            model['Weights'] = f'http://127.0.0.1:{port}/mona.pth'
    metafile.write_text(yaml.safe_dump(content))
    try:
        for name in names:
            mim(repository, 'download', 'mmpeft', '--config', name, '--dest',
                name)
    finally:
        server.shutdown()
    for name in names:
        folder = repository.folder / name
        assert (folder / 'mona.pth').read_bytes() == b'weights'
        backbone = Config.fromfile(folder / f'{name}.py').model.backbone
        assert backbone.type == 'mmpeft.PEFTBackbone'
        assert backbone.method.type == 'Mona'
