"""Our commands as a user types them, without the wait for their imports."""
import os
import os.path as osp
import subprocess
import sys
import tempfile

from mmpeft.bench.warm import Warm

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
WARM = Warm(['mmdet', 'mmpretrain', 'mmseg'])


def run_tool(name, *arguments, cwd=None, timeout=300):
    """``python tools/name arguments``, as ``subprocess.run`` returns it.

    It is forked from a process that has imported the libraries, which takes
    longer than most of what is tested. Configs find the modules of the tests.
    """
    here = os.getcwd()
    command = [sys.executable, osp.join(ROOT, 'tools', name)]
    command += map(str, arguments)
    with tempfile.TemporaryDirectory() as folder:
        files = [osp.join(folder, kind) for kind in ('out', 'err')]
        os.chdir(cwd or here)
        try:
            run = WARM.start(
                command,
                files[1],
                dict(
                    OMP_NUM_THREADS='1',
                    PYTHON=sys.executable,
                    PYTHONPATH=osp.join(ROOT, 'tests')),
                out=files[0])
        finally:
            os.chdir(here)
        try:
            status = run.wait(timeout)
        except subprocess.TimeoutExpired:
            run.terminate()
            raise
        texts = [open(file).read() for file in files]
    return subprocess.CompletedProcess(command, status, *texts)
