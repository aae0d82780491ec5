"""What the command line tools share."""
import atexit
import os
import sys
from typing import Callable

__all__ = ['run', 'leave_ranks']


def run(main: Callable[[], None]) -> None:
    """Call ``main``; an error of the user's becomes one sentence, status 2.

    mmengine re-raises errors of nested configs with the names of all classes
    on the way; the sentence meant for the user is the innermost one.
    ``--debug`` shows the traceback.
    """
    from .errors import PEFTError
    try:
        main()
        leave_ranks()
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        cause = error
        while cause is not None and not isinstance(cause, PEFTError):
            cause = cause.__cause__ or cause.__context__
        if cause is None and 'is not in the ' in str(error) and \
                'registry' in str(error) and isinstance(error, KeyError):
            # mmengine's answer to a type that nobody registered.
            cause = str(error.args[0]).split('Please check')[0].strip()
        if cause is None or '--debug' in sys.argv:
            raise
        print(f'Error: {cause}', file=sys.stderr)
        sys.exit(2)


def leave_ranks() -> None:
    """End a process of a distributed run on the CPU, after its work.

    A thread of gloo may still hold a tensor that Python knows. When it lets go
    of it while the interpreter shuts down, the process aborts ("terminate
    called without an active exception"; about one run in three with two ranks
    and torch 2.11), and torchrun reports a training that is complete as
    failed. So exit functions run as ever, but the interpreter is not taken
    apart.
    """
    torch = sys.modules.get('torch')
    if torch is None or not torch.distributed.is_available() \
            or not torch.distributed.is_initialized():
        return
    gloo = 'gloo' in torch.distributed.get_backend()
    torch.distributed.destroy_process_group()
    if gloo:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
