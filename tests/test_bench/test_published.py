"""Printed numbers: their sources, their means, and the formula of PPT."""
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from mmpeft.bench.published import (ppt_cells, read_published, read_sources,
                                    render_cells)
from mmpeft.bench.published.load import FOLDER
from mmpeft.counting import ppt_factor

ROOT = Path(__file__).resolve().parents[2]
ROWS = read_published()


def test_every_row_has_a_source_and_a_number():
    sources = read_sources()
    assert {row['source'] for row in ROWS} == set(sources)
    for row in ROWS:
        assert row['name'] and row['task'] and row['model'] and row['metric']
        assert 0 < float(row['value']) < 100
        for name in ('params_m', 'ppt', 'memory_mb'):
            assert row[name] == '' or float(row[name]) >= 0
    for source in sources.values():
        assert source['url'].startswith('https://github.com/')
        assert source['table']
    files = {source['file'] for source in sources.values()}
    assert files | {'sources.csv'} == {f.name for f in FOLDER.glob('*.csv')}


def test_no_cell_twice():
    keys = Counter((r['source'], r['model'], r['task'], r['metric'], r['name'])
                   for r in ROWS)
    assert set(keys.values()) == {1}


def test_size_of_the_tables():
    """As in the README: methods times data sets, with the means."""
    counts = Counter(row['source'] for row in ROWS)
    assert counts['v-petl-fgvc'] == 15 * 6
    assert counts['v-petl-vtab'] == 20 * 20
    assert counts['v-petl-video'] == 11 * 2
    assert counts['v-petl-coco'] == counts['v-petl-voc-ade20k'] == 11 * 2


@pytest.mark.parametrize('suite,size', [('fgvc', 5), ('vtab-1k', 19)])
def test_printed_means(suite, size):
    """A slip of the pen in a cell would move the mean of its row."""
    cells = defaultdict(list)
    for row in ROWS:
        if row['task'].startswith(suite + '/'):
            cells[row['name']].append(float(row['value']))
    means = {r['name']: float(r['value']) for r in ROWS if r['task'] == suite}
    assert set(means) == set(cells)
    for name, values in cells.items():
        assert len(values) == size
        assert sum(values) / size == pytest.approx(means[name], abs=.0051)


def test_formula_gives_the_printed_cells():
    cells = ppt_cells()
    verdicts = Counter(cell.verdict for cell in cells)
    assert verdicts == dict(equal=84, rounding=2, different=5)
    different = [(c.row['task'], c.row['name']) for c in cells
                 if c.verdict == 'different']
    assert different == [('fgvc', 'GPS'), ('vtab-1k', 'BitFit'),
                         ('vtab-1k', 'RepAdapter'), ('vtab-1k', 'DTL'),
                         ('ade20k', 'Partial-1')]
    assert all(bool(c.reason) == (c.verdict != 'equal') for c in cells)


def test_needed_parameters_give_the_printed_cell():
    for cell in ppt_cells():
        value, printed = float(cell.row['value']), float(cell.row['ppt'])
        for millions in cell.needed:
            if millions > 0:
                ppt = value / 100 * ppt_factor(millions * 1e6)
                assert abs(ppt - printed) == pytest.approx(.005, abs=1e-6)
        inside = (
            cell.needed[0] <= float(cell.row['params_m']) <= cell.needed[1])
        assert inside == (cell.verdict == 'equal')


def test_page_has_the_list():
    page = (ROOT / 'docs' / 'en' / 'published.md').read_text()
    first, table = render_cells().split('\n\n')
    assert table in page
    assert first in ' '.join(page.split())


def test_import_of_mmpeft_leaves_it_alone():
    code = ('import sys, mmpeft; print([m for m in sys.modules '
            "if m.startswith('mmpeft.bench')])")
    output = subprocess.run([sys.executable, '-c', code],
                            cwd=ROOT,
                            check=True,
                            stdout=subprocess.PIPE).stdout
    assert output.decode().strip().splitlines()[-1] == '[]'
