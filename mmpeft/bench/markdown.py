"""Numbers, tables and paragraphs of a Markdown page."""
from statistics import mean, stdev
from textwrap import fill
from typing import List, Sequence

__all__ = ['spread', 'table', 'fold']


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``mean ± sample standard deviation``, or the one value."""
    if not values:
        return 'not measured'
    text = f'{mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' ± {stdev(values):.{digits}f}'
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the columns aligned, as mdformat does it."""
    lines: List[Sequence[str]] = [head, [''] * len(head), *rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines[1] = ['-' * width for width in widths]
    return '\n'.join(
        '| ' +
        ' | '.join(text.ljust(width)
                   for text, width in zip(line, widths)) + ' |'
        for line in lines)


def fold(text: str) -> str:
    """Wraps paragraphs and lists to 79 columns; the rest stays."""
    blocks = []
    for block in text.split('\n\n'):
        if not block.startswith(('|', '#', '```', '![')):
            mark = '- ' if block.startswith('- ') else ''
            items = block[len(mark):].split('\n- ') if mark else [block]
            block = '\n'.join(
                fill(
                    ' '.join(item.split()),
                    79,
                    initial_indent=mark,
                    subsequent_indent=' ' * len(mark),
                    break_long_words=False,
                    break_on_hyphens=False) for item in items)
        blocks.append(block)
    return '\n\n'.join(blocks)
