"""Runs the steps of a set-up: one line each, the details in a log file."""
import os
import re
import signal
import subprocess
import sys
import time

HEARTBEAT = 30  # seconds between two signs of life of a long step


class SetupError(Exception):
    """What went wrong and the way out, in one sentence."""


def say(text, end='\n'):
    """Prints at once, also into a pipe."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def clean_environ(**extra):
    """The environment for pip: the user's settings, nothing that redirects.

    Indexes, proxies and certificates stay as they are configured.

    Args:
        extra (str): Variables to add.
    """
    drop = ('PYTHONPATH', 'PYTHONHOME', 'PIP_TARGET', 'PIP_PREFIX', 'PIP_USER',
            'PIP_REQUIRE_VIRTUALENV', 'PIP_CONSTRAINT', 'PIP_NO_DEPS',
            'VIRTUAL_ENV')
    environ = {k: v for k, v in os.environ.items() if k not in drop}
    environ.update(
        PYTHONNOUSERSITE='1',
        PIP_NO_INPUT='1',
        PIP_DISABLE_PIP_VERSION_CHECK='1',
        PIP_NO_WARN_SCRIPT_LOCATION='1',
        PIP_ROOT_USER_ACTION='ignore')
    environ.update(extra)
    return environ


def tail(path, num_lines=15):
    """The last lines of a log."""
    with open(path, errors='replace') as f:
        return [line.rstrip()[:300] for line in f.readlines()[-num_lines:]]


def reason(lines):
    """The likely reason of a failure, from the last lines of its output."""
    text = '\n'.join(lines)
    if 'No space left on device' in text:
        return 'the disk is full'
    if re.search(
            'Max retries|ConnectionError|Temporary failure in name|'
            'Could not fetch URL|timed out|ProxyError', text):
        return 'the package index could not be reached'
    if re.search('No matching distribution|Could not find a version', text):
        return 'the package index does not offer a pinned version'
    if re.search('Killed|out of memory|Cannot allocate', text):
        return 'memory ran out (MAX_JOBS=1 compiles one file at a time)'
    return 'see the lines above'


class Steps:
    """Counts and times the steps and writes what they print to a log.

    Args:
        total (int): Number of steps.
        log (str): File that gets the output of every command.
        pass_fds (tuple[int]): File descriptors that commands keep open; with
            the lock among them, a command that outlives us keeps it locked.
    """

    def __init__(self, total, log, pass_fds=()):
        self.total = total
        self.log = log
        self.pass_fds = pass_fds
        self.done = 0

    def __call__(self,
                 title,
                 *commands,
                 environ=None,
                 progress=None,
                 required=True):
        """Runs commands as one step.

        Args:
            title (str): What is done, and why it takes long if it does.
            commands (list[str]): Command lines, in order.
            environ (dict, optional): Their environment.
            progress (str, optional): Regex with two groups (done, total) that
                is looked for in the log, for the signs of life.
            required (bool): Whether a failure ends it all. If not, the step
                does not count. Defaults to True.

        Returns:
            bool: Whether all went well.

        Raises:
            SetupError: If a command of a required step fails.
        """
        self.done += 1
        say(f'[{self.done}/{self.total}] {title} ...', end='')
        start = time.time()
        for command in commands:
            code = self._run(command, environ or clean_environ(), progress,
                             start)
            if code and not required:
                self.done -= 1
                say(' it does not work here (see ' + self.log + ')')
                return False
            if code:
                lines = tail(self.log)
                say('\n' + '\n'.join('    ' + line for line in lines))
                raise SetupError(
                    f'Step {self.done} of {self.total} failed ({title}): '
                    f'{reason(lines)}; the whole output is in {self.log}.')
        say(f' {time.time() - start:.0f} s')
        return True

    def _run(self, command, environ, progress, start):
        with open(self.log, 'a') as log:
            log.write('\n$ ' + ' '.join(command) + '\n')
            log.flush()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environ,
                pass_fds=self.pass_fds,
                start_new_session=True)
        beat = time.time() + HEARTBEAT
        try:
            while True:
                try:
                    return process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    pass
                if time.time() >= beat:
                    beat = time.time() + HEARTBEAT
                    say(f'\n      {time.time() - start:.0f} s' +
                        self._progress(progress),
                        end='')
        except BaseException:
            # its own session: compilers and pip's children go with it
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise

    def _progress(self, progress):
        if progress is None:
            return ''
        found = re.findall(progress, '\n'.join(tail(self.log, 200)))
        return f', {found[-1][0]} of {found[-1][1]} files' if found else ''
