"""Gets mmcv with its operators: a ready wheel, or compiled once and kept.

A wheel fits one torch and one Python only (another one fails with ``undefined
symbol``), and pip's own cache does not know that, so it never serves one.
"""
import glob
import os
import platform
import re
import shutil
import subprocess

from env_checks import check_compiler
from env_steps import clean_environ, say

CHECK = """
import torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 30., 9.]])
assert nms(boxes, torch.tensor([.9, .8, .7]), 0.5)[1].tolist() == [0, 2]
"""


def cuda_major(pins):
    """The CUDA version that the pinned torch is built with, e.g. ``'13'``."""
    for name in ('cuda-toolkit', 'nvidia-cublas-cu12', 'nvidia-cublas'):
        if name in pins:
            return pins[name].split('.')[0]
    return None


def build_flavour(pins):
    """Whether operators for the GPU can be compiled here.

    Args:
        pins (dict[str, str]): Version of each package.

    Returns:
        tuple[str, str]: ``'cuda'`` or ``'cpu'``, and a remark for the user.
    """
    smi = shutil.which('nvidia-smi')
    if smi is None or subprocess.call(
        [smi, '-L'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        return 'cpu', ''
    wanted = cuda_major(pins)
    home = os.environ.get('CUDA_HOME') or '/usr/local/cuda'
    nvcc = shutil.which('nvcc') or shutil.which(os.path.join(home, 'bin/nvcc'))
    found = None
    if nvcc:
        output = subprocess.run([nvcc, '--version'], stdout=subprocess.PIPE)
        match = re.search(r'release (\d+)', output.stdout.decode())
        found = match and match.group(1)
    if found == wanted:
        return 'cuda', ''
    return 'cpu', (f'There is a GPU, but nvcc is {found or "missing"} and '
                   f'torch wants CUDA {wanted}: mmcv gets operators for the '
                   'CPU only. ')


class MMCV:
    """Gets mmcv for one stack.

    Args:
        stack (str): Name of the stack.
        pins (dict[str, str]): Version of each package.
        cache_dir (str): Folder below which compiled wheels are kept.
        python (dict): Interpreter, see ``env_checks.probe_python``.
    """

    def __init__(self, stack, pins, cache_dir, python):
        self.stack = stack
        self.name = 'mmcv' if 'mmcv' in pins else 'onedl-mmcv'
        self.version = pins[self.name]
        self.python = python
        self.flavour, self.remark = build_flavour(pins)
        self.kept_dir = os.path.join(
            cache_dir, 'wheels',
            f'{stack}-torch{pins["torch"]}-py{python["version"]}-'
            f'{platform.machine()}-{self.flavour}')

    def find(self):
        """Ready wheels, the most preferred first.

        Returns:
            list[str]: Paths.
        """
        folders = [self.kept_dir]
        named = os.environ.get('MMPEFT_WHEEL_DIR')
        if named:
            folders.insert(0, os.path.join(named, self.stack))
        tag = 'cp' + self.python['version'].replace('.', '')
        pattern = (f'{self.name.replace("-", "_")}-{self.version}-{tag}-*'
                   f'{platform.machine()}.whl')
        return [
            path for folder in folders
            for path in sorted(glob.glob(os.path.join(folder, pattern)))
        ]

    def install(self, steps, env_python):
        """Installs mmcv into an environment that has torch.

        Args:
            steps (Steps): Runs the commands; one step is taken.
            env_python (str): Interpreter of the environment.
        """
        for wheel in self.find():
            if steps(
                    f'Installing {self.name} {self.version} from {wheel}',
                    *self._commands(wheel, env_python),
                    required=False):
                return
        check_compiler(self.python)
        self._build(steps, env_python)

    @staticmethod
    def _commands(wheel, env_python):
        return [
            env_python, '-m', 'pip', 'install', '--no-deps', '--no-index',
            '--no-cache-dir', '--force-reinstall', wheel
        ], [env_python, '-c', CHECK]

    def _build(self, steps, env_python):
        say(f'{self.remark}There is no ready wheel of {self.name} '
            f'{self.version} that works with this torch and Python, so its '
            'C++ operators are compiled. This takes 13-18 minutes on two '
            f'cores, once: the wheel is kept in {self.kept_dir}')
        work = os.path.join(os.path.dirname(steps.log), 'mmcv-build')
        environ = clean_environ(
            MMCV_WITH_OPS='1',
            MAX_JOBS=os.environ.get('MAX_JOBS') or str(max_jobs()),
            # setuptools lets CFLAGS replace Python's own flags; without debug
            # information it takes less memory and time
            CFLAGS='-O3 -DNDEBUG -fwrapv -g0')
        if self.flavour == 'cpu':
            environ.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')
        built = os.path.join(work, 'built')
        steps(
            f'Compiling {self.name} {self.version} for {self.flavour} '
            f'({environ["MAX_JOBS"]} files at a time)', [
                env_python, '-m', 'pip', 'wheel', '-v', '--no-deps',
                '--no-build-isolation', '--no-cache-dir', '--no-binary',
                self.name, f'{self.name}=={self.version}', '-w', built
            ],
            environ=environ,
            progress=r'\[(\d+)/(\d+)\]')
        wheel, = glob.glob(os.path.join(built, '*.whl'))
        wheel = strip(wheel, os.path.join(work, 'stripped'), env_python,
                      steps.log)
        os.makedirs(self.kept_dir, exist_ok=True)
        kept = os.path.join(self.kept_dir, os.path.basename(wheel))
        # kept before it is tried: whatever is wrong with it, looking at it
        # beats compiling it again; find() offers it, a failure rebuilds it
        shutil.copyfile(wheel, kept + '.part')
        os.replace(kept + '.part', kept)
        shutil.rmtree(work)
        steps.done -= 1  # compiling and installing are one of the steps
        steps(f'Installing {self.name} {self.version}',
              *self._commands(kept, env_python))


def max_jobs():
    """Compilers at a time: one per core if each has 1.5 GB of memory."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(cores, int(memory / 1.5e9)))


def strip(wheel, folder, env_python, log):
    """Takes the symbols that nobody needs out of a wheel's libraries.

    Args:
        wheel (str): Path of the wheel.
        folder (str): New folder for the smaller one.
        env_python (str): Interpreter that has the ``wheel`` package.
        log (str): File for the output.

    Returns:
        str: Path of the smaller wheel, or of ``wheel`` if it cannot be done.
    """
    if shutil.which('strip') is None:
        return wheel
    with open(log, 'a') as f:

        def call(*command):
            return subprocess.call(
                command, stdout=f, stderr=subprocess.STDOUT) == 0

        unpacked = os.path.join(folder, 'unpacked')
        os.makedirs(unpacked)
        if not call(env_python, '-m', 'wheel', 'unpack', wheel, '-d',
                    unpacked):
            return wheel
        root, = glob.glob(os.path.join(unpacked, '*'))
        libraries = glob.glob(
            os.path.join(root, '**', '_ext*.so'), recursive=True)
        if not all(call('strip', '--strip-unneeded', x) for x in libraries):
            return wheel
        if not call(env_python, '-m', 'wheel', 'pack', root, '-d', folder):
            return wheel
    return glob.glob(os.path.join(folder, '*.whl'))[0]
