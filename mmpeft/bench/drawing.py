"""What the pictures of a report share: black on white, no colours."""
import io
from contextlib import contextmanager
from typing import Iterator

from ..errors import PEFTError

__all__ = ['sheet', 'png']

_STYLE = {
    'font.family': 'DejaVu Sans',  # comes with matplotlib
    'font.size': 9.5,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': '.2',
    'axes.axisbelow': True,
    'hatch.linewidth': .7
}


@contextmanager
def sheet(width: float, height: float) -> Iterator:
    """An empty matplotlib figure, in inches, that needs no screen.

    Raises:
        PEFTError: Without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise PEFTError(
            'The figures of a report need matplotlib, which is not installed: '
            'run pip install matplotlib, or write the report without figures '
            '(figures=False).') from None
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout='constrained')


def png(figure) -> bytes:
    """The picture, the same bytes for the same numbers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=160, metadata=dict(Software=None))
    return buffer.getvalue()
