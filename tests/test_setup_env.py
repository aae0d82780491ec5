"""make_env.py without a network: every command that it would run is faked."""
import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = str(ROOT / '.dev_scripts')
sys.path.insert(0, SCRIPTS)

import env_checks  # noqa: E402
import env_mmcv  # noqa: E402
import make_env  # noqa: E402
from env_steps import SetupError, Steps  # noqa: E402

PYTHON = dict(
    version='3.11', path=sys.executable, header='Python.h', has_header=True)
PINS = {'torch': '2.11.0', 'onedl-mmcv': '2.3.6', 'cuda-toolkit': '13.0.2'}
WHEEL = (f'onedl_mmcv-2.3.6-cp311-cp311-linux_{os.uname().machine}.whl')


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """A cache and a checkout of their own, and no ready wheels."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('MMPEFT_WHEEL_DIR', raising=False)
    monkeypatch.delenv('PYTHON', raising=False)
    monkeypatch.setattr(env_checks, 'find_python', lambda: PYTHON)
    monkeypatch.setattr(env_mmcv, 'build_flavour', lambda pins: ('cpu', ''))
    checkout = tmp_path / 'checkout'
    for name in ('maintained', 'classic'):
        lock = checkout / make_env.STACKS[name][0]
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text((ROOT / make_env.STACKS[name][0]).read_text())
    monkeypatch.setattr(make_env, 'ROOT', str(checkout))
    return checkout


@pytest.fixture
def created(monkeypatch):
    """Replaces the making of an environment; lists what was made."""
    made = []

    def create(stack, lock, env, python, pass_fds=()):
        os.makedirs(os.path.join(env, 'bin'))
        Path(env, 'bin', 'python').touch()
        made.append(env)

    monkeypatch.setattr(make_env, 'create', create)
    return made


def test_made_once_per_lock_file(sandbox, created):
    env = make_env.make('maintained')
    assert (sandbox / '.venv').resolve() == Path(env)
    assert make_env.make('maintained') == env
    assert created == [env]
    assert make_env.make('classic') != env
    lock = sandbox / make_env.STACKS['maintained'][0]
    lock.write_text(lock.read_text() + 'one-more==1.0\n')
    other = make_env.make('maintained')
    assert other != env
    assert (sandbox / '.venv').resolve() == Path(other)
    assert make_env.older(other, 'maintained') == [env]


def test_key_depends_on_recipe_and_python(monkeypatch):
    paths = {make_env.env_path('maintained', 'a==1', '3.11')}
    paths.add(make_env.env_path('maintained', 'a==1', '3.12'))
    monkeypatch.setattr(make_env, 'RECIPE', 'other')
    paths.add(make_env.env_path('maintained', 'a==1', '3.11'))
    assert len(paths) == 3


@pytest.mark.parametrize('error', [KeyboardInterrupt, SetupError('no')])
def test_interrupted_starts_clean(error, created, monkeypatch):
    working = make_env.create

    def create(stack, lock, env, *args):
        os.makedirs(env)
        Path(env, 'half').touch()
        raise error

    monkeypatch.setattr(make_env, 'create', create)
    assert make_env.main(['maintained'
                          ]) == (130 if error is KeyboardInterrupt else 2)
    monkeypatch.setattr(make_env, 'create', working)
    env = make_env.make('maintained')
    assert not Path(env, 'half').exists()


def test_one_at_a_time():
    """A second process waits until the first one is done."""
    with make_env.Lock(str(Path(make_env.cache_dir(), 'envs', 'x'))):
        second = subprocess.Popen([
            sys.executable, '-c', f'import sys; sys.path[:0] = '
            f'[{SCRIPTS!r}]\nimport make_env\n'
            f'with make_env.Lock(make_env.cache_dir() + "/envs/x"):\n'
            '    print("mine")'
        ],
                                  stdout=subprocess.PIPE,
                                  text=True)
        assert 'waiting for it' in second.stdout.readline()
        assert second.poll() is None
    assert second.communicate(timeout=20)[0] == 'mine\n'


def test_foreign_venv_is_left_alone(sandbox, created, capsys):
    (sandbox / '.venv').mkdir()
    assert make_env.main(['maintained']) == 2
    assert 'not a link to an environment of ours' in capsys.readouterr().err


def test_remove_all_keeps_wheels(created):
    env = make_env.make('maintained')
    wheels = Path(make_env.cache_dir(), 'wheels', 'x')
    wheels.mkdir(parents=True)
    assert make_env.main(['--remove-all']) == 0
    assert not Path(env).exists() and wheels.exists()


def test_wrong_python(monkeypatch):
    monkeypatch.undo()
    found = dict(PYTHON, version='3.9', has_venv=True)
    monkeypatch.setattr(env_checks, 'probe_python', lambda name: found)
    with pytest.raises(SetupError, match='3.11 is needed, found 3.9; install'):
        env_checks.find_python()
    monkeypatch.setenv('PYTHON', 'python3.9')
    with pytest.raises(SetupError, match='PYTHON=python3.9 is 3.9; install'):
        env_checks.find_python()
    found.update(version='3.11', has_venv=False)
    with pytest.raises(SetupError, match='without its venv module'):
        env_checks.find_python()


def test_probe():
    found = env_checks.probe_python(sys.executable)
    assert found['version'] == '%d.%d' % sys.version_info[:2]
    assert env_checks.probe_python('no-such-python') is None
    assert env_checks.probe_python('false') is None


def test_missing_compiler_is_known_before_the_download(monkeypatch, capsys):
    which = env_checks.shutil.which
    monkeypatch.setattr(
        env_checks.shutil, 'which', lambda name, *args: None
        if '++' in name else which(name, *args))
    monkeypatch.delenv('CXX', raising=False)
    assert make_env.main(['maintained']) == 2
    error = capsys.readouterr().err
    assert error.startswith('No C++ compiler was found')
    assert error.count('\n') == 1
    assert not list(Path(make_env.cache_dir(), 'envs').glob('*/setup.log'))


def test_missing_headers(monkeypatch):
    monkeypatch.setattr(env_checks.shutil, 'which', lambda name: name)
    with pytest.raises(SetupError, match='C headers of Python are missing'):
        env_checks.check_compiler(dict(PYTHON, has_header=False))


def test_full_disk(monkeypatch, capsys):
    usage = collections.namedtuple('usage', 'total used free')
    monkeypatch.setattr(env_checks.shutil, 'disk_usage',
                        lambda path: usage(10**12, 10**12, 10**9))
    assert make_env.main(['maintained']) == 2
    error = capsys.readouterr().err
    assert error.startswith('Not enough free disk at ')
    assert '1.0 GB' in error and error.count('\n') == 1


def test_wheel_lookup_order(tmp_path, monkeypatch):
    mmcv = env_mmcv.MMCV('maintained', PINS, make_env.cache_dir(), PYTHON)
    assert mmcv.find() == []
    kept = Path(mmcv.kept_dir, WHEEL)
    ready = tmp_path / 'ready' / 'maintained' / WHEEL
    other = ready.with_name(WHEEL.replace('cp311', 'cp312'))
    for path in (kept, ready, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert mmcv.find() == [str(kept)]
    monkeypatch.setenv('MMPEFT_WHEEL_DIR', str(tmp_path / 'ready'))
    assert mmcv.find() == [str(ready), str(kept)]


class FakeSteps:
    """Runs nothing; commands that contain ``bad`` fail."""

    def __init__(self, tmp_path, bad):
        self.log = str(tmp_path / 'setup.log')
        self.bad = bad
        self.commands = []
        self.done = 0

    def __call__(self, title, *commands, required=True, **kwargs):
        self.commands += commands
        if any(self.bad in part for c in commands for part in c):
            assert not required
            return False
        if 'wheel' in commands[0]:
            built = Path(commands[0][-1], WHEEL)
            built.parent.mkdir(parents=True)
            built.touch()
        return True


def test_bad_ready_wheel_is_compiled_anew(tmp_path, monkeypatch):
    ready = tmp_path / 'ready' / 'maintained' / WHEEL
    ready.parent.mkdir(parents=True)
    ready.touch()
    monkeypatch.setenv('MMPEFT_WHEEL_DIR', str(tmp_path / 'ready'))
    monkeypatch.setattr(env_mmcv, 'check_compiler', lambda python: None)
    monkeypatch.setattr(env_mmcv, 'strip', lambda wheel, *args: wheel)
    mmcv = env_mmcv.MMCV('maintained', PINS, make_env.cache_dir(), PYTHON)
    steps = FakeSteps(tmp_path, str(ready))
    mmcv.install(steps, 'python')
    assert Path(mmcv.kept_dir, WHEEL).is_file()
    build, = (c for c in steps.commands if 'wheel' in c)
    # pip's own wheel cache does not know which torch a wheel was built for
    assert {'--no-cache-dir', '--no-build-isolation', '--no-deps'} < set(build)
    assert build[build.index('--no-binary') + 1] == 'onedl-mmcv'
    # the next environment takes what was compiled
    steps = FakeSteps(tmp_path, str(ready))
    mmcv.install(steps, 'python')
    assert not any('wheel' in c for c in steps.commands)


def test_failing_step(tmp_path, capfd):
    steps = Steps(2, str(tmp_path / 'log'))
    command = [sys.executable, '-c']
    assert steps('Good', command + ['print(1)'])
    assert not steps('Optional', command + ['1 / 0'], required=False)
    with pytest.raises(SetupError, match='Step 2 of 2 .*the disk is full'):
        steps('Bad', command + ['raise SystemExit("No space left on device")'])
    assert '[1/2] Good ... ' in capfd.readouterr().out


@pytest.mark.parametrize('stack', ['maintained', 'classic', 'lint'])
def test_lock_files_are_full_pins(stack):
    text = (ROOT / make_env.STACKS[stack][0]).read_text()
    pins, lines = make_env.read_pins(text)
    assert all('==' in line and '@' not in line for line in lines.values())
    if stack == 'lint':
        return
    assert {'torch', 'torchvision', 'pip', 'setuptools', 'pytest'} <= set(pins)
    # two distributions of one module overwrite each other
    assert [n for n in pins
            if n.startswith('opencv')] == ['opencv-python-headless']


def test_pre_commit_has_the_pins_of_make_lint():
    pins, _ = make_env.read_pins((ROOT / 'requirements/lint.txt').read_text())
    text = (ROOT / '.pre-commit-config.yaml').read_text()
    hooks = [
        item.strip() for line in text.splitlines()
        if 'additional_dependencies' in line
        for item in line.split('[')[1].rstrip(']').split(',')
    ]
    assert len(hooks) > 8
    for hook in hooks:
        name, version = hook.split('==')
        assert pins[name.lower()] == version, hook
