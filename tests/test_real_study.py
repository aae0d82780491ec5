"""The study on real data: planning, resuming and the table."""

import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import mmpeft  # noqa: F401 (makes the names mmseg::… resolve)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.real import cell as cell_module  # noqa: E402
from benchmarks.real import data, few_shot, plan, report, tasks  # noqa: E402
from benchmarks.real.halves import evaluate_halves, split_images  # noqa: E402

CAMVID, COCO = tasks.TASKS['camvid'], tasks.TASKS['coco-mini']
VIT = tasks.TASKS['camvid-vit']


def fake_result(cell, score):
    """A finished cell with the given percentage for every metric."""
    names = report.COLUMNS[cell.task] + ('mIoU', 'bbox_mAP')
    phases = ('tune', 'final') if cell.task == 'coco-mini' else (cell.phase, )
    return dict(
        vars(cell),
        digest=cell.digest(),
        status='done',
        date='2026-01-01T00:00:00+00:00',
        backbone_trainable=1_000_000,
        model_trainable=2_000_000,
        cpu_s_per_step=0.25,
        max_rss_bytes=2**30,
        threads=1,
        cores=2,
        torch='2',
        steps=250,
        **{phase: dict.fromkeys(names, score)
           for phase in phases})


def grid_cells(task, results=None, iters=None):
    """The whole grid of every method."""
    return [
        cell for method in task.methods
        for cell in plan.tuning_cells(task, method, results or {}, iters)
    ]


def fake_tuning(task, best):
    """All tuning cells; learning rate number ``best`` wins by a point."""
    return {
        cell.name: fake_result(cell, 20. + (cell.lr == task.grid[best]))
        for cell in grid_cells(task)
    }


def test_grid_is_the_same_for_every_method():
    cells = grid_cells(CAMVID)
    assert len(cells) == len({c.name for c in cells})
    for method in tasks.METHODS:
        own = [c for c in cells if c.method == method]
        assert tuple(c.lr for c in own) == CAMVID.grid
        assert {c.seed for c in own} == {CAMVID.tune_seed}
    assert CAMVID.tune_seed not in CAMVID.seeds


def test_a_head_of_its_own_is_chosen_by_frozen():
    """Then all methods climb one grid beside that head."""
    assert {c.method for c in grid_cells(VIT)} == {'Frozen'}
    assert [c.method for c in plan.next_cells(VIT, {})] == ['Frozen'] * 2
    results, order = {}, []
    while cells := plan.next_cells(VIT, results):
        order.append(cells[0])
        # The third head, the second rate.
        head = cells[0].lr * cells[0].head_mult
        score = 30. - abs(VIT.head_grid.index(pytest.approx(head)) - 2)
        if cells[0].method != 'Frozen':
            score -= abs(VIT.grid.index(cells[0].lr) - 1)
        results[cells[0].name] = fake_result(cells[0], score)
    for method in VIT.methods:
        best = plan.choose(VIT, results, method)
        assert best.lr * best.head_mult == pytest.approx(VIT.head_grid[2])
        assert best.lr == VIT.grid[0 if method == 'Frozen' else 1]
        cells = plan.tuning_cells(VIT, method, results)
        assert len({c.name for c in cells}) == 4
    final = [c for c in order if c.phase == 'final']
    assert len(final) == 3 * len(VIT.methods)
    page = report.render(results, 'real_data_vit')
    assert '--tasks camvid-vit' in page and 'VPTDeep' in page
    assert not re.search(r'not measured +\|', page)
    assert re.search(r'\| Frozen +\| 30.00.*\| 0.009 +\|', page)


def walk(task, best):
    """Runs the plan with learning rate number ``best`` as the best one."""
    results, order = {}, []
    while cells := plan.next_cells(task, results):
        cell = cells[0]
        order.append(cell)
        score = 30.
        if cell.phase == 'tune':
            score -= abs(task.grid.index(cell.lr) - best)
        results[cell.name] = fake_result(cell, score)
    return results, order


@pytest.mark.parametrize('best', range(4))
def test_grid_is_climbed_from_its_middle(best):
    results, order = walk(CAMVID, best)
    tuned = [c for c in order if c.phase == 'tune']
    # 0 and 1 are found by going down from 1 and 2, 2 and 3 by going up.
    rates = CAMVID.grid[:3] if best < 2 else CAMVID.grid[1:]
    for method in tasks.METHODS:
        assert {c.lr for c in tuned if c.method == method} == set(rates)
        assert plan.choose(CAMVID, results, method).lr == CAMVID.grid[best]
    final = [c for c in order if c.phase == 'final']
    why = [c for c in order if c.phase == 'why']
    assert order == tuned + final + why
    # Seeds go round: what a stopped study has is equal for all methods.
    assert [c.seed for c in final] == sorted(c.seed for c in final)
    assert len(final) == 3 * len(tasks.METHODS)
    for cell in why:
        assert cell.seed == 0
        if cell.head_mult != 1:
            head = cell.lr * cell.head_mult
            assert head == pytest.approx(CAMVID.grid[best])


