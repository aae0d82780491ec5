"""What travels in a wheel, and what it asks for."""
import ast
import zipfile

import pytest
from downstream import ROOT, build_wheel


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    with zipfile.ZipFile(build_wheel(tmp_path_factory)) as archive:
        yield archive


def test_mim_folder_travels(wheel):
    names = set(wheel.namelist())
    for folder in ('configs', 'tools'):
        files = [
            f for f in (ROOT / folder).rglob('*')
            if f.suffix in ('.py', '.yml', '.sh')
        ]
        assert len(files) > 5
        missing = [
            f for f in files
            if f'mmpeft/.mim/{f.relative_to(ROOT).as_posix()}' not in names
        ]
        assert not missing
    assert 'mmpeft/.mim/model-index.yml' in names
    assert not [n for n in names if n.split('/')[0] in ('tests', 'tools')]


def test_every_module_travels(wheel):
    names = set(wheel.namelist())
    modules = [
        f.relative_to(ROOT).as_posix() for f in (ROOT / 'mmpeft').rglob('*.py')
        if '.mim' not in f.parts
    ]
    assert not set(modules) - names


def test_published_tables_travel(wheel):
    files = [
        f.relative_to(ROOT).as_posix()
        for f in (ROOT / 'mmpeft' / 'bench').rglob('*.csv')
    ]
    assert len(files) > 5
    assert not set(files) - set(wheel.namelist())


def test_nothing_of_the_user_is_changed(wheel):
    """No hard requirement: two names of one OpenMMLab module would clash."""
    name, = (n for n in wheel.namelist() if n.endswith('/METADATA'))
    metadata = wheel.read(name).decode().split('\n\n')[0].splitlines()
    required = [
        line for line in metadata
        if line.startswith('Requires-Dist') and 'extra ==' not in line
    ]
    assert not required
    assert f'Version: {version()}' in metadata


def version():
    """The version, from its file."""
    text = (ROOT / 'mmpeft' / 'version.py').read_text()
    return text.split("'")[1]


def test_checkout_has_mim_links():
    """``mmpeft::`` names work in a checkout that was never installed."""
    for name in ('configs', 'tools', 'model-index.yml'):
        link = ROOT / 'mmpeft' / '.mim' / name
        assert link.resolve() == ROOT / name and link.exists()


def test_syntax_of_the_oldest_python():
    for folder in ('mmpeft', 'configs', 'tools'):
        for path in (ROOT / folder).rglob('*.py'):
            ast.parse(path.read_text(), str(path), feature_version=(3, 8))
