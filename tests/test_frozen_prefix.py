"""What is before the first trainable tensor runs without autograd."""
import pytest
import torch
from conftest import KINDS, peft_cfg
from mmengine.registry import MODELS

from mmpeft.backbones import find_family
from mmpeft.engine.measure import kept_by_forward

# Blocks 2 and 3 train: a stage of its own in Swin, the last half of a ViT.
LATE = {
    'Partial': 'Partial:num_blocks=2',
    'LoRA': dict(type='LoRA', rank=4, layers=[2, 3]),
    'Mona': dict(type='Mona', dim=4, layers=[2, 3]),
    'BitFit': dict(type='BitFit', layers=[2, 3]),
}
FEW = ('mmdet', 'mmpretrain', 'vit', 'vit_mmseg')


def build(kind, method):
    facts = KINDS[kind]
    for package in (facts.library, *facts.packages):
        pytest.importorskip(package)
    torch.manual_seed(0)
    backbone = MODELS.build(peft_cfg(kind, method, allow_random_base=True))
    backbone.train()
    return backbone


def blocks_of(backbone):
    return [block.module for _, block in find_family(backbone)]


def run(backbone, image):
    """Whether each block's input and output are part of a graph."""
    found = []

    def note(block, args, output):
        tensor = output if torch.is_tensor(output) else output[0]
        found.append((args[0].requires_grad, tensor.requires_grad))

    hooks = [b.register_forward_hook(note) for b in blocks_of(backbone)]
    backbone(image)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize('kind', FEW)
@pytest.mark.parametrize('name', LATE)
def test_the_graph_begins_at_the_first_trainable_block(kind, name, image):
    backbone = build(kind, LATE[name])
    found = run(backbone, image)
    assert found == [(False, False)] * 2 + [(False, True), (True, True)]


@pytest.mark.parametrize('kind', FEW)
@pytest.mark.parametrize('name', LATE)
def test_the_prefix_keeps_nothing(kind, name, image):
    """As many bytes as if no gradients were recorded there."""
    backbone = build(kind, LATE[name])
    backbone(image)
    kept = kept_by_forward(backbone, image).saved
    first = blocks_of(backbone)[2]
    begin = first.register_forward_pre_hook(
        lambda *_: torch.set_grad_enabled(True) and None)

    def without_prefix(image):
        with torch.no_grad():  # its end restores the mode of before
            outputs = backbone(image)
        return outputs

    expected = kept_by_forward(without_prefix, image).saved
    begin.remove()
    assert 0 < kept == expected


@pytest.mark.parametrize('kind', FEW)
def test_frozen_keeps_nothing_at_all(kind, image):
    backbone = build(kind, 'Frozen')
    backbone(image)
    assert run(backbone, image) == [(False, False)] * 4
    assert kept_by_forward(backbone, image).saved == 0


@pytest.mark.parametrize('kind', FEW)
def test_late_blocks_keep_half_of_all(kind, image):
    """A control: what is spared is what the first blocks would keep."""
    late = build(kind, LATE['LoRA'])
    everywhere = build(kind, dict(type='LoRA', rank=4))
    for backbone in (late, everywhere):
        backbone(image)
    assert kept_by_forward(
        late, image).saved < .7 * kept_by_forward(everywhere, image).saved