def test_reported_runs_wait_for_the_learning_rate():
    results, order = walk(CAMVID, best=1)
    missing = next(c for c in order if c.method == 'Mona')
    del results[missing.name]
    assert plan.choose(CAMVID, results, 'Mona') is None
    assert 'Mona' not in {c.method for c in plan.final_cells(CAMVID, results)}
    assert plan.next_cells(CAMVID, results) == [missing]


def test_failed_learning_rate_is_not_chosen():
    results, order = walk(CAMVID, best=2)
    for cell in order:
        if cell.method == 'Full' and cell.lr == CAMVID.grid[2]:
            results[cell.name] = dict(
                vars(cell), status='failed', reason='diverged')
    # 1 is now the best of 1 and 2, so 0 has to be tried.
    wanted = plan.next_cells(CAMVID, results)
    assert [c.lr for c in wanted] == [CAMVID.grid[0]]
    results[wanted[0].name] = fake_result(wanted[0], 1.)
    assert plan.choose(CAMVID, results, 'Full').lr == CAMVID.grid[1]
    assert 'diverged' in report.render(results, 'real_data')


def test_report_of_nothing_says_not_measured():
    page = report.render({}, 'real_data')
    assert page.count('not measured') > 2 * len(tasks.METHODS)
    assert 'Nothing has been measured' in page


def test_report_numbers():
    results = fake_tuning(CAMVID, best=1)
    while cells := plan.next_cells(CAMVID, results):
        for cell in cells:
            score = 20. if cell.phase == 'tune' else 30. + cell.seed
            score += 5 * (cell.method == 'Mona')
            results[cell.name] = fake_result(cell, score)
    results.update(fake_tuning(COCO, best=0))
    page = report.render(results, 'real_data')
    assert re.search(r'\| Mona +\| 36.00 ± 1.00 +\| 1.0000 +\|', page)
    assert f'{cell_module.ppt(36., 1_000_000):.2f}' in page
    assert 'Mona +5.00' in page and 'BitFit +0.00' in page
    assert '(edge)' in page and '**21.00**' in page
    assert not re.search(r'not measured +\|', page)


def test_ppt():
    assert cell_module.ppt(50., 0) == 50.
    assert cell_module.ppt(50., 90_000_000) == pytest.approx(50 / 2.718281828)


@pytest.fixture
def places(tmp_path):
    return cell_module.Places(
        tmp_path / 'data', tmp_path / 'cache',
        {t.base: tmp_path / f'{t.base}.pth'
         for t in tasks.TASKS.values()})


@pytest.fixture
def one_cell():
    return grid_cells(CAMVID, iters=2)[0]


def pretend(monkeypatch, body):
    """Replaces ``tools/train.py`` by a line of Python."""
    monkeypatch.setattr(cell_module, 'cell_command',
                        lambda cell, places: [sys.executable, '-c', body])


def test_failed_cell_is_recorded_with_its_reason(places, one_cell,
                                                 monkeypatch):
    pretend(monkeypatch, 'raise SystemExit("no such weights")')
    result = cell_module.run_cell(one_cell, places, {})
    assert result['status'] == 'failed'
    assert 'no such weights' in result['reason']
    assert cell_module.read_result(one_cell, places) == result


def test_killed_cell_leaves_no_result(places, one_cell, monkeypatch):
    pretend(monkeypatch, 'import os; os.kill(os.getpid(), 15)')
    assert cell_module.run_cell(one_cell, places, {}) is None
    assert cell_module.read_result(one_cell, places) is None


@pytest.mark.parametrize('differ', [[], ['norm3.weight']])
def test_weights_must_have_been_loaded(places, one_cell, monkeypatch, differ):
    record = dict(
        metrics=dict(mIoU=31., aAcc=1., mAcc=1.),
        finite=True,
        base=dict(tensors=2, differ=differ, new=[]))
    out = places.folder(one_cell) / 'record.json'
    pretend(monkeypatch, f'open({str(out)!r}, "w").write('
            f'{json.dumps(record)!r})')
    result = cell_module.run_cell(one_cell, places, {})
    if differ:
        assert 'norm3.weight' in result['reason']
    else:
        assert result['tune']['mIoU'] == 31.


def test_result_of_another_config_is_not_used(places, one_cell, monkeypatch):
    pretend(monkeypatch, 'raise SystemExit(1)')
    cell_module.run_cell(one_cell, places, {})
    monkeypatch.setitem(tasks.METHODS, one_cell.method, 'Frozen')
    assert cell_module.read_result(one_cell, places) is None


