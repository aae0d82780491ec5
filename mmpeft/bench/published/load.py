"""Reads the tables of this folder."""
import csv
from pathlib import Path
from typing import Dict, List

__all__ = ['read_published', 'read_sources']

FOLDER = Path(__file__).parent


def _rows(name: str) -> List[Dict[str, str]]:
    with open(FOLDER / name, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def read_sources() -> Dict[str, Dict[str, str]]:
    """Name of a source to its ``file``, ``url`` and ``table``."""
    return {row['source']: row for row in _rows('sources.csv')}


def read_published() -> List[Dict[str, str]]:
    """All printed cells, in the order of their tables.

    Returns:
        list[dict]: The columns of the files, all of them strings, so that
        the digits of the print survive; '' where nothing is printed.
    """
    names = dict.fromkeys(row['file'] for row in read_sources().values())
    return [row for name in names for row in _rows(name)]
