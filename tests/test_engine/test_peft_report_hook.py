import json
import os.path as osp

import pytest
import torch

pytest.importorskip('mmseg')

import segmentor  # noqa: E402

from mmpeft.errors import PEFTError  # noqa: E402


def run(method, after=3, change=None, iters=4):
    cfg = segmentor.config(method, iters=iters, allow_random_base=True)
    cfg.default_hooks.peft_report = dict(
        type='mmpeft.PEFTReportHook', check_after=after)
    cfg.vis_backends = [dict(type='LocalVisBackend')]
    cfg.visualizer = dict(type='Visualizer', vis_backends=cfg.vis_backends)
    cfg.log_level = 'INFO'
    runner, _ = segmentor.train(cfg, change)
    return runner


def test_table_and_scalars():
    runner = run('Mona:dim=4+LNTune')
    folder = osp.join(runner.work_dir, runner.timestamp)
    log = open(osp.join(folder, f'{runner.timestamp}.log')).read()
    table = log[log.index('Trainable parameters'):]
    rows = {line.split('  ')[0]: line for line in table.splitlines()}
    model = runner.model
    added = sum(p.numel() for n, p in model.named_parameters()
                if '.peft.' in n)
    assert f'{added:,}' in rows['backbone [mona]']
    assert '100.00' in rows['decode_head']
    assert 'PPT factor' in table
    scalars = [
        json.loads(line)
        for line in open(osp.join(folder, 'vis_data', 'scalars.json'))
    ]
    assert any('peft/backbone_trainable' in s for s in scalars)
    # Nothing is left on the model after the check.
    assert not any(p._backward_hooks for p in model.parameters())


def test_module_that_never_runs_stops_the_run():
    """As in backbones that read a layer's weight and never call it."""

    def bypass(runner):
        attention = runner.model.backbone.stages[0].blocks[0].attn.w_msa
        qkv = attention.qkv
        qkv._forward_hooks.clear()
        qkv.__class__ = torch.nn.Linear

    with pytest.raises(PEFTError) as error:
        run('LoRA:rank=2', change=bypass)
    message = str(error.value)
    assert 'After 3 iterations 1 attached modules never ran' in message
    assert 'stages.0.blocks.0.peft.lora.qkv' in message
    assert '2 trainable parameters of the backbone never received' in message


def test_parameter_without_gradient_stops_the_run():

    def detach(runner):
        backbone = runner.model.backbone
        forward = backbone.patch_embed.forward

        def detached(x):
            y, shape = forward(x)
            return y.detach(), shape

        backbone.patch_embed.forward = detached

    with pytest.raises(PEFTError, match='never received.*patch_embed'):
        run('Full', change=detach)


def test_short_runs_and_heads_are_left_alone():

    def unused_head_part(runner):
        runner.model.decode_head.unused = torch.nn.Parameter(torch.ones(3))

    run('LoRA:rank=2', after=3, change=unused_head_part)
    run('LoRA:rank=2', after=20)
