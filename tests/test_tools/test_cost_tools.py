"""The command as a user types it."""
import json

import pytest
import segmentor
from commands import run_tool

pytest.importorskip('mmseg')

SMALL = ('--image-size', '36', '44', '--clock', 'cpu')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(segmentor.config().pretty_text)
    return str(path)


def benchmark(*arguments, status=0):
    done = run_tool('benchmark.py', *arguments)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def test_json_and_a_chart(config, tmp_path):
    chart = tmp_path / 'cost.svg'
    done = benchmark(config, '--method', 'LoRA:rank=4', '--repeats', '1',
                     '--json', '--plot', str(chart), *SMALL)
    rows = json.loads(done.stdout)
    assert [r['method'] for r in rows] == ['Full', 'Frozen', 'LoRA:rank=4']
    assert all(r['step_s'] > 0 for r in rows)
    assert rows[0]['settings']['threads'] == 1
    assert b'</svg>' in chart.read_bytes()


def test_module_against_released(config):
    done = benchmark(config, '--module-against-released', '--method',
                     'Mona:dim=4', '--memory', 'both', '--repeats', '0',
                     '--json', *SMALL)
    rows = json.loads(done.stdout)
    assert [(r['memory'], r['width']) for r in rows] == [('fast', 16),
                                                         ('fast', 32),
                                                         ('fast', None),
                                                         ('lean', 16),
                                                         ('lean', 32),
                                                         ('lean', None)]
    assert rows[2]['modules'] == 8
    for row in rows:
        assert row['parameters'] == row['released_parameters']
        assert row['output_difference'] <= 4e-6
        assert row['gradient_difference'] <= 1e-5


@pytest.mark.parametrize('arguments,says', [
    (['--method', 'Moan'], "did you mean 'Mona'"),
    (['--method', 'LoRA', '--module-against-released'
      ], 'released module of one method, Mona'),
    (['--clock', 'cpu', '--threads', '2'], 'with --threads 1'),
])
def test_mistakes_are_one_sentence(config, arguments, says):
    done = benchmark(config, *arguments, status=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('Error: ') and says in last
    assert 'Traceback' not in done.stderr and done.stdout == ''
