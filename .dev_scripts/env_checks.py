"""What a set-up needs from the machine, each checked before it is needed."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile

from env_steps import SetupError

PYTHON = '3.11'

PROBE = """
import json, os, sys, sysconfig
try:
    import ensurepip, venv
    has_venv = True
except ImportError:
    has_venv = False
header = os.path.join(sysconfig.get_path('include'), 'Python.h')
print(json.dumps(dict(
    version='%d.%d' % sys.version_info[:2], has_venv=has_venv,
    path=getattr(sys, '_base_executable', None) or sys.executable,
    header=header, has_header=os.path.isfile(header))))
"""


def probe_python(name):
    """Facts about an interpreter.

    Args:
        name (str): Its path or command.

    Returns:
        dict | None: ``version``, ``path``, ``has_venv``, ``header`` and
        ``has_header``; None if there is no such interpreter.
    """
    path = shutil.which(name)
    if path is None:
        return None
    try:
        # version managers leave commands that exist and do not work
        output = subprocess.run([path, '-c', PROBE],
                                stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL,
                                timeout=60,
                                check=True).stdout
        return json.loads(output.decode())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def find_python():
    """Finds the interpreter that the lock files are for.

    Returns:
        dict: See :func:`probe_python`.

    Raises:
        SetupError: If there is none.
    """
    way_out = ('; install it (on Debian and Ubuntu: python3.11, '
               'python3.11-venv, python3.11-dev), name it with PYTHON=PATH, '
               'or use your own environment with the ranges in requirements/.')
    named = os.environ.get('PYTHON')
    candidates = ([named] if named else [sys.executable] + [
        folder + 'python' + PYTHON
        for folder in ('', '/usr/bin/', '/usr/local/bin/')
    ] + ['python3', 'python'])
    seen = []
    for candidate in candidates:
        found = probe_python(candidate)
        if found is None:
            continue
        if found['version'] != PYTHON:
            seen.append(found['version'])
        elif not found['has_venv']:
            seen.append(PYTHON + ' without its venv module')
        else:
            return found
    seen = ', '.join(dict.fromkeys(seen))
    if named:
        seen = f'PYTHON={named} is {seen or "no Python that works"}'
    else:
        seen = f'found {seen or "none"}'
    raise SetupError(f'Python {PYTHON} is needed, {seen}{way_out}')


def check_compiler(python):
    """Checks what compiling mmcv takes.

    Args:
        python (dict): See :func:`probe_python`.

    Raises:
        SetupError: If there is no C++ compiler or no ``Python.h``.
    """
    configured = sysconfig.get_config_var('CXX') or ''
    names = [os.environ.get('CXX', '').split(' ')[0]] or []
    names += [configured.split(' ')[0], 'c++', 'g++', 'clang++']
    if not any(name and shutil.which(name) for name in names):
        raise SetupError(
            'No C++ compiler was found and mmcv must be compiled; install one '
            '(on Debian and Ubuntu: build-essential), name it with CXX=PATH, '
            'or name a folder of ready wheels with MMPEFT_WHEEL_DIR.')
    if not python['has_header']:
        raise SetupError(
            f'The C headers of Python are missing ({python["header"]}) and '
            'mmcv must be compiled; install them (on Debian and Ubuntu: '
            f'python{PYTHON}-dev) or name a folder of ready wheels with '
            'MMPEFT_WHEEL_DIR.')


def existing_parent(path):
    """The nearest folder above a path that exists already."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def check_disk(env_dir, env_gb, download_gb):
    """Checks the free space where the environment and the downloads go.

    Args:
        env_dir (str): The folder that is about to be filled.
        env_gb (float): GB that the environment takes.
        download_gb (float): GB that pip downloads and keeps in its cache.

    Raises:
        SetupError: If a disk has less than that.
    """
    cache = os.environ.get('PIP_CACHE_DIR') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'),
        'pip')
    needed = {}  # device -> [folder, GB]: folders may share a disk
    for folder, gb in ((env_dir, env_gb), (cache, download_gb),
                       (tempfile.gettempdir(), min(1, download_gb))):
        folder = existing_parent(folder)
        entry = needed.setdefault(os.stat(folder).st_dev, [folder, 0])
        entry[1] += gb
    for folder, gb in needed.values():
        free = shutil.disk_usage(folder).free / 1e9
        if free < gb:
            raise SetupError(
                f'Not enough free disk at {folder}: {free:.1f} GB, about '
                f'{gb:.1f} GB are needed; free some, or put the environments '
                'elsewhere with XDG_CACHE_HOME.')
