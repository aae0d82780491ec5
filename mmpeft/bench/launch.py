"""The command of a run, and a process that does not outlive this one."""
import ctypes
import fcntl
import os
import os.path as osp
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

from ..errors import MissingFileError, PEFTError

__all__ = ['Launcher', 'follower', 'locked', 'start', 'tool']

_PR_SET_PDEATHSIG = 1


def tool(name: str) -> str:
    """A script of ``tools``, in a checkout or a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / 'tools', package / '.mim' / 'tools'):
        if (folder / name).is_file():
            return str(folder / name)
    raise MissingFileError(f'tools/{name} is neither beside the package nor '
                           'in it.')


@dataclass(frozen=True)
class Launcher:
    """How runs are started.

    Args:
        kind (str): 'none', 'pytorch' or 'slurm'.
        ranks (int): Processes per cell.
        srun_args (str): More arguments for srun, such as the partition.
        extra (list[str]): More arguments for ``tools/train.py``.
        script (str, optional): Run instead of ``tools/train.py``.
        warm (Warm, optional): Starts runs of the kind 'none' on a CPU, from
            a process that has imported the libraries.
    """

    kind: str = 'none'
    ranks: int = 1
    srun_args: str = ''
    extra: List[str] = field(default_factory=list)
    script: Optional[str] = None
    warm: Any = None

    def start(self, config: str, work_dir: str, arguments: List[str], log: str,
              env: Dict[str, str], lock: int):
        """Start the run that :meth:`command` describes, as :func:`start`."""
        begin = start if self.warm is None else self.warm.start
        return begin(self.command(config, work_dir, arguments), log, env, lock)

    def command(self, config: str, work_dir: str,
                arguments: List[str]) -> List[str]:
        """The command that trains a config, resuming where it was."""
        script = [
            self.script or tool('train.py'), config, '--work-dir', work_dir,
            '--resume', *arguments, *self.extra
        ]
        if self.kind == 'pytorch':
            return [
                sys.executable, '-m', 'torch.distributed.run',
                f'--nproc_per_node={self.ranks}', '--master_addr=127.0.0.1',
                f'--master_port={_free_port()}', *script, '--launcher',
                'pytorch'
            ]
        if self.kind == 'slurm':
            return [
                'srun', f'--ntasks={self.ranks}',
                f'--ntasks-per-node={min(self.ranks, 8)}',
                '--kill-on-bad-exit=1', *self.srun_args.split(),
                sys.executable, '-u', *script, '--launcher', 'slurm'
            ]
        return [sys.executable, *script]

    def devices(self, slot: int) -> Dict[str, str]:
        """The environment of the runs of a slot: its share of the GPUs.

        Without GPUs, one thread: threads that wait for each other in a busy
        loop make two runs on two cores several times slower.
        """
        import torch
        count = torch.cuda.device_count() if self.kind != 'slurm' else 0
        if not count:
            return {
                key: os.environ.get(key, '1')
                for key in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')
            }
        names = os.environ.get('CUDA_VISIBLE_DEVICES')
        names = names.split(',') if names else [str(i) for i in range(count)]
        if self.ranks > count:
            raise PEFTError(f'{self.ranks} ranks per cell, but only {count} '
                            'GPUs are visible.')
        first = slot * self.ranks % (count - count % self.ranks)
        return dict(CUDA_VISIBLE_DEVICES=','.join(names[first:first +
                                                        self.ranks]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def follower() -> Callable[[], None]:
    """A function that makes a new process end when the thread that started it
    does."""
    prctl = getattr(ctypes.CDLL(None), 'prctl', None)  # Linux has it

    def follow() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return follow


def start(command: List[str],
          log: str,
          env: Dict[str, str],
          lock: Optional[int] = None,
          out: Optional[str] = None) -> subprocess.Popen:
    """Start a run that ends when the thread that started it does.

    Args:
        command (list[str]): The command.
        log (str): Gets its output.
        env (dict): Added to the environment.
        lock (int, optional): A file that the run keeps open while it lives.
        out (str, optional): Gets its standard output alone.
    """
    # Looked up before the fork: other threads may hold the loader's lock.
    follow = follower()
    with open(log, 'w') as said, open(out or log, 'a') as output:
        return subprocess.Popen(
            command,
            env=dict(os.environ, **env),
            stdout=output,
            stderr=said if out else subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=() if lock is None else (lock, ),
            # An interrupt from the terminal is this process' business.
            start_new_session=True,
            preexec_fn=follow)


@contextmanager
def locked(path: str, wait: bool = False) -> Iterator[int]:
    """Hold a file, which whoever inherits it holds, too.

    Args:
        path (str): Made where it is not there, and left there.
        wait (bool): For whoever holds it; else that is an error.

    Raises:
        PEFTError: If another process holds it.
    """
    with open(path, 'a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise PEFTError(f'Another process runs the plan in '
                            f'{osp.dirname(path)}; let it, or stop it '
                            'first.') from None
        yield file.fileno()
