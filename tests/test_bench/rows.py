"""Rows of a benchmark that nobody ran, for the tests of its report."""
from types import SimpleNamespace

from mmpeft.counting import ppt_factor

TRAINS = dict(
    Full=86_000_000,
    Frozen=0,
    BitFit=200_000,
    LoRA=3_000_000,
    Adapter=3_100_000,
    Mona=4_100_000)


def cell(method, score, seed=0, **values):
    """A finished one; ``values`` take the place of what it has."""
    head = 1_000_000
    trains = TRAINS.get(method, 10_000)
    row = dict(
        task='camvid',
        config='configs/camvid.py',
        method=method,
        spec=method,
        seed=seed,
        phase='final',
        lr=.001,
        head_lr=None,
        status='done',
        reason=None,
        metric_name='mIoU',
        metric=score,
        backbone_trainable=trains,
        head_trainable=head,
        model_total=90_000_000,
        ppt=score * ppt_factor(trains),
        ppt_with_head=score * ppt_factor(trains + head),
        step_s=.25,
        saved_bytes=(20 + trains // 1_000_000) * 2**20,
        versions=dict(torch='2.x'),
        ended='2026-01-02T03:04:05+00:00')
    return dict(row, **values)


def some_rows():
    """Five methods with three seeds, one that failed, and a tuning run."""
    means = dict(Full=50., Frozen=40., BitFit=44., LoRA=48., Mona=51.)
    rows = [
        cell(method, mean + step, seed) for method, mean in means.items()
        for seed, step in enumerate((-.5, 0., .8))
    ]
    del rows[-1]  # Mona has two seeds
    rows.append(
        cell(
            'Adapter',
            0.,
            status='failed',
            reason='SiteError: a < b\n& c',
            metric=None,
            ppt=None,
            ppt_with_head=None))
    rows += [
        cell('LoRA', score, 100, phase='tune', lr=lr)
        for lr, score in ((.0001, 41.), (.001, 45.5), (.01, 43.))
    ]
    return rows


def some_plan():
    """What :func:`some_rows` would be the result of, and a method more."""
    task = SimpleNamespace(
        methods={m: m
                 for m in [*TRAINS, 'SSF']},
        seeds=(0, 1, 2),
        metric='mIoU',
        config='configs/camvid.py',
        budget=SimpleNamespace(unit='iters', count=300),
        lrs=(.0001, .001, .01),
        head_lrs=(),
        rule='climb',
        tune_seed=100)
    return SimpleNamespace(
        name='test', title='Rows of a test.', tasks=dict(camvid=task))
