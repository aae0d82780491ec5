"""Rows of tools/benchmark.py, on tiny models."""
import dataclasses
import platform
import re
import subprocess
import sys

import pytest
import segmentor
import torch
from mmengine.config import Config

import mmpeft
from mmpeft.config import add_method, load_config
from mmpeft.engine.benchmark import Settings, benchmark
from mmpeft.engine.cost_report import check_plot, plot, print_table
from mmpeft.engine.measure import kept_by_forward
from mmpeft.engine.operations import GROUPS
from mmpeft.engine.subject import Subject, set_checkpointing
from mmpeft.errors import PEFTError
from mmpeft.registry import MODELS

pytest.importorskip('mmseg')

SIZE = (36, 44)
AT = 'model.backbone'
TINY = Settings(batch_size=2, image_size=SIZE, repeats=1, backbone_only=True)
UNTIMED = Settings(2, SIZE, 0, backbone_only=True)
METHODS = ('LoRA:rank=4', 'Mona:dim=4')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(segmentor.config().pretty_text)
    return str(path)


@pytest.fixture(scope='module')
def rows(config):
    return benchmark(config, METHODS, TINY)


def test_every_column_of_the_design(rows):
    assert [r['method'] for r in rows] == ['Full', 'Frozen', *METHODS]
    wanted = {
        'config', 'method', 'memory', 'backbone_trainable', 'saved_bytes',
        'peak_bytes', 'step_s', 'forward_s', 'latency_s', 'latency_merged_s',
        'ratio_saved', 'ratio_step', 'ratio_latency', 'ratio_latency_merged',
        'flops', 'ratio_flops'
    }
    for row in rows:
        assert wanted < set(row)
        assert 0 < row['forward_s'] <= row['step_s']
        assert row['latency_s'] > 0 and row['ratio_latency'] > 0
        low, high = row['step_spread_s']
        assert low <= row['step_s'] <= high
        assert row['settings']['image_size'] == SIZE


def test_references(rows):
    full, frozen = rows[:2]
    assert full['ratio_saved'] == full['ratio_step'] == 1
    assert full['ratio_flops'] == 1
    # A forward alone; modules need two passes and their own.
    assert frozen['ratio_flops'] == pytest.approx(1 / 3, abs=.02)
    assert all(2 / 3 < row['ratio_flops'] < 1 for row in rows[2:])
    assert frozen['saved_bytes'] == frozen['backbone_trainable'] == 0
    assert frozen['ratio_step'] > 0


@pytest.mark.parametrize('number', range(4))
def test_saved_bytes_are_those_of_the_backbone(rows, number):
    """Built as a user would, with its own weights."""
    method = rows[number]['method']
    backbone = MODELS.build(
        dict(
            segmentor.BACKBONE,
            type='mmpeft.PEFTBackbone',
            stock='mmseg.SwinTransformer',
            method=method,
            allow_random_base=True))
    backbone.train()
    image = torch.randn(2, 3, *SIZE)
    backbone(image)
    assert kept_by_forward(backbone,
                           image).saved == rows[number]['saved_bytes']
    assert mmpeft.count_params(
        backbone)['backbone_trainable'] == rows[number]['backbone_trainable']


def test_forms_for_deployment(rows):
    _, frozen, lora, mona = rows
    assert lora['latency_merged_s'] > 0 and lora['not_merged'] is None
    assert 'nothing to fold' in lora['not_folded']
    assert lora['latency_folded_s'] is None
    assert mona['latency_merged_s'] is None
    assert 'Mona' in mona['not_merged']
    assert mona['latency_folded_s'] > 0 and mona['not_folded'] is None
    assert frozen['latency_merged_s'] > 0


def test_memory_of_the_backbone_without_times(config):
    memories = ('stock', 'fast', 'lean')
    rows = benchmark(config, ['BitFit'], UNTIMED, memories)[2:]
    assert [r['memory'] for r in rows] == list(memories)
    for row in rows:
        assert row['saved_bytes'] > 0 and row['ratio_saved'] < 1
        assert row['step_s'] is row['ratio_step'] is row['latency_s'] is None


