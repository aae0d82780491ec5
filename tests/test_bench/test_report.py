"""The report: what it says, and what it does with what is not there."""
import csv
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from mmpeft.bench.document import Table
from mmpeft.bench.latex import render_latex
from mmpeft.bench.report import report_parts, write_report
from mmpeft.bench.sections import recipe
from mmpeft.bench.summary import summarise
from mmpeft.counting import ppt_factor
from mmpeft.errors import PEFTError
from .rows import TRAINS, cell, some_plan, some_rows

VOID = {'meta', 'img', 'br'}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps pictures and the cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.rows, self.loads = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        attrs = dict(attrs)
        if tag == 'img':
            self.images.append(attrs['src'])
        elif tag in ('link', 'script') or 'src' in attrs:
            self.loads += [v for k, v in attrs.items() if k in ('src', 'href')]
        if tag == 'tr':
            self.rows.append([])
        elif tag == 'td':
            self.rows[-1].append('')

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'td' in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    pytest.importorskip('matplotlib')
    folder = tmp_path_factory.mktemp('report')
    files = write_report(some_rows(), folder, some_plan())
    assert sorted(files) == sorted(folder.iterdir())
    return folder


def test_page_needs_no_other_file(written):
    text = (written / 'report.html').read_text()
    page = Page(text)
    pictures = list(written.glob('*.png'))
    assert len(page.images) == len(pictures) == 4
    assert all(i.startswith('data:image/png;base64,') for i in page.images)
    assert page.loads == []
    assert 'url(' not in text and '@import' not in text
    results = next(r for r in page.rows if r and r[0] == 'Full')
    assert results[:3] == ['Full', '2', '50.10 ± 0.66']
    assert 'SiteError: a &lt; b &amp; c' in text


def test_nothing_is_silently_missing(written):
    text = ' '.join((written / 'report.md').read_text().split())
    assert 'Adapter** failed (final with seed 0): SiteError: a < b & c' in text
    assert '**SSF**: not measured with seed 0, 1, 2' in text
    assert '**Mona**: not measured with seed 2' in text
    assert '2 of 3' in text
    assert re.search(r'\| SSF +\| – +\| not measured', text)


def test_what_was_asked_and_chosen(written):
    text = ' '.join((written / 'report.md').read_text().split())
    assert '300 iters for every method. Seeds of the reported runs: 0, 1, 2' \
        in text
    assert re.search(r'\| LoRA +\| 41.00 +\| \*\*45.50\*\* \| 43.00 \| 0.001',
                     text)
    assert 'Above full fine-tuning by their means: Mona.' in text


def test_edge_of_the_grid_is_marked():
    rows = some_rows()
    for row in rows:
        if row['phase'] == 'final':
            row['lr'] = .01
    tables = [
        p for p in report_parts(rows, figures=False)
        if isinstance(p, Table) and p.label == 'camvid-tuning'
    ]
    assert tables[0].rows[0][-1] == '0.01 (edge)'


def test_rates_of_the_head_have_a_table_of_their_own():
    rows = some_rows() + [
        cell('Frozen', score, 100, phase='tune', lr=None, head_lr=lr)
        for lr, score in ((.001, 30.), (.01, 31.), (.1, 20.))
    ]
    labels = [
        p.label for p in report_parts(rows, figures=False)
        if isinstance(p, Table)
    ]
    assert 'camvid-tuning-head' in labels and 'camvid-tuning' in labels


def test_if_the_head_is_counted(written):
    text = (written / 'report.md').read_text()
    page = Page((written / 'report.html').read_text())
    row, = (r for r in page.rows if len(r) == 8 and r[0] == 'Frozen')
    without, counted = (40.1 * ppt_factor(p) for p in (0, 1_000_000))
    assert row[1:5] == ['0', '1.0000', f'{without:.2f}', f'{counted:.2f}']
    assert 'If neck and head are counted, ' in text


