"""The results of a benchmark: one SQLite file, one row per cell.

``pandas.read_sql('SELECT * FROM cells', sqlite3.connect(path))`` reads it.
"""
import json
import os.path as osp
import sqlite3
from contextlib import closing
from typing import Any, Dict, Iterable, List

from ..errors import MissingFileError, PEFTError
from ..whole_file import whole_file

__all__ = ['COLUMNS', 'STATES', 'write_rows', 'remove_rows', 'read_rows']

# What is not measured is NULL, never 0. `cell` is the folder's name; `metric`
# is in percent, as PPT wants it; bytes are bytes and times are seconds.
COLUMNS = dict(
    cell='TEXT PRIMARY KEY',
    plan='TEXT',
    task='TEXT',  # name of an entry of the plan
    config='TEXT',
    method='TEXT',  # name in the plan
    spec='TEXT',  # what --method gets
    seed='INTEGER',
    phase='TEXT',  # 'tune' or 'final'
    lr='REAL',  # of all that trains, or of the backbone
    head_lr='REAL',  # where neck and head have one of their own
    status='TEXT',
    reason='TEXT',  # why it failed
    exit_status='INTEGER',  # 2: refused
    metric_name='TEXT',
    metric='REAL',
    metrics='TEXT',  # JSON, as the library gives them
    backbone_trainable='INTEGER',
    head_trainable='INTEGER',
    model_total='INTEGER',
    ppt='REAL',
    ppt_with_head='REAL',
    step_s='REAL',
    train_step_s='REAL',  # median in the run itself, beside other cells
    saved_bytes='INTEGER',
    peak_bytes='INTEGER',
    latency_s='REAL',
    latency_merged_s='REAL',
    delta_bytes='INTEGER',
    versions='TEXT',  # JSON
    work_dir='TEXT',  # relative to the file
    digest='TEXT',  # of all that the result depends on
    started='TEXT',  # UTC, ISO 8601
    ended='TEXT')
STATES = ('waiting', 'running', 'done', 'failed')
_JSON = ('metrics', 'versions')


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30.)
    connection.row_factory = sqlite3.Row
    return connection


def write_rows(path: str, rows: Iterable[Dict[str, Any]]) -> None:
    """Insert rows or replace those of the same ``cell``, all or none.

    A process that dies leaves the file as it was, or none where there was
    none: one without rows would look like a plan without cells.

    Args:
        path (str): The file; made where it is not there.
        rows (Iterable[dict]): Values by column; what is left out is NULL,
            dicts become JSON.

    Raises:
        PEFTError: For unknown columns, or if the file cannot be written.
    """
    values = [_to_sql(row) for row in rows]
    if osp.isfile(path):
        _write(path, path, values)
    else:
        with whole_file(path) as temporary:
            _write(temporary, path, values)


def _write(file: str, path: str, values: List[List[Any]]) -> None:
    """Insert rows into a file that is, or will be, at ``path``."""
    columns = ', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())
    marks = ', '.join('?' * len(COLUMNS))
    # Not REPLACE: a row keeps its place.
    updates = ', '.join(f'{name}=excluded.{name}' for name in COLUMNS)
    try:
        with closing(_connect(file)) as connection, connection:
            connection.execute(f'CREATE TABLE IF NOT EXISTS cells ({columns})')
            there = {
                row['name']
                for row in connection.execute('PRAGMA table_info(cells)')
            }
            for name in set(COLUMNS) - there:
                connection.execute(
                    f'ALTER TABLE cells ADD COLUMN {name} {COLUMNS[name]}')
            connection.executemany(
                f'INSERT INTO cells ({", ".join(COLUMNS)}) VALUES ({marks}) '
                f'ON CONFLICT (cell) DO UPDATE SET {updates}', values)
    except sqlite3.Error as error:
        raise PEFTError(f'{path} could not be written ({error}); what was '
                        'there before has not changed.') from error


def remove_rows(path: str, cells: Iterable[str]) -> None:
    """Remove the rows of cells that no plan has any more."""
    with closing(_connect(path)) as connection, connection:
        connection.executemany('DELETE FROM cells WHERE cell = ?',
                               [(cell, ) for cell in cells])


def read_rows(path: str) -> List[Dict[str, Any]]:
    """All rows, in the order in which their cells were first written.

    Returns:
        list[dict]: Every column of :data:`COLUMNS`; ``metrics`` and
        ``versions`` are dicts.

    Raises:
        MissingFileError: If there is no file.
        PEFTError: If it is no such file.
    """
    if not osp.isfile(path):
        raise MissingFileError(f'There are no results at {path}; run the '
                               'plan first.')
    try:
        with closing(_connect(path)) as connection:
            found = connection.execute(
                'SELECT * FROM cells ORDER BY rowid').fetchall()
    except sqlite3.Error as error:
        raise PEFTError(f'{path} holds no results of a benchmark '
                        f'({error}).') from error
    return [_from_sql(dict(row)) for row in found]


def _to_sql(row: Dict[str, Any]) -> List[Any]:
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown or row.get('status') not in STATES:
        raise PEFTError(f'A row cannot have the columns {unknown} and the '
                        f'status {row.get("status")!r}; see '
                        'mmpeft/bench/table.py.')
    return [
        json.dumps(row[name], sort_keys=True)
        if name in _JSON and row.get(name) is not None else row.get(name)
        for name in COLUMNS
    ]


def _from_sql(row: Dict[str, Any]) -> Dict[str, Any]:
    for name in _JSON:
        if row.get(name) is not None:
            row[name] = json.loads(row[name])
    # A file of an earlier version lacks a column until it is written to.
    return {name: row.get(name) for name in COLUMNS}