def test_whole_model(config):
    settings = Settings(2, SIZE, 0)
    full, frozen, lora = benchmark(config, ['LoRA:rank=4'], settings)
    # The head trains, and keeps what it needs.
    assert 0 < frozen['saved_bytes'] < lora['saved_bytes'] < \
        full['saved_bytes']
    assert lora['not_merged'] is None


def test_a_model_without_a_plain_forward_has_no_latency(config, monkeypatch):

    def infer(self, model=None):
        raise TypeError('an argument is missing')

    monkeypatch.setattr(Subject, 'infer', infer)
    settings = Settings(2, SIZE, 1, backbone_only=True)
    rows = benchmark(config, (), settings)
    for row in rows:
        assert row['no_latency'] == 'TypeError: an argument is missing'
        assert row['latency_s'] is None and row['step_s'] > 0
    print_table(rows)


def test_steps_without_latency(config, monkeypatch, capsys):
    monkeypatch.delattr(Subject, 'infer')
    settings = Settings(2, SIZE, 1, backbone_only=True, latency=False)
    rows = benchmark(config, (), settings)
    for row in rows:
        assert row['latency_s'] is None and row['step_s'] > 0
    print_table(rows)
    shown = capsys.readouterr().out
    assert 'step s' in shown and 'latency' not in shown.lower()


def test_what_a_step_does(config, capsys):
    settings = dataclasses.replace(UNTIMED, operations=True, latency=False)
    rows = benchmark(config, ('Mona:dim=4', ), settings)
    full, frozen, mona = (r['operations'] for r in rows)
    assert set(full) == {*GROUPS, 'optimizer', 'others'}
    for kinds in (full, mona):
        for kind in ('products', 'filters', 'norms', 'attention', 'GELU',
                     'copies', 'sums', 'optimizer', 'others'):
            assert kinds[kind] > 0, kind
    assert mona['dropout'] > 0
    assert frozen['products'] > 0 == frozen['optimizer']
    print_table(rows)
    assert 'What a step does' in capsys.readouterr().out


def test_checkpointing_is_compared_with_full_without(config):
    settings = Settings(2, SIZE, 0, backbone_only=True, with_cp=True)
    rows = benchmark(config, ['LNTune'], settings)
    assert [(r['method'], r['with_cp']) for r in rows] == [('Full', False),
                                                           ('Full', True),
                                                           ('Frozen', True),
                                                           ('LNTune', True)]
    assert rows[0]['ratio_saved'] == 1 > rows[1]['ratio_saved'] > 0
    assert rows[3]['ratio_saved'] < rows[1]['ratio_saved'] + .1


def test_checkpointing_where_there_is_none():
    cfg = Config(
        dict(model=dict(backbone=dict(type='torch.nn.Linear')))).copy()
    cfg.model.backbone.type = torch.nn.Linear
    with pytest.raises(PEFTError, match='Linear has no with_cp'):
        set_checkpointing(cfg, AT)


def test_method_of_the_config(config, tmp_path):
    cfg, _ = add_method(load_config(config), 'LoRA:rank=2')
    path = tmp_path / 'lora.py'
    path.write_text(cfg.pretty_text)
    rows = benchmark(str(path), (), UNTIMED)
    assert [r['method'] for r in rows] == ['Full', 'Frozen', 'LoRA:rank=2']


def test_frozen_weights_are_shared_and_trained_ones_are_not(config):
    cfg = load_config(config)
    stock = Subject(cfg, AT, TINY).model
    peft, _ = add_method(cfg, 'LNTune')
    peft.model.backbone.allow_random_base = True
    model = Subject(peft, AT, TINY, base=stock).model
    for name, own in model.named_parameters():
        theirs = stock.get_parameter(name)
        assert torch.equal(own, theirs)
        shared = own.data_ptr() == theirs.data_ptr()
        assert shared != own.requires_grad


@pytest.mark.parametrize('library,name,size', [
    ('mmdet', 'full/mask-rcnn_swin-nano_shapes.py', (64, 96)),
    ('mmseg', 'full/upernet_swin-nano_shapes.py', (64, 96)),
])
def test_models_with_neck_and_head(library, name, size):
    pytest.importorskip(library)
    cfg, at = add_method(load_config(mmpeft.config_path(name)), 'Frozen')
    cfg.model.backbone.allow_random_base = True
    model = Subject(cfg, at, Settings(2, size, 0))
    model.try_step()
    model.model.eval()
    assert model.infer() is not None


