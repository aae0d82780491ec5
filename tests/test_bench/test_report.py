"""The report: what it says, and what it does with what is not there."""
import csv
import re
import sys
from html.parser import HTMLParser

import pytest

from mmpeft.bench.compare import compare, reference
from mmpeft.bench.document import Table
from mmpeft.bench.latex import render_latex
from mmpeft.bench.published import read_published
from mmpeft.bench.report import report_parts, write_report
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


def test_summary():
    task, = summarise(some_rows(), some_plan())
    assert [m.name for m in task.measured
            ] == ['Mona', 'Full', 'LoRA', 'BitFit', 'Frozen']
    mona, full = task.measured[:2]
    assert mona.scores == {0: 50.5, 1: 51.} and mona.missing == [2]
    assert full.score == pytest.approx(50.1)
    assert full.spread == pytest.approx(.6557, abs=1e-4)
    assert (mona.place, full.place) == (1, 2)
    assert full.ppt == pytest.approx(50.1 * ppt_factor(86_000_000))
    assert full.ppt_place == 5
    assert {
        m.name: m.missing
        for m in task.methods[5:]
    } == dict(
        Adapter=[0, 1, 2], SSF=[0, 1, 2])
    assert task.methods[-1].score is None and task.methods[-1].ppt is None


def test_ppt_by_the_formula_where_a_row_has_none():
    row = cell('LoRA', 50., ppt=None, ppt_with_head=None)
    method, = summarise([row])[0].methods
    assert method.ppt == 50. * ppt_factor(3_000_000)
    assert method.ppt_with_head == 50. * ppt_factor(4_000_000)
    row['backbone_trainable'] = None
    assert summarise([row])[0].methods[0].ppt is None


def test_methods_by_their_class():
    rows = [
        cell('low rank', 1., spec='LoRA:rank=4'),
        cell('LoRA', 2., spec='LoRA:rank=8'),
        cell('two', 3., spec='LoRA+BitFit'),
        cell('own', 4., spec='NobodyKnows')
    ]
    task, = summarise(rows)
    assert {
        m.name: m.kind
        for m in task.methods
    } == {
        'low rank': 'LoRA',
        'LoRA': 'LoRA',
        'two': '',
        'own': ''
    }
    assert task.find('LoRA').name == 'LoRA'


def test_order_of_the_print_agrees_with_it():
    """Rows with the printed numbers agree with their column, fully."""
    printed = [
        r for r in read_published()
        if r['task'] == 'coco' and r['metric'] == 'box AP' and r['ppt']
    ]
    rows = [
        cell(
            r['method'],
            float(r['value']),
            metric_name='coco/bbox_mAP',
            ppt=100 * float(r['ppt'])) for r in printed
        if not r['source'].startswith('mona')
    ]
    task, = summarise(rows)
    assert reference(task).title == 'coco, box AP, Swin-B'
    found, = (c for c in compare(task) if c.column == reference(task))
    assert len(found.methods) == 10
    assert found.by_score.spearman == pytest.approx(1)
    assert found.by_ppt.kendall == pytest.approx(1)


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
