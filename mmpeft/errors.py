"""Errors a user can act on.

The command line tools print exactly one sentence of these and exit with
status 2, so every message says what is wrong, the numbers or names involved,
and the way out.
"""

__all__ = ['PEFTError', 'SiteError', 'MergeError', 'MissingFileError']


class PEFTError(ValueError):
    """A configuration, model or file that mmpeft cannot work with."""


class SiteError(PEFTError):
    """A method needs a place that the backbone does not offer."""


class MergeError(PEFTError):
    """Merging would not be exact."""


class MissingFileError(PEFTError, FileNotFoundError):
    """A data set, annotation or weight file is not where it should be."""

    # FileNotFoundError formats (errno, strerror) pairs; one sentence is all
    # a user needs.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ''
