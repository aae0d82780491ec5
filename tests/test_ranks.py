"""Two ranks do what one process does, for every method."""
import json
import os
import os.path as osp
import subprocess
import sys

import pytest
from conftest import METHODS, family_of, method_of
from kinds import KINDS

from mmpeft.engine.listing import refusal

HERE = osp.dirname(osp.abspath(__file__))


@pytest.mark.dist
@pytest.mark.parametrize('kinds', [
    ('mmdet', 'vit_mmseg'),
    pytest.param(('mit', 'timm_vit', 'beit'), marks=pytest.mark.slow),
])
def test_two_ranks_equal_one_process(tmp_path, kinds):
    """Without ``find_unused_parameters``: a parameter that gets no gradient
    would stop the second step."""
    for kind in kinds:
        for package in (KINDS[kind].library, *KINDS[kind].packages):
            pytest.importorskip(package)
    out = str(tmp_path / 'gaps.json')
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
        f'--master_port={29100 + os.getpid() % 500}',
        osp.join(HERE, 'ranks.py'), out, *kinds
    ]
    env = dict(os.environ, PYTHONPATH=osp.dirname(HERE), OMP_NUM_THREADS='1')
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    gaps = json.load(open(out))
    assert set(gaps) == set(kinds)
    for kind, found in gaps.items():
        family = family_of(kind)
        assert set(found) == {
            name
            for name in METHODS
            if name != 'Frozen' and not refusal(method_of(name), family)
        }
    wrong = {
        (kind, name): gap
        for kind, found in gaps.items()
        for name, gap in found.items() if not gap <= 1e-9
    }
    assert not wrong, wrong
