"""Stock optimizer constructors and schedules with what is attached."""
import importlib
import logging

import pytest
from mmengine.logging import MMLogger
from mmengine.optim import LinearLR, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')

import segmentor  # noqa: E402
from conftest import peft_cfg  # noqa: E402

from mmpeft import frozen_warnings  # noqa: E402


class Lines(logging.Handler):
    """Keeps what reaches the handlers of a logger."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


@pytest.fixture
def logger():
    logger = MMLogger.get_instance('frozen', log_level='INFO')
    logger.handlers = [Lines()]
    yield logger
    del MMLogger._instance_dict['frozen']


def model_of(method, **kwargs):
    cfg = segmentor.config(method, allow_random_base=True, **kwargs).model
    importlib.import_module('mmseg.models')
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(cfg)


def wrapper_of(model, **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='AdamW', lr=.1, weight_decay=.5),
            paramwise_cfg=paramwise))


def test_one_line_for_all_frozen_parameters(logger):
    model = model_of('LoRA:rank=2')
    handler, = logger.handlers
    handler.lines.clear()
    wrapper_of(model, bias_decay_mult=0.)
    logger.warning('decode_head.x is skipped since it is not pretty')
    frozen = sum(not p.requires_grad for p in model.parameters())
    kinds = [line for line in handler.lines if 'paramwise' not in line[1]]
    assert frozen > 50 and kinds == [
        ('INFO', 'Frozen parameters are left out of the optimizer: '
         f'{frozen} in backbone.'),
        ('WARNING', 'decode_head.x is skipped since it is not pretty'),
    ]
    assert any('paramwise' in line for _, line in handler.lines)


def test_stock_model_is_logged_as_ever(logger):
    model = MODELS.build(dict(segmentor.BACKBONE, frozen_stages=0))
    model.train()
    wrapper_of(model, norm_decay_mult=0.)
    handler, = logger.handlers
    frozen = [line for level, line in handler.lines if level == 'WARNING']
    assert len(frozen) == sum(not p.requires_grad for p in model.parameters())


def test_filter_is_added_once_and_makes_no_logger():
    before = dict(MMLogger._instance_dict)
    MMLogger._instance_dict.clear()
    try:
        frozen_warnings.collapse_frozen_warnings()
        assert not MMLogger._instance_dict
        logger = MMLogger.get_instance('once')
        for _ in range(2):
            frozen_warnings.collapse_frozen_warnings()
        assert [type(f)
                for f in logger.filters] == [frozen_warnings.FrozenParameters]
    finally:
        MMLogger._instance_dict.clear()
        MMLogger._instance_dict.update(before)


def test_run_logs_one_line(tmp_path):
    cfg = segmentor.config('LoRA:rank=2', str(tmp_path), iters=1)
    cfg.model.backbone.allow_random_base = True
    cfg.log_level = 'INFO'
    cfg.optim_wrapper.update(
        optimizer=dict(type='AdamW', lr=.1, weight_decay=.5),
        paramwise_cfg=dict(norm_decay_mult=0.))
    runner, _ = segmentor.train(cfg)
    log, = tmp_path.glob('*/*.log')
    text = log.read_text()
    assert 'is skipped since' not in text
    assert text.count('Frozen parameters are left out') == 1
    assert runner.iter == 1


def test_custom_keys():
    model = model_of('LoRA:rank=2+LNTune')
    wrapper = wrapper_of(
        model,
        norm_decay_mult=0.,
        custom_keys={
            '.peft.': dict(lr_mult=3., decay_mult=0.),
            'decode_head': dict(lr_mult=10.)
        })
    expected = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = (.3, 0.) if '.peft.' in name else (.1, 0.)
        expected[id(parameter)] = (
            1., .5) if name.startswith('decode_head') else rate
    given = {
        id(p): (g['lr'], g['weight_decay'])
        for g in wrapper.optimizer.param_groups
        for p in g['params']
    }
    assert given.keys() == expected.keys()
    for key, rate in expected.items():
        assert given[key] == pytest.approx(rate)


def test_schedule_scales_every_group():
    model = model_of('LoRA:rank=2')
    wrapper = wrapper_of(model, custom_keys={'.peft.': dict(lr_mult=3.)})
    before = [g['lr'] for g in wrapper.optimizer.param_groups]
    LinearLR(wrapper, start_factor=.5, by_epoch=False, begin=0, end=4)
    after = [g['lr'] for g in wrapper.optimizer.param_groups]
    assert {.1, .3} == {round(lr, 6) for lr in before}
    assert after == pytest.approx([.5 * lr for lr in before])


def test_depth_of_what_is_attached(kind):
    """Layer-wise decay of mmpretrain asks the backbone for it."""
    backbone = MODELS.build(peft_cfg(kind, 'LoRA:rank=2+AdaptFormer:dim=2'))
    if not hasattr(backbone, 'get_layer_depth'):
        pytest.skip(f'stock {type(backbone).__name__} knows no depths')
    stock, attached = {}, {}
    for name, _ in backbone.named_parameters():
        depths = attached if '.peft.' in name else stock
        block = name.split('.peft.')[0]
        depths[block if depths is attached else name] = \
            backbone.get_layer_depth(name)
    assert attached
    for block, depth in attached.items():
        inside = {d for n, d in stock.items() if n.startswith(block + '.')}
        assert inside == {depth}
