#!/usr/bin/env python3
"""Makes the environment of a stack, once per lock file, and links to it.

    python3 .dev_scripts/make_env.py maintained   # .venv
    python3 .dev_scripts/make_env.py classic      # .venv-classic
    python3 .dev_scripts/make_env.py lint         # .venv-lint

Environments live in ``$XDG_CACHE_HOME/mmpeft/envs`` (``~/.cache``), one per
stack, lock file and Python, and are shared by all checkouts. Needs the
standard library only.
"""
import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, '.dev_scripts'))

import env_checks  # noqa: E402
from env_mmcv import MMCV  # noqa: E402
from env_steps import SetupError, Steps, say  # noqa: E402

# A change in how environments are made, with the same lock file, raises it.
RECIPE = '1'
MARKER = '.complete'

# lock file, link in the checkout, GB on disk, GB to download; both measured
STACKS = dict(
    maintained=('requirements/lock/maintained.txt', '.venv', 6.0, 2.6),
    classic=('requirements/lock/classic.txt', '.venv-classic', 5.8, 2.5),
    lint=('requirements/lint.txt', '.venv-lint', 0.1, 0.02))

OPENMMLAB = re.compile(r'(onedl-)?mm(engine|cv|det|detection|pretrain|'
                       r'seg|segmentation)$')
IMPORTS = 'torch torchvision timm cv2 mmengine mmcv.ops mmdet mmseg mmpretrain'


def cache_dir():
    """The folder of everything that mmpeft keeps for the user."""
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(os.path.abspath(home), 'mmpeft')


def read_pins(lock):
    """Reads a lock file.

    Args:
        lock (str): Its text.

    Returns:
        tuple[dict, dict]: Version, and whole line, of each package.
    """
    versions, lines = {}, {}
    for line in lock.splitlines():
        line = line.split('#')[0].strip()
        if line:
            name, version = re.match(r'([\w.-]+)==([\w.+!]+)', line).groups()
            versions[name.lower()] = version
            lines[name.lower()] = line
    return versions, lines


def env_path(stack, lock, version):
    """Where the environment of a stack is kept.

    Args:
        stack (str): Name of the stack.
        lock (str): Text of its lock file.
        version (str): Python version, as ``'3.11'``.
    """
    text = '\n'.join((RECIPE, platform.system(), platform.machine(), lock))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return os.path.join(cache_dir(), 'envs', f'{stack}-{digest}-py{version}')


def is_complete(env):
    """Whether an environment was finished and its Python still exists."""
    return os.path.isfile(os.path.join(env, MARKER)) and os.path.exists(
        os.path.join(env, 'bin', 'python'))


class Lock:
    """Only one process at a time makes (or removes) an environment."""

    def __init__(self, env):
        self.path = env + '.lock'

    def __enter__(self):
        import fcntl
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.file = open(self.path, 'w')
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say('Another process is making this environment, waiting for it '
                f'({self.path}) ...')
            fcntl.flock(self.file, fcntl.LOCK_EX)
        return self.file.fileno()

    def __exit__(self, *args):
        self.file.close()


def link(name, env):
    """Points a link of the checkout at an environment.

    Raises:
        SetupError: If there is something else, which is not ours to remove.
    """
    path = os.path.join(ROOT, name)
    if os.path.islink(path):
        if os.readlink(path) == env:
            return
    elif os.path.exists(path):
        raise SetupError(f'{path} exists and is not a link to an environment '
                         'of ours; move it away.')
    new = f'{path}.{os.getpid()}'
    os.symlink(env, new)
    os.replace(new, path)