def test_csv_in_full_digits(written):
    with open(written / 'report.csv', newline='') as f:
        rows = {row['method']: row for row in csv.DictReader(f)}
    assert set(rows) == {*TRAINS, 'SSF'}
    assert float(rows['LoRA']['mean']) == pytest.approx(48.1)
    assert rows['SSF']['mean'] == rows['SSF']['ppt'] == ''
    assert (rows['Adapter']['failed'], rows['Mona']['missing']) == ('1', '1')


def test_latex(written):
    text = (written / 'report.tex').read_text()
    assert text.count(r'\begin{table}') == text.count(r'\end{table}') >= 5
    for part in text.split(r'\begin{tabular}{')[1:]:
        columns, rest = part.split('}', 1)
        body = rest.split(r'\end{tabular}')[0]
        lines = [line for line in body.splitlines() if line.endswith(r'\\')]
        assert len(lines) > 1
        for line in lines:
            assert len(re.findall(r'(?<!\\)&', line)) == len(columns) - 1
    assert not re.search(r'(?<!\\)[%_#](?! needs)', text)
    assert text.encode('ascii')
    table = Table('a', 'b', ['x'], [['100 % of a_b & -1 **c**']])
    assert (r'100 \% of a\_b \& $-$1 \textbf{c} \\' in render_latex([table]))


def test_other_metrics():
    rows = [
        cell(
            'LoRA',
            50.,
            seed,
            metrics={
                'mIoU': 50.,
                'aAcc': acc,
                'mAcc': None,
                'text': 'a',
                'small': -1.
            }) for seed, acc in ((0, 80.), (1, 81.))
    ]
    table, = (
        p for p in report_parts(rows, figures=False)
        if isinstance(p, Table) and p.label == 'camvid-others')
    assert list(table.head) == ['Method', 'aAcc', 'small']
    assert table.rows == [['LoRA', '80.50', '–']]


def test_same_rows_same_files(written, tmp_path):
    write_report(some_rows(), tmp_path, some_plan())
    for file in written.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_tasks_side_by_side():
    rows = some_rows() + [
        cell(m, 20. + i, task='coco', metric_name='coco/bbox_mAP')
        for i, m in enumerate(('Full', 'LoRA'))
    ]
    across, = (
        p for p in report_parts(rows, figures=False)
        if isinstance(p, Table) and p.label == 'across')
    assert across.head[3] == 'coco, box AP, %'
    cells = {row[0]: row[1:] for row in across.rows}
    assert cells['Full'][-2] == cells['LoRA'][-2] == '2.0'
    assert cells['Mona'][2:] == ['not measured', '–', '–', '–']


def test_what_the_plan_leaves_out_is_not_missing():
    plan = some_plan()
    plan.tasks['coco'] = SimpleNamespace(
        **dict(vars(plan.tasks['camvid']), methods=dict(Full='Full')))
    across, = (
        p for p in report_parts([], plan, figures=False)
        if isinstance(p, Table) and p.label == 'across')
    cells = {row[0]: row[1:5] for row in across.rows}
    assert cells['Full'] == ['not measured', '–'] * 2
    assert cells['Mona'] == ['not measured', '–', '–', '–']


def test_recipe_in_words():
    plan = some_plan()
    task = plan.tasks['camvid']

    def words():
        found, = summarise([], plan)
        return recipe(found)

    assert 'tried with seed 100, from the middle' in words()
    task.lrs = (.001, )
    assert words().endswith('Learning rate, for every method: 0.001.')
    task.head_lrs = (.01, .1)
    assert 'chosen by Frozen for all: 0.01, 0.1.' in words()


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(PEFTError, match='pip install matplotlib'):
        write_report(some_rows(), tmp_path / 'a')
    assert not (tmp_path / 'a').exists()
    files = write_report(some_rows(), tmp_path / 'b', figures=False)
    assert not [f for f in files if f.suffix == '.png']


def test_no_rows(tmp_path):
    write_report([], tmp_path, some_plan())
    text = (tmp_path / 'report.md').read_text()
    assert 'Nothing has been measured on this task.' in text
    write_report([], tmp_path)
