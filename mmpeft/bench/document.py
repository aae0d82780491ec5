"""A report as a list of parts, which Markdown, HTML and LaTeX share.

Text may hold ``**bold**``, `` `code` `` and ``[text](address)``.
"""
from dataclasses import dataclass, field
from typing import List, Sequence, Union

from .markdown import fold, table

__all__ = ['Heading', 'Text', 'Table', 'Figure', 'Part', 'render_markdown']


@dataclass
class Heading:
    """A heading; the page's own has level 1."""
    level: int
    text: str


@dataclass
class Text:
    """A paragraph, or the items of a list."""
    text: str = ''
    items: List[str] = field(default_factory=list)


@dataclass
class Table:
    """A table with a caption.

    Args:
        label (str): Unique; names it in LaTeX.
        caption (str): A sentence, with the units.
        head (Sequence[str]): Column names.
        rows (Sequence[Sequence[str]]): Cells.
        texts (int): So many columns on the left are words; the others are
            numbers and aligned to the right. Defaults to 1.
    """
    label: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass
class Figure:
    """A picture.

    Args:
        file (str): Name of the file, beside the report.
        caption (str): What is drawn, with the units.
        png (bytes): The picture.
    """
    file: str
    caption: str
    png: bytes


Part = Union[Heading, Text, Table, Figure]


def render_markdown(parts: Sequence[Part]) -> str:
    """The page; its pictures are files beside it."""
    return '\n\n'.join(fold(_markdown(part)) for part in parts) + '\n'


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return '#' * part.level + ' ' + part.text
    if isinstance(part, Table):
        return part.caption + '\n\n' + table(part.head, part.rows)
    if isinstance(part, Figure):
        return f'![{part.caption}]({part.file})\n\n{part.caption}'
    return part.text or '- ' + '\n- '.join(part.items)
