#!/usr/bin/env python3
"""Runs the hooks of .pre-commit-config.yaml on a copy and reports only.

``--fix`` runs them on the checkout itself, as pre-commit does. Runs in the
environment of requirements/lint.txt (``make lint``, ``make format``).
"""
import argparse
import difflib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import yaml

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SUFFIXES = dict(python=('.py', ), markdown=('.md', ), yaml=('.yml', '.yaml'))
BINARY = ('.png', '.jpg', '.jpeg', '.gif', '.pdf', '.npz', '.pth', '.pkl',
          '.safetensors')


def listed_files():
    """Files of the project, also those that are not committed yet."""
    output = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True).stdout.decode()
    paths = [os.path.join(ROOT, name) for name in output.split('\0') if name]
    return sorted(
        os.path.relpath(p, ROOT) for p in set(paths)
        if os.path.isfile(p) and not os.path.islink(p))


def select(files, types):
    """Files of a pre-commit type.

    Args:
        files (list[str]): All files.
        types (list[str]): ``python``, ``markdown``, ``yaml`` or ``text``.
    """
    kind, = types
    if kind == 'text':
        return [f for f in files if not f.endswith(BINARY)]
    return [f for f in files if f.endswith(SUFFIXES[kind])]


def run_hook(hook, files, folder):
    """Runs one hook.

    Args:
        hook (dict): Its entry in the configuration.
        files (list[str]): All files, relative.
        folder (str): Where to run it.

    Returns:
        tuple[bool, str]: Whether it found nothing, and its output.
    """
    command = shlex.split(hook['entry'])
    if command[0] == 'python':
        command[0] = sys.executable
    else:
        command[0] = os.path.join(os.path.dirname(sys.executable), command[0])
    if hook.get('pass_filenames', True):
        chosen = select(files, hook['types'])
        if not chosen:
            return True, ''
        command += chosen
    result = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode == 0, result.stdout.decode(errors='replace')


def contents(files, folder):
    """Bytes of every file, to see what a hook changed."""
    texts = []
    for name in files:
        with open(os.path.join(folder, name), 'rb') as f:
            texts.append(f.read())
    return texts


def changes(files, folder):
    """What the hooks changed in the copy, as a unified diff."""
    diff = []
    for name, before, after in zip(files, contents(files, ROOT),
                                   contents(files, folder)):
        if before != after:
            diff += difflib.unified_diff(
                before.decode().splitlines(),
                after.decode().splitlines(),
                name,
                name + ' (as the hooks want it)',
                lineterm='')
    return '\n'.join(diff)


def main():
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--fix', action='store_true', help='change the checkout itself')
    args = parser.parse_args()
    files = listed_files()
    with open(os.path.join(ROOT, '.pre-commit-config.yaml')) as f:
        hooks = [
            h for repo in yaml.safe_load(f)['repos'] for h in repo['hooks']
        ]
    folder = ROOT if args.fix else tempfile.mkdtemp(prefix='mmpeft-lint-')
    try:
        if not args.fix:
            for name in files:
                target = os.path.join(folder, name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copy(os.path.join(ROOT, name), target)
        failed = []
        before = contents(files, folder)
        for hook in hooks:
            start = time.time()
            passed, output = run_hook(hook, files, folder)
            after = contents(files, folder)
            passed, before = passed and before == after, after
            print(
                f'{hook["name"]:.<40}{"passed" if passed else "FAILED"} '
                f'({time.time() - start:.1f} s)',
                flush=True)
            if not passed:
                failed.append(hook['name'])
                print(output.replace(folder + os.sep, ''), flush=True)
        diff = '' if args.fix else changes(files, folder)
    finally:
        if not args.fix:
            shutil.rmtree(folder)
    if diff:
        print(diff)
        print('\n`make format` makes these changes.')
    if failed:
        print(f'lint: FAILED: {", ".join(failed)}')
        return 1
    print(f'lint: {len(hooks)} hooks passed on {len(files)} files')
    return 0


if __name__ == '__main__':
    sys.exit(main())
