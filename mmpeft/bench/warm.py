"""Runs that start with the libraries imported.

Importing torch and a stock library takes about ten seconds of CPU time, which
is most of a short cell. So a process that has done it once forks them. Each is
the same script with the same arguments all the same.
"""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from multiprocessing import connection, reduction
from typing import Dict, Iterable, Iterator, List, Optional, Tuple
from unittest import mock

from .launch import follower

__all__ = ['Warm']

# One thread at a time may start or reap: the standard library looks after all
# processes whenever one starts.
_LOCK = threading.Lock()


class _Run:
    """What is used of ``subprocess.Popen``."""

    def __init__(self, process) -> None:
        self._process = process

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: Optional[float] = None) -> int:
        if not connection.wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        with _LOCK:
            self._process.join()
        return self._process.exitcode


class _Inherited:
    """A file that a run keeps open; it gets the number that it has there."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __reduce__(self):
        return _opened, (reduction.DupFd(self._file), )


def _opened(file) -> int:
    return file.detach()


class Warm:
    """Starts scripts in forks of a process that has imported modules.

    That process ends with the one that made it, and its runs with it.

    Args:
        libraries (Iterable[str]): Stock libraries, such as ``mmseg``. One
            that is not installed is left out.
    """

    def __init__(self, libraries: Iterable[str]) -> None:
        self._context = multiprocessing.get_context('forkserver')
        self._modules = [
            'mmpeft.engine.run', 'mmpeft.bench.record_hook',
            *(f'{library}.{part}' for library in sorted(libraries)
              for part in ('datasets', 'engine', 'evaluation', 'models'))
        ]

    def start(self,
              command: List[str],
              log: str,
              env: Dict[str, str],
              lock: Optional[int] = None,
              out: Optional[str] = None) -> _Run:
        """As :func:`mmpeft.bench.launch.start`; ``command`` is a Python, a
        script and its arguments."""
        env = dict(os.environ, **env)
        with _LOCK, _first_start():
            self._context.set_forkserver_preload(self._modules)
            process = self._context.Process(
                target=_run,
                args=(command[1:], (out or log, log), env, os.getcwd(),
                      None if lock is None else _Inherited(lock)))
            process.start()
        return _Run(process)


@contextmanager
def _first_start() -> Iterator[None]:
    """The first run starts the process that all are forked from: it says what
    it imports on standard error, and finds modules where this one does."""
    path = os.pathsep.join(filter(None, sys.path))
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        # Unbuffered, as its forks would say again what is in a buffer.
        with mock.patch.dict(
                os.environ, PYTHONPATH=path, PYTHONUNBUFFERED='1'):
            yield
    finally:
        os.dup2(out, 1)
        os.close(out)


def _end_with_benchmark() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(arguments: List[str], outputs: Tuple[str, str], env: Dict[str, str],
         folder: str, lock: Optional[int]) -> None:
    """In the fork: what ``python arguments...`` does. ``lock`` stays open
    until it ends."""
    # The process that it is forked from lives as long as any of them does, so
    # the end of the benchmark is watched for, too.
    follower()()
    threading.Thread(target=_end_with_benchmark, daemon=True).start()
    os.setsid()
    for path in outputs:
        open(path, 'w').close()
    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    import torch
    if 'OMP_NUM_THREADS' in env:
        # It was read when torch was imported.
        torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name='__main__')