def create(stack, lock, env, python, pass_fds=()):
    """Makes an environment from nothing.

    Args:
        stack (str): Name of the stack.
        lock (str): Text of its lock file.
        env (str): Folder, which does not exist.
        python (dict): Interpreter, see ``env_checks.probe_python``.
        pass_fds (tuple[int]): See ``Steps``.
    """
    pins, lines = read_pins(lock)
    env_checks.check_disk(env, *STACKS[stack][2:])
    mmcv = None
    if 'torch' in pins:
        mmcv = MMCV(stack, pins, cache_dir(), python)
        if not mmcv.find():
            env_checks.check_compiler(python)  # now, not after 3 GB
    first = [n for n in ('pip', 'setuptools', 'wheel') if n in lines]
    ours = [n for n in lines if OPENMMLAB.match(n) and 'mmcv' not in n]
    rest = [n for n in lines if n not in first and not OPENMMLAB.match(n)]

    os.makedirs(env)
    say(f'Making the {stack} environment in {env}')
    env_python = os.path.join(env, 'bin', 'python')
    steps = Steps(5 if mmcv else 2, os.path.join(env, 'setup.log'), pass_fds)
    pip = [env_python, '-m', 'pip', 'install', '--no-deps']
    steps(f'Creating it with {python["path"]}',
          [python['path'], '-m', 'venv', env],
          *([pip + [lines[n] for n in first]] if first else []))
    listed = os.path.join(env, 'packages.txt')
    with open(listed, 'w') as f:
        f.write('\n'.join(lines[n] for n in rest) + '\n')
    what = f'{len(rest)} packages'
    if mmcv:
        what = (f'torch {pins["torch"]} and {len(rest) - 1} packages (about '
                f'{STACKS[stack][3]} GB to download the first time)')
    steps(f'Installing {what}', pip + ['-r', listed])
    if mmcv:
        names = ', '.join(f'{n} {pins[n]}' for n in ours)
        steps(f'Installing {names}',
              pip + ['--no-build-isolation'] + [lines[n] for n in ours])
        mmcv.install(steps, env_python)  # its operators import mmengine
        steps('Checking that everything imports', [
            env_python, '-c', ''.join(f'import {name}\n'
                                      for name in IMPORTS.split())
        ])


def make(stack):
    """Makes the environment of a stack if need be, and the link to it.

    Args:
        stack (str): Name of the stack.

    Returns:
        str: Folder of the environment.
    """
    lock_file, link_name = STACKS[stack][:2]
    with open(os.path.join(ROOT, lock_file)) as f:
        lock = f.read()
    env = env_path(stack, lock, env_checks.PYTHON)
    if not is_complete(env):
        python = env_checks.find_python()
        with Lock(env) as lock_fd:
            if not is_complete(env):  # another one may have made it meanwhile
                if os.path.exists(env):
                    say(f'Removing {env}, which was not finished')
                    shutil.rmtree(env)
                start = time.time()
                create(stack, lock, env, python, (lock_fd, ))
                marker = os.path.join(env, MARKER)
                with open(marker + '.part', 'w') as f:
                    json.dump(dict(stack=stack, python=python['path']), f)
                os.replace(marker + '.part', marker)
                say(f'Made in {time.time() - start:.0f} s: {env}')
                others = older(env, stack)
                if others:
                    say('Of other lock files, if no checkout needs them any '
                        'more you can remove: ' + ' '.join(others))
    link(link_name, env)
    return env


def older(env, stack):
    """Environments of the same stack for other lock files, 6 GB each."""
    folder = os.path.dirname(env)
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    return [
        path for path in paths if path != env and os.path.isdir(path)
        and os.path.basename(path).startswith(f'{stack}-')
    ]


def remove_all():
    """Removes the cached environments; compiled wheels stay."""
    envs = os.path.join(cache_dir(), 'envs')
    names = os.listdir(envs) if os.path.isdir(envs) else []
    for name in sorted(names):
        path = os.path.join(envs, name)
        if os.path.isdir(path):
            with Lock(path):
                say(f'Removing {path}')
                shutil.rmtree(path)
    wheels = os.path.join(cache_dir(), 'wheels')
    if os.path.isdir(wheels):
        say(f'Compiled mmcv wheels stay in {wheels}')


def main(args=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('stack', nargs='?', choices=sorted(STACKS))
    parser.add_argument(
        '--remove-all', action='store_true', help=remove_all.__doc__)
    args = parser.parse_args(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.remove_all:
            remove_all()
        elif args.stack:
            make(args.stack)
        else:
            parser.error('name a stack')
    except SetupError as error:
        sys.stderr.write(f'{error}\n')
        return 2
    except OSError as error:
        sys.stderr.write(f'The environment could not be made: {error}.\n')
        return 2
    except KeyboardInterrupt:
        sys.stderr.write('\nInterrupted; the next start begins anew.\n')
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
