"""The file of results: what goes in comes out, and all of it or nothing."""
import sqlite3

import pytest

from mmpeft.bench.table import COLUMNS, read_rows, write_rows
from mmpeft.errors import MissingFileError, PEFTError


def row(cell, **values):
    return dict(
        dict(cell=cell, plan='p', method='Mona', status='waiting'), **values)


def test_rows_come_back(tmp_path):
    path = str(tmp_path / 'results.sqlite')
    write_rows(path, [row('a'), row('b', reason='none yet')])
    write_rows(
        path,
        [row('a', status='done', metric=37.5, seed=3, metrics={'aAcc': 1.5})])
    first, second = read_rows(path)
    assert set(first) == set(COLUMNS)
    assert [first['cell'], second['cell']] == ['a', 'b']
    assert (first['metric'], first['metrics']) == (37.5, {'aAcc': 1.5})
    # Not measured is no zero.
    assert first['saved_bytes'] is None and second['metric'] is None


def test_all_rows_or_none(tmp_path):
    path = str(tmp_path / 'results.sqlite')
    with pytest.raises(PEFTError, match='could not be written'):
        write_rows(path, [row('a', metric=object())])
    assert not list(tmp_path.iterdir())
    write_rows(path, [row('a')])
    with pytest.raises(PEFTError, match='has not changed'):
        write_rows(path, [row('a', status='done'), row('b', metric=object())])
    assert [r['status'] for r in read_rows(path)] == ['waiting']


def test_refusals(tmp_path):
    path = tmp_path / 'results.sqlite'
    with pytest.raises(MissingFileError, match='run the plan'):
        read_rows(str(path))
    with pytest.raises(PEFTError, match='colour'):
        write_rows(str(path), [row('a', colour='red')])
    with pytest.raises(PEFTError, match="'lost'"):
        write_rows(str(path), [row('a', status='lost')])
    path.write_text('no database, but long enough to have a header' * 9)
    with pytest.raises(PEFTError, match='no results'):
        read_rows(str(path))


def test_pandas_reads_it(tmp_path):
    pandas = pytest.importorskip('pandas')
    path = str(tmp_path / 'results.sqlite')
    write_rows(path, [row('a', metric=1.5)])
    with sqlite3.connect(path) as connection:
        frame = pandas.read_sql('SELECT * FROM cells', connection)
    assert list(frame.columns) == list(COLUMNS)
    assert frame.metric[0] == 1.5
