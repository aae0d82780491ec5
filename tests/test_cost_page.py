"""The page on cost is what its results give."""
import importlib.util
import json
import os.path as osp

import pytest

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
SCRIPT = osp.join(ROOT, '.dev_scripts', 'cost_table.py')

if not osp.isfile(SCRIPT):
    pytest.skip('no checkout', allow_module_level=True)

spec = importlib.util.spec_from_file_location('cost_table', SCRIPT)
cost_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cost_table)

PAGE = '''Before.

<!-- cost: x.json -->

old

<!-- end of x.json -->

<!-- cost: y.json -->

old

<!-- end of y.json -->
'''


def row(method, **kwargs):
    settings = dict(
        backbone_only=True,
        batch_size=2,
        image_size=[64, 96],
        dtype='fp32',
        amp=None,
        device='cpu',
        threads=1,
        torch='2.1',
        repeats=3,
        clock='cpu')
    values = dict(
        config='c.py',
        method=method,
        memory='fast',
        with_cp=False,
        backbone_trainable=1500,
        saved_bytes=3 * 2**20,
        peak_bytes=None,
        ratio_peak=None,
        ratio_saved=.5,
        step_s=1.25,
        ratio_step=.7,
        ratio_step_spread=[.65, .75],
        ratio_flops=.71,
        ratio_latency=1.1,
        ratio_latency_merged=None,
        ratio_latency_folded=1.05,
        settings=settings)
    return dict(values, **kwargs)


def test_the_page_is_up_to_date():
    with open(cost_table.PAGE, encoding='utf-8') as file:
        page = file.read()
    folder = osp.join(osp.dirname(cost_table.PAGE), 'cost')
    assert cost_table.filled(page, folder) == page
    assert cost_table.MARKS.search(page)


def test_tables_are_filled_in(tmp_path):
    (tmp_path / 'x.json').write_text(
        json.dumps([row('Mona'),
                    row('LST', ratio_latency_merged=1.)]))
    page = cost_table.filled(PAGE, str(tmp_path))
    assert page.startswith('Before.\n\n<!-- cost: x.json -->\n\n`c.py`: ')
    assert 'batch of 2 x 64 x 96, fp32, cpu, 1 threads, torch 2.1' in page
    mona = next(t for t in page.splitlines() if t.startswith('| Mona'))
    assert [c.strip() for c in mona.split('|')[1:-1]] == [
        'Mona', 'fast', '0.002 M', '3', '0.500', '0.51', '1.250',
        '0.70 (0.65-0.75)', '0.67', '0.71', '1.10', '', '1.05'
    ]
    assert page.count('Not measured yet.') == 1
    # Filling it again changes nothing.
    assert cost_table.filled(page, str(tmp_path)) == page


@pytest.mark.parametrize('method,path', [
    ('Full', 'all'),
    ('Frozen', 'none'),
    ('Mona', 'through'),
    ('LNTune', 'through'),
    ('LST', 'beside'),
    ('LoRA+LST', 'through'),
    ('Partial', 'part'),
    ('DTL', 'part'),
    ('LoRA:layers=[3]', 'part'),
])
def test_how_far_gradients_go_back(method, path):
    assert cost_table.path_of(method) == path


def test_what_was_not_measured_has_no_column():
    """As with no rounds, which is bytes alone."""
    nothing = dict(
        step_s=None,
        ratio_step=None,
        ratio_latency=None,
        ratio_latency_folded=None)
    text = cost_table.rendered([row('Mona', **nothing)])
    head = next(t for t in text.splitlines() if t.startswith('| method'))
    assert [c.strip() for c in head.split('|')[1:-1]] == [
        'method', 'memory', 'trains', 'kept, MiB', '/ Full', 'floor',
        'products / Full'
    ]


def test_kinds_of_operations_are_a_second_table():
    rows = [
        row(method, operations=dict(products=seconds, others=.5))
        for method, seconds in (('Full', 2.), ('Mona', 1.25))
    ]
    lines = cost_table.rendered(rows).splitlines()
    cells = [[c.strip() for c in t.split('|')[1:-1]] for t in lines[-4:]]
    assert cells[0] == ['method', 'memory', 'products', 'others', 'all']
    assert cells[2:] == [['Full', 'fast', '2.00', '0.50', '2.50'],
                         ['Mona', 'fast', '1.25', '0.50', '1.75']]


@pytest.mark.parametrize('kwargs,both', [
    (dict(method='Mona'), (.68, .75)),
    (dict(method='LoRA:rank=64', memory='lean'), (.33, .8)),
    (dict(method='LST', with_cp=True), (.15, 1.1)),
    (dict(method='Full', memory='stock'), (None, None)),
    (dict(method='Mona', config='upernet_vit-b.py'), (None, None)),
])
def test_targets_stand_beside_what_was_measured(kwargs, both):
    one = row(**dict(dict(config='mask-rcnn_swin-b_coco.py'), **kwargs))
    assert tuple(cost_table.target(one, w) for w in ('bytes', 'step')) == both
    assert ('target of it' in cost_table.rendered([one])) == (
        both[0] is not None)


@pytest.mark.parametrize('method,with_cp,floor', [
    ('Mona', False, 2 / 3),
    ('Mona', True, 1),
    ('Full', True, 4 / 3),
    ('LST', True, 1 / 3),
    ('DTL', True, None),
    ('HST', False, None),
])
def test_floor_of_a_step(method, with_cp, floor):
    found = cost_table.floor_of_step(row(method, with_cp=with_cp))
    assert found == (None if floor is None else pytest.approx(floor))
