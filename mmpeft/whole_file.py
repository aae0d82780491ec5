"""Files that are there completely or not at all."""
import os
import os.path as osp
from contextlib import contextmanager
from typing import Iterator

from .errors import PEFTError

__all__ = ['whole_file']


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """A name to write under; what is written there becomes ``path``.

    That happens at once, after all of it is on the disk. A process that dies
    before leaves a ``*.tmp`` beside what was there.

    Args:
        path (str): The file.

    Yields:
        str: The name to write under.

    Raises:
        PEFTError: If the disk is full, or what else may go wrong with it.
    """
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        os.makedirs(osp.dirname(osp.abspath(path)), exist_ok=True)
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch says of a full disk that it got to an unexpected position.
        if isinstance(error, RuntimeError) and 'unexpected pos' not in str(
                error) and 'file write failed' not in str(error):
            raise
        text = str(error).partition('\n')[0]
        raise PEFTError(f'{path} could not be written ({text}); what was '
                        'there before has not changed.') from error
    finally:
        if osp.exists(temporary):
            os.unlink(temporary)