def test_a_classifier():
    pytest.importorskip('mmpretrain')
    from kinds import KINDS
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(KINDS['vit'].cfg, out_type='cls_token'),
                head=dict(type='LinearClsHead', num_classes=3,
                          in_channels=16))))
    cfg.model.backbone.out_indices = [3]
    model = Subject(cfg, AT, Settings(2, (48, 48), 0))
    model.try_step()
    model.model.eval()
    assert model.infer().shape == (2, 3)


def test_a_model_that_does_not_run_is_one_sentence(config):
    with pytest.raises(
            PEFTError, match='does not run a step.*--backbone-only') as error:
        benchmark(
            config, (),
            Settings(2, SIZE, 0),
            options=['model.decode_head.in_channels=[16,30]'])
    assert '\n' not in str(error.value)


def test_a_model_that_cannot_be_built_is_one_sentence(config):
    with pytest.raises(PEFTError, match='EncoderDecoder cannot be built'):
        benchmark(
            config, (),
            Settings(2, SIZE, 0),
            options=['model.decode_head.channels=x'])


def test_a_library_without_labels(config, tmp_path):
    path = tmp_path / 'other.py'
    cfg = load_config(config)
    cfg.default_scope = 'mmengine'
    cfg.model.type = 'mmseg.EncoderDecoder'
    cfg.model.backbone.type = 'mmseg.SwinTransformer'
    cfg.model.decode_head.type = 'mmseg.FCNHead'
    cfg.model.decode_head.loss_decode.type = 'mmseg.CrossEntropyLoss'
    cfg.model.data_preprocessor.type = 'mmseg.SegDataPreProcessor'
    path.write_text(cfg.pretty_text)
    with pytest.raises(PEFTError, match='not of mmengine.*--backbone-only'):
        benchmark(str(path), (), Settings(2, SIZE, 0))


@pytest.mark.parametrize('settings,says', [
    (dict(batch_size=0), '--batch-size must be at least 1'),
    (dict(image_size=(8, 0)), '--image-size must be at least 1'),
    (dict(repeats=-1), '--repeats must be at least 0'),
    (dict(threads=0), '--threads must be at least 1'),
    (dict(device='gpu'), '--device gpu cannot be used'),
    (dict(clock='cpu', device='meta'), '--threads 1'),
])
def test_settings(settings, says):
    with pytest.raises(PEFTError, match=says):
        Settings(**settings).checked()


def test_chart_and_table(rows, tmp_path, capsys):
    file = tmp_path / 'cost.png'
    check_plot(str(file))
    plot(rows, str(file))
    assert file.stat().st_size > 10000
    print_table(rows)
    shown = capsys.readouterr().out
    assert 'backbone, 2 x 36 x 44, fp32, cpu' in shown
    assert 'saved MiB' in shown and 'Mona:dim=4' in shown
    shown = ' '.join(shown.split())
    assert shown.count('Not folded: ') == 1
    assert re.search('Not folded: [^.]*LoRA:rank=4[.] There is nothing', shown)


@pytest.mark.parametrize('name,says', [('cost.bmpx', 'written as one of'),
                                       ('no/cost.png', 'there is no folder')])
def test_charts_that_cannot_be_written(tmp_path, name, says):
    with pytest.raises(PEFTError, match=says):
        check_plot(str(tmp_path / name))


@pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason='other libraries have no such')
def test_freed_memory_is_used_again():
    """Nothing of it goes back to the system."""
    code = ('import resource, torch\n'
            'from mmpeft.engine.settings import keep_freed_memory\n'
            'if {}:\n'
            '    assert keep_freed_memory()\n'
            'def pages():\n'
            '    return int(open("/proc/self/statm").read().split()[0])\n'
            'x = torch.ones(12 * 2**20)\n'
            'before = pages()\n'
            'del x\n'
            'print((before - pages()) * resource.getpagesize())\n')
    given, kept = (
        int(
            subprocess.check_output([sys.executable, '-c',
                                     code.format(keeps)]))
        for keeps in (False, True))
    assert given >= 48 * 2**20 and kept == 0
