"""Every method by its name on the command line."""
import json

import pytest
from test_tools import ROOT, command

from mmpeft.engine.listing import list_methods, refusal
from mmpeft.methods import Mona, VPTDeep
from mmpeft.registry import METHODS

pytest.importorskip('mmdet')

CONFIG = f'{ROOT}/configs/full/mask-rcnn_swin-nano_shapes.py'
# The default sizes of these are made for wider backbones than the demo's.
NARROW = dict(
    Adapter='dim=8',
    AdaptFormer='dim=8',
    Mona='dim=8',
    LoRA='rank=8',
    DoRA='rank=8',
    BAPAT='dim=8,adaptformer_dim=8',
    SCT='num_channels=8')


def test_list():
    done = command('list_methods.py', '--json')
    rows = json.loads(done.stdout)
    assert {r['method'] for r in rows} == set(METHODS.module_dict)
    assert all(r['what'] and r['families'] for r in rows)
    merging = {r['method']: r['merges'] for r in rows}
    assert merging['LoRA'] is True and 'tokens' in merging['VPTDeep']
    shown = command('list_methods.py').stdout
    assert all(r['method'] in shown for r in rows)
    pairs = len(rows) * len(rows[0]['families'])
    assert f'of {pairs} pairs are refused' in shown


def test_a_refusal_has_a_reason():

    class Ungridded:
        refused = dict(tokens='its windows are fixed')
        has_grid = False

    assert 'grid' in refusal(Mona, Ungridded)
    assert refusal(VPTDeep, Ungridded) == 'tokens: its windows are fixed'


def test_count_params_takes_every_name():
    names = [r['method'] for r in list_methods() if not r['families']['Swin']]
    assert len(names) > 30
    methods = [
        name + (f':{NARROW[name]}' if name in NARROW else '') for name in names
    ]
    options = [word for m in methods for word in ('--method', m)]
    done = command('count_params.py', CONFIG, *options, '--json')
    rows = {r['method']: r for r in json.loads(done.stdout)}
    assert set(rows) == set(methods)
    for name, method in zip(names, methods):
        trains = rows[method]['backbone_trainable']
        assert (trains > 0) == (name != 'Frozen'), name


def test_a_typo_gets_the_nearest_name():
    done = command('count_params.py', CONFIG, '--method', 'VPTDep', status=2)
    assert "did you mean 'VPTDeep'" in done.stderr
    assert all(name in done.stderr for name in METHODS.module_dict)
