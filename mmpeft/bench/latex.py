"""The tables of a report for a paper; they need the package booktabs."""
import re
from typing import Sequence

from .document import Part, Table

__all__ = ['render_latex']

_SPECIAL = {
    '\\': r'\textbackslash{}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '±': r'$\pm$',
    '−': '$-$',
    '–': '--',
    '→': r'$\rightarrow$',
    '×': r'$\times$',
    'ρ': r'$\rho$',
    'τ': r'$\tau$',
    **{
        char: '\\' + char
        for char in '&%$#_{}'
    }
}
_SIGN = re.compile(r'(?<![\w.])[-](?=\d)')


def _escape(text: str) -> str:
    text = _SIGN.sub('−', text)  # a hyphen before a number is a minus
    return ''.join(_SPECIAL.get(char, char) for char in text)


def _cell(text: str) -> str:
    text = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', text)
    text = _escape(text)
    text = re.sub(r'\*\*(.+?)\*\*', r'\\textbf{\1}', text)
    return re.sub(r'`(.+?)`', r'\\texttt{\1}', text)


def _table(part: Table) -> str:
    columns = 'l' * part.texts + 'r' * (len(part.head) - part.texts)
    lines = [' & '.join(map(_cell, row)) + r' \\' for row in part.rows]
    return '\n'.join([
        r'\begin{table}', r'\centering', rf'\caption{{{_cell(part.caption)}}}',
        rf'\label{{tab:{part.label}}}', rf'\begin{{tabular}}{{{columns}}}',
        r'\toprule', ' & '.join(map(_cell, part.head)) + r' \\', r'\midrule',
        *lines, r'\bottomrule', r'\end{tabular}', r'\end{table}'
    ])


def render_latex(parts: Sequence[Part]) -> str:
    r"""All tables, to be taken in with ``\input`` where booktabs is loaded."""
    tables = [_table(part) for part in parts if isinstance(part, Table)]
    return '% needs \\usepackage{booktabs}\n' + '\n\n'.join(tables) + '\n'
