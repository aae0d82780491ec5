"""Numbers, tables and paragraphs of a Markdown page."""
from statistics import mean, stdev
from textwrap import fill


def spread(values: list[float]) -> str:
    """``mean ± sample standard deviation``, or the one value."""
    if not values:
        return 'not measured'
    if len(values) == 1:
        return f'{values[0]:.2f}'
    return f'{mean(values):.2f} ± {stdev(values):.2f}'


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table with the columns aligned, as mdformat does it."""
    lines = [head, [''] * len(head), *rows]
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
        if not block.startswith(('|', '#', '```')):
            items = block.split('\n- ') if block.startswith('- ') else [block]
            items[0] = items[0].removeprefix('- ')
            mark = '- ' if block.startswith('- ') else ''
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