@pytest.mark.parametrize('task', list(tasks.TASKS))
@pytest.mark.parametrize('phase', ['tune', 'final', 'why'])
def test_cell_config_is_read(places, task, phase):
    config = pytest.importorskip('mmengine.config').Config
    pytest.importorskip('mmseg')
    pytest.importorskip('mmdet')
    cell = plan.Cell(task, 'Mona', 0.003, 7, phase, 11, 3.)
    file = places.cache / 'cell.py'
    file.parent.mkdir(parents=True)
    file.write_text(cell_module.cell_config(cell, places))
    cfg = config.fromfile(file, import_custom_modules=False)
    assert cfg.optim_wrapper.optimizer.lr == 0.003
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert keys['head'] == keys['neck'] == dict(lr_mult=3)
    assert keys['ln1' if task == 'camvid-vit' else 'norm'] == dict(
        decay_mult=0.)
    assert cfg.randomness.seed == 7 and cfg.train_cfg.max_iters == 11
    assert cfg.model.backbone.init_cfg.checkpoint == str(
        places.checkpoints[tasks.TASKS[task].base])
    assert cfg.test_dataloader.dataset == cfg.val_dataloader.dataset
    if task != 'coco-mini':
        split = 'val' if phase == 'tune' else 'test'
        assert cfg.val_dataloader.dataset.data_prefix == dict(
            img_path=f'images/{split}', seg_map_path=f'annotations/{split}')
        size = tasks.TASKS[task].size
        assert cfg.model.data_preprocessor.size == size[::-1]
        assert cfg.val_dataloader.dataset.data_root.endswith(
            'camvid_{}x{}'.format(*size))


def test_longer_run_stretches_the_schedule(places):
    cell = plan.Cell('camvid', 'Mona', 0.003, 7, 'why', stretch=3)
    file = places.cache / 'cell.py'
    file.parent.mkdir(parents=True)
    file.write_text(cell_module.cell_config(cell, places))
    config = pytest.importorskip('mmengine.config').Config
    pytest.importorskip('mmseg')
    short = config.fromfile(CAMVID.config_path, import_custom_modules=False)
    cfg = config.fromfile(file, import_custom_modules=False)
    iters = 3 * short.train_cfg.max_iters
    assert cfg.train_cfg.max_iters == cfg.train_cfg.val_interval == iters
    assert cfg.param_scheduler[1].end == iters
    assert cfg.param_scheduler[0] == short.param_scheduler[0]


def test_class_agnostic_keeps_everything_else():
    made = data.class_agnostic(
        dict(
            info=1,
            images=[dict(id=3)],
            categories=[dict(id=7), dict(id=9)],
            annotations=[dict(id=1, category_id=9, bbox=[0, 0, 2, 2])]))
    assert made['annotations'] == [
        dict(id=1, category_id=1, bbox=[0, 0, 2, 2])
    ]
    assert [c['id'] for c in made['categories']] == [1]
    assert made['images'] == [dict(id=3)]


def test_halves_share_no_image(tmp_path):
    halves = split_images([5, 1, 3, 2])
    assert halves == dict(tune=[1, 3], final=[2, 5])
    pytest.importorskip('pycocotools')
    box, square = [10., 10., 40., 40.], [[10, 10, 50, 10, 50, 50, 10, 50]]
    truth = dict(
        images=[dict(id=i, width=64, height=64) for i in (1, 2)],
        categories=[dict(id=1, name='object')],
        annotations=[
            dict(
                id=i,
                image_id=i,
                category_id=1,
                bbox=box,
                area=1600,
                iscrowd=0,
                segmentation=square) for i in (1, 2)
        ])
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    # Image 1 is found, image 2 is not.
    found = dict(
        image_id=1, category_id=1, score=.9, bbox=box, segmentation=square)
    for kind in ('bbox', 'segm'):
        item = dict(found)
        del item['segmentation' if kind == 'bbox' else 'bbox']
        if kind == 'segm':
            from pycocotools import mask
            run = mask.frPyObjects(square, 64, 64)[0]
            item['segmentation'] = dict(run, counts=run['counts'].decode())
        (tmp_path / f'r.{kind}.json').write_text(json.dumps([item]))
    scores = evaluate_halves(tmp_path / 'truth.json', str(tmp_path / 'r'))
    assert scores['tune']['bbox_mAP'] == pytest.approx(100)
    assert scores['tune']['segm_mAP_50'] == pytest.approx(100)
    assert scores['final']['bbox_mAP'] == 0


