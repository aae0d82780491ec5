"""The report as one HTML file that needs no other."""
import base64
import html
import re
from typing import List, Sequence

from .document import Figure, Heading, Part, Table

__all__ = ['render_html']

_STYLE = """\
:root { --ink: #1a1a1a; --soft: #595959; --line: #c8c8c8; --shade: #f3f3f3; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 64rem; background: #fff;
  color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1, h2, h3 { line-height: 1.25; margin: 2.2em 0 .6em; }
h1 { margin-top: .4em; font-size: 1.8rem; }
h2 { font-size: 1.4rem; border-bottom: 2px solid var(--ink);
  padding-bottom: .2em; }
h3 { font-size: 1.1rem; }
p, ul { max-width: 46rem; }
nav { background: var(--shade); padding: .8rem 1.2rem; max-width: 46rem; }
nav ul { margin: 0; padding-left: 1.1rem; }
nav ul ul { columns: 2; font-size: .9rem; }
a { color: inherit; }
code { font-size: .9em; background: var(--shade); padding: 0 .2em; }
.table { overflow-x: auto; margin: 1.4rem 0; }
table { border-collapse: collapse; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; color: var(--soft);
  min-width: min(36rem, 85vw); max-width: 46rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
td.text, th.text { text-align: left; }
td.long { white-space: normal; min-width: 22rem; }
thead th { border-bottom: 2px solid var(--ink); border-top: 2px solid
  var(--ink); vertical-align: bottom; white-space: normal; }
thead button { all: unset; cursor: pointer; font-weight: 600; }
thead button:focus-visible { outline: 2px solid var(--ink); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr:hover { background: var(--shade); }
figure { margin: 1.6rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .88rem; max-width: 46rem; }
@media print { body { max-width: none; font-size: 11px; }
  .table, figure { break-inside: avoid; overflow: visible; } }
"""

# A click on the head of a column sorts by it; words go below the numbers.
_SCRIPT = """\
const number = cell => {
  const found = cell.textContent.replace('\\u2212', '-')
    .match(/^[=(]?([-+]?[\\d.]+(?:e[-+]?\\d+)?)/);
  return found ? parseFloat(found[1]) : NaN;
};
for (const button of document.querySelectorAll('thead button'))
  button.addEventListener('click', () => {
    const head = button.parentElement, row = head.parentElement;
    const up = head.getAttribute('aria-sort') !== 'ascending';
    for (const other of row.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const at = [...row.children].indexOf(head);
    const body = row.closest('table').tBodies[0];
    [...body.rows].sort((a, b) => {
      const x = a.cells[at], y = b.cells[at];
      if (x.className) return (up ? 1 : -1)
        * x.textContent.localeCompare(y.textContent);
      const m = number(x), n = number(y);
      if (isNaN(m) || isNaN(n)) return isNaN(m) - isNaN(n);
      return up ? m - n : n - m;
    }).forEach(line => body.append(line));
  });
"""


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r'\[([^]]+)\]\((https?://[^)"]+)\)', r'<a href="\2">\1</a>',
                  text)
    text = re.sub(r'\*\*(.+?)\*\*', r'<b>\1</b>', text)
    text = re.sub(r'`(.+?)`', r'<code>\1</code>', text)
    return re.sub(r'(?<![\w.\-/])-(?=\d)', '\u2212', text)


def _anchor(number: int) -> str:
    return f'part-{number}'


def _table(part: Table) -> str:

    def style(index: int, text: str) -> str:
        if index >= part.texts:
            return ''
        return f' class="text{" long" if len(text) > 60 else ""}"'

    head = ''.join(f'<th scope="col"{style(i, "")}><button>{_inline(text)}'
                   '</button></th>' for i, text in enumerate(part.head))
    rows = '\n'.join('<tr>' +
                     ''.join(f'<td{style(i, text)}>{_inline(text)}</td>'
                             for i, text in enumerate(row)) + '</tr>'
                     for row in part.rows)
    return (f'<div class="table"><table><caption>{_inline(part.caption)}'
            f'</caption><thead><tr>{head}</tr></thead><tbody>\n{rows}\n'
            '</tbody></table></div>')


def _figure(part: Figure) -> str:
    data = base64.b64encode(part.png).decode()
    alt = html.escape(part.caption)
    return (f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
            f'<figcaption>{_inline(part.caption)}</figcaption></figure>')


def _contents(parts: Sequence[Part]) -> str:
    lines: List[str] = []
    depth = 1
    for number, part in enumerate(parts):
        if not isinstance(part, Heading) or part.level not in (2, 3):
            continue
        while depth < part.level:
            lines.append('<ul>')
            depth += 1
        while depth > part.level:
            lines.append('</ul>')
            depth -= 1
        lines.append(f'<li><a href="#{_anchor(number)}">{_inline(part.text)}'
                     '</a></li>')
    lines += ['</ul>'] * (depth - 1)
    return '<nav>' + ''.join(lines) + '</nav>'


def render_html(parts: Sequence[Part], title: str) -> str:
    """The page; pictures, style and script are in it."""
    body: List[str] = []
    for number, part in enumerate(parts):
        if isinstance(part, Heading):
            body.append(f'<h{part.level} id="{_anchor(number)}">'
                        f'{_inline(part.text)}</h{part.level}>')
            if part.level == 1:
                body.append(_contents(parts))
        elif isinstance(part, Table):
            body.append(_table(part))
        elif isinstance(part, Figure):
            body.append(_figure(part))
        elif part.items:
            items = ''.join(f'<li>{_inline(i)}</li>' for i in part.items)
            body.append(f'<ul>{items}</ul>')
        else:
            body.append(f'<p>{_inline(part.text)}</p>')
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta '
            'charset="utf-8">\n<meta name="viewport" '
            'content="width=device-width, initial-scale=1">\n'
            f'<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n'
            '</head>\n<body>\n' + '\n'.join(body) +
            f'\n<script>\n{_SCRIPT}</script>\n</body>\n</html>\n')
