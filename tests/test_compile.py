"""torch.compile gives the same numbers, gradients included."""
import pytest
import torch
from conftest import build_pair, perturb


def assert_same(peft, image):
    torch._dynamo.reset()
    results = []
    for run in (peft, torch.compile(peft, backend='aot_eager')):
        peft.zero_grad()
        outs = run(image)
        sum((o**2).mean() for o in outs).backward()
        results.append(
            [*outs, *(p.grad for p in peft.parameters() if p.requires_grad)])
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-5 * max(1, a.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize('method', [
    'LoRA:rank=2,targets=[q,k,v,proj,fc1,fc2]',
    'Mona:dim=4+VPTDeep:num_tokens=2',
    'SCT:num_channels=4+GPS:num_inputs=2',
])
def test_same_numbers(kind, method, image):
    """Of the graphs that torch takes; no compiler of C++ is asked for."""
    _, peft = build_pair(kind, method, allow_random_base=True)
    perturb(peft).eval()
    assert_same(peft, image)


@pytest.mark.slow
@pytest.mark.parametrize('method', [
    'LoRA:rank=2,targets=[q,v,fc1]', 'DoRA:rank=2', 'SSF', 'Hydra:rank=2',
    'LST:reduction=4'
])
def test_a_step_of_training(method):
    """What takes other ways while it trains."""
    pytest.importorskip('mmdet')
    _, peft = build_pair('mmdet', method, allow_random_base=True)
    perturb(peft).train()
    for module in peft.modules():
        # Draws, of drop-path and of dropout.
        for rate in {'drop_prob', 'p'} & set(vars(module)):
            setattr(module, rate, 0.)
    image = torch.randn(2, 3, 60, 44)
    assert_same(peft, image)