def test_missing_data_is_one_sentence(tmp_path):
    with pytest.raises(data.DataError, match='--data-root'):
        data.prepare_camvid(tmp_path, tmp_path, CAMVID.size)
    with pytest.raises(data.DataError, match='COCO'):
        data.prepare_coco(tmp_path, tmp_path)


def test_study_resumes(tmp_path, monkeypatch):
    pytest.importorskip('mmengine')
    from benchmarks.real import run
    ran = []

    def fake_run(cell, places, running):
        ran.append(cell.name)
        result = fake_result(cell, 30.)
        folder = places.folder(cell)
        folder.mkdir(parents=True)
        (folder / 'result.json').write_text(json.dumps(result))
        return result

    monkeypatch.setattr(cell_module, 'run_cell', fake_run)
    places = cell_module.Places(tmp_path, tmp_path, {})
    args = types.SimpleNamespace(
        budget=None, jobs=2, iters=None, retry_failed=False)
    run.Study(places, args).run_task('camvid')
    # All tie, so the walk has no end before all four rates.
    total = len(tasks.METHODS) * (4 + len(CAMVID.seeds)) + 12
    assert len(ran) == len(set(ran)) == total
    run.Study(places, args).run_task('camvid')
    assert len(ran) == total
    # Out of time: nothing starts.
    args.budget = 0.
    run.Study(places, args).run_task('coco-mini')
    assert len(ran) == total


def test_few_shots_are_laid_out(tmp_path):
    """No image is in two lists, and each is its own."""
    count, shots = 6 * 25, few_shot.SHOTS
    labels = np.arange(count) % 6
    split = (np.arange(count) >= 6 * 22).astype(np.uint8)
    packed = dict(
        data=np.arange(2 * count, dtype=np.uint16).view(np.uint8),
        offsets=4 * np.arange(count + 1),
        labels=labels,
        split=split,
        names=np.array([b'a', b'b', b'c', b'd', b'e', b'f']))
    out = tmp_path / 'few_shot'
    # Classes 0 and 5.
    assert few_shot.lay_out(packed, out) == dict(
        train=2 * shots, tune=2 * shots, test=2 * 3)
    assert (out / 'classes.txt').read_text() == 'a\nf\n'
    seen = set()
    for name, part in dict(train=0, tune=0, test=1).items():
        for line in (out / f'{name}.txt').read_text().splitlines():
            path, number = line.split()
            index = int(Path(path).stem)
            assert (labels[index], split[index]) == (5 * int(number), part)
            first = np.frombuffer((out / path).read_bytes(), np.uint16)[0]
            assert first == 2 * index and path not in seen
            seen.add(path)


def test_the_plan_of_few_shots(monkeypatch):
    """Every method is in it but the one whose maps a classifier leaves."""
    from mmpeft import methods
    from mmpeft.bench.plan_file import load_plan
    monkeypatch.chdir(ROOT)
    task = load_plan('benchmarks/real/few_shot_plan.py').tasks['few_shot']
    kinds = {spec.partition(':')[0] for spec in task.methods.values()}
    assert kinds == set(methods.__all__) - {
        'PEFTModule', 'Selector', 'SideNetwork', 'ViTAdapter'
    }


@pytest.mark.real_data
@pytest.mark.parametrize('task', list(tasks.TASKS))
def test_two_iterations_on_real_data(task, tmp_path):
    """Needs ``MMPEFT_REAL_DATA``, the folder for ``--data-root``."""
    root = os.environ.get('MMPEFT_REAL_DATA')
    if not root:
        pytest.skip('MMPEFT_REAL_DATA is not set')
    root = Path(root).resolve()
    size = tasks.TASKS[task].size
    if size:
        data.prepare_camvid(root, tmp_path, size)
    else:
        data.prepare_coco(root, tmp_path)
    bases = {
        'swin-nano': data.find_base(root, tmp_path),
        'deit-tiny': data.find_deit(root)
    }
    places = cell_module.Places(root, tmp_path, bases)
    lr = tasks.TASKS[task].grid[0]
    for method in ('Full', 'Mona'):
        cell = plan.Cell(task, method, lr, 0, 'tune', iters=2)
        result = cell_module.run_cell(cell, places, {})
        assert result['status'] == 'done', result['reason']
        assert 0 <= result['tune'][tasks.TASKS[task].metric] < 50
        assert result['steps'] == 2
        # No classifier has these norms; indices are buffers.
        new = [k for k in result['base']['new'] if 'position_index' not in k]
        norms = {'norm0', 'norm1', 'norm2'} if task != 'camvid-vit' else set()
        assert {k.split('.')[0] for k in new} == norms
    # The last method: 2 x 10 or 2 x 12 modules of width 16 (see Mona's
    # docstring).
    assert result['backbone_trainable'] == (210_432 if task == 'camvid-vit'
                                            else 123_264)
