"""Two ranks do what one process does, for every method."""
import json
import os
import os.path as osp
import subprocess
import sys

import pytest
from conftest import METHODS

HERE = osp.dirname(osp.abspath(__file__))


@pytest.mark.dist
def test_two_ranks_equal_one_process(tmp_path):
    """Without ``find_unused_parameters``: a parameter that gets no gradient
    would stop the second step."""
    pytest.importorskip('mmdet')
    out = str(tmp_path / 'gaps.json')
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
        f'--master_port={29100 + os.getpid() % 500}',
        osp.join(HERE, 'ranks.py'), out
    ]
    env = dict(os.environ, PYTHONPATH=osp.dirname(HERE), OMP_NUM_THREADS='1')
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    gaps = json.load(open(out))
    assert set(gaps) == set(METHODS) - {'Frozen'}
    wrong = {name: gap for name, gap in gaps.items() if not gap <= 1e-5}
    assert not wrong, wrong
