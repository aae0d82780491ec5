"""How models are measured."""
import ctypes
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Callable, Dict, Optional, Tuple

import torch

from ..errors import PEFTError

__all__ = [
    'DTYPES', 'Progress', 'Settings', 'clock_of', 'keep_freed_memory', 'quiet'
]

DTYPES = dict(
    fp16=torch.float16,
    bf16=torch.bfloat16,
    fp32=torch.float32,
    fp64=torch.float64)

#: Told what begins, and once with ``more``, how often that will be.
Progress = Callable[..., None]


def quiet(what: str = '', more: int = 0) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Attributes:
        batch_size (int): Images.
        image_size (tuple[int, int]): Their height and width.
        repeats (int): Rounds that count; with 0 nothing is timed.
        device (str): Such as ``cpu`` or ``cuda:0``.
        backbone_only (bool): The backbone without neck and head.
        dtype (str): Of weights and images, one of ``DTYPES``.
        amp (str, optional): Precision of autocast, None for none.
        with_cp (bool): The rows, but for the reference, with checkpointing.
        clock (str): ``wall``, or ``cpu`` for the time of this process.
        threads (int, optional): Of torch on the CPU.
        latency (bool): Whether inference is timed, too; about as long as the
            steps again.
        operations (bool): Whether it is said what a step spends its time on.
        keeps_memory (bool): Whether freed memory is used again, see
            :func:`keep_freed_memory`.
    """

    batch_size: int = 2
    image_size: Tuple[int, int] = (512, 512)
    repeats: int = 5
    device: str = 'cpu'
    backbone_only: bool = False
    dtype: str = 'fp32'
    amp: Optional[str] = None
    with_cp: bool = False
    clock: str = 'wall'
    threads: Optional[int] = None
    latency: bool = True
    operations: bool = False
    keeps_memory: bool = False

    @property
    def autocast(self) -> Optional[torch.dtype]:
        """Precision of autocast."""
        return None if self.amp is None else DTYPES[self.amp]

    def checked(self) -> 'Settings':
        """The same, ready: threads are set, and what was left open is said.

        Raises:
            PEFTError: If something is out of range or not there.
        """
        bounds = dict(
            batch_size=(self.batch_size, 1),
            image_size=(min(self.image_size), 1),
            repeats=(self.repeats, 0),
            threads=(1 if self.threads is None else self.threads, 1))
        for name, (value, least) in bounds.items():
            if value < least:
                option = '--' + name.replace('_', '-')
                raise PEFTError(f'{option} must be at least {least}, but got '
                                f'{value}.')
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            line = str(error).splitlines()[0]
            raise PEFTError(f'--device {self.device} cannot be used here '
                            f'({line}); --device cpu can.') from error
        threads = self.threads
        if self.clock == 'cpu':
            if self.device != 'cpu' or (threads or 1) > 1:
                raise PEFTError('--clock cpu adds up the time of all threads '
                                'of this process: it measures --device cpu '
                                'with --threads 1.')
            threads = 1
        if threads is not None:
            torch.set_num_threads(threads)
        return replace(self, threads=torch.get_num_threads())

    def to_dict(self) -> Dict[str, Any]:
        """For one who reads the results."""
        return dict(asdict(self), torch=torch.__version__)


def keep_freed_memory() -> bool:
    """Make this process use freed memory again, as PyTorch does on a GPU.

    By default glibc gives large blocks back to the system at once and gets
    each anew, page by page: a map of 48 MiB took 30 ms to double, 6 ms with
    memory that was there (one core of an AMD EPYC).

    Returns:
        bool: Whether it is so from here on; it is not without glibc.
    """
    # malloc.h: M_MMAP_MAX and M_TRIM_THRESHOLD.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return mallopt(-4, 0) == 1 and mallopt(-1, -1) == 1


def clock_of(settings: Settings) -> Dict[str, Callable]:
    """Arguments of :func:`mmpeft.engine.measure.interleave`."""
    wait = torch.cuda.synchronize if settings.device.startswith('cuda') else \
        (lambda: None)
    clock = time.process_time if settings.clock == 'cpu' else time.perf_counter
    return dict(clock=clock, synchronize=wait)
