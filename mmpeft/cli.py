"""What the command line tools share."""
import sys
from typing import Callable

__all__ = ['run']


def run(main: Callable[[], None]) -> None:
    """Call ``main``; an error of the user's becomes one sentence, status 2.

    mmengine re-raises errors of nested configs with the names of all classes
    on the way; the sentence meant for the user is the innermost one.
    ``--debug`` shows the traceback.
    """
    from .errors import PEFTError
    try:
        main()
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
