"""One line in the log for all frozen parameters, instead of one for each."""
import logging
import re
from collections import Counter

from mmengine.logging import MMLogger

__all__ = ['FrozenParameters', 'collapse_frozen_warnings']

# mmengine's optimizer constructor, for a config with `paramwise_cfg`.
SKIPPED = re.compile(r'(\S+) is skipped since its requires_grad=False')
# What it says of parameters that train, in between.
OPTION = 'paramwise_options -- '


class FrozenParameters(logging.Filter):
    """Counts what the optimizer leaves out because it is frozen.

    A PEFT backbone is frozen on purpose, and several hundred warnings would
    hide those that matter. Everything else passes; the line with the counts
    comes before the next message that is about something else.

    Args:
        logger (MMLogger): The logger that this is a filter of.
    """

    def __init__(self, logger: MMLogger) -> None:
        super().__init__()
        self.logger = logger
        self.parts: Counter = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged."""
        message = str(record.msg)
        skipped = SKIPPED.fullmatch(message)
        if skipped:
            # The parameters of a bare model have a point in front.
            self.parts[skipped[1].strip('.').split('.')[0]] += 1
            return False
        shown = record.levelno >= logging.INFO
        if self.parts and shown and not message.startswith(OPTION):
            self._report()
        return True

    def _report(self) -> None:
        counts = ', '.join(f'{n} in {p}' for p, n in self.parts.items())
        # First, as the line itself passes this filter.
        self.parts.clear()
        self.logger.info('Frozen parameters are left out of the optimizer: '
                         f'{counts}.')


def collapse_frozen_warnings() -> None:
    """Filter the current logger, if there is one, and once only."""
    # Asking for the current one would create it.
    if not MMLogger._instance_dict:
        return
    logger = MMLogger.get_current_instance()
    if not any(isinstance(f, FrozenParameters) for f in logger.filters):
        logger.addFilter(FrozenParameters(logger))
