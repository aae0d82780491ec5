"""What a forward keeps, against counts by hand and what hides from others."""
import copy

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from mmpeft.engine.measure import (TrainStep, interleave, kept_by_forward,
                                   loss_of)

ROWS, WIDE, OUT = 10, 32, 4
FLOAT = 4
#: Bytes of the widest map.
MAP = ROWS * WIDE * FLOAT
#: Mean and reciprocal deviation of a LayerNorm.
STATISTICS = 2 * ROWS * FLOAT


def stack():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, WIDE), nn.GELU(), nn.LayerNorm(WIDE),
        nn.Linear(WIDE, OUT))


def rows(requires_grad=True):
    return torch.randn(ROWS, 8, requires_grad=requires_grad)


def test_a_stack_by_hand():
    # The input of GELU, that of the norm, and that of the last layer; the
    # input of the first was there before.
    kept = kept_by_forward(stack(), rows())
    assert kept.saved == 3 * MAP + STATISTICS
    assert kept.outputs == ROWS * OUT * FLOAT


def test_frozen_layers_keep_no_input():
    model = stack().requires_grad_(False)
    # Of the last layer, whose weight gets no gradient.
    assert kept_by_forward(model, rows()).saved == 2 * MAP + STATISTICS
    assert kept_by_forward(model, rows(False)).saved == 0
    with torch.no_grad():
        assert kept_by_forward(stack(), rows()).saved == 0


def test_what_does_not_need_gradients_is_kept_if_something_else_does():
    model = stack().requires_grad_(False)
    model[3].weight.requires_grad = True
    assert kept_by_forward(model, rows(False)).saved == MAP


def test_a_map_that_two_need_counts_once():

    def twice(x):
        y = x.exp()  # keeps its output
        return y.sin() + y.cos()

    assert kept_by_forward(twice, rows()).saved == ROWS * 8 * FLOAT
    # A slice keeps all of it.
    assert kept_by_forward(lambda x: x.exp()[:1].sin(),
                           rows()).saved == ROWS * 8 * FLOAT


@pytest.mark.parametrize('reentrant', (True, False))
def test_checkpointing_is_seen_to_save(reentrant):
    model = stack()

    def run(x):
        hidden = checkpoint(model[:3], x, use_reentrant=reentrant)
        return model[3](hidden)

    # What the last layer gets, and nothing inside.
    assert kept_by_forward(run, rows()).saved == MAP


class Hidden(torch.autograd.Function):
    """Keeps a map where hooks for saved tensors do not look."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x * 3
        ctx.closure = lambda hidden=x * 2: hidden
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.hidden * ctx.closure()


def hooked(forward, x):
    """Bytes that autograd itself knows of."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.untyped_storage().nbytes()) or t,
            lambda t: t):
        forward(x)
    return sum(saved)


def test_a_custom_function_hides_nothing():
    assert hooked(Hidden.apply, rows()) == 0
    assert kept_by_forward(Hidden.apply, rows()).saved == 2 * ROWS * 8 * FLOAT


class Closure(nn.Module):
    """Keeps a map to itself."""

    def forward(self, x):
        noise = torch.randn(ROWS, WIDE)
        self.again = lambda: noise
        return x * 2


def test_a_closure_hides_nothing():
    model = Closure()
    assert hooked(model, rows()) == 0
    assert kept_by_forward(model, rows()).saved == MAP
    # The old one goes when the new one comes.
    assert kept_by_forward(model, rows()).saved == MAP


def test_a_storage_that_grows_hides_nothing():
    grown = []

    def forward(x):
        grown.append(torch.empty(0))
        grown[0].resize_(ROWS * WIDE)
        return x * 2

    assert kept_by_forward(forward, rows()).saved == MAP


def test_a_cache_does_not_count_after_a_warm_up():
    cache = {}

    def forward(x):
        if 'table' not in cache:
            cache['table'] = torch.zeros(ROWS, WIDE)
        return x * 2

    assert kept_by_forward(forward, rows()).saved == MAP
    assert kept_by_forward(forward, rows()).saved == 0


def test_listing_says_what_it_is():
    listing = []
    kept = kept_by_forward(stack(), rows(), listing=listing)
    assert sum(size for size, _, _ in listing) == kept.saved + kept.outputs
    assert (MAP, 'aten.gelu.default', (ROWS, WIDE)) in listing


@pytest.mark.gpu
def test_agrees_with_the_allocator():
    """Which gives away 512 bytes at least, and multiples of them."""
    model = stack().cuda()
    x = torch.randn(512, 8, device='cuda', requires_grad=True)
    model(x)  # workspaces of libraries
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = model(x)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() - before
    del output
    kept = kept_by_forward(model, x)
    assert allocated == kept.saved + kept.outputs


def test_a_step_trains_what_requires_gradients():
    model, x = stack(), rows(False)
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    ends = []
    step = TrainStep(model, x, forward_ends=lambda: ends.append(1))
    step()
    assert ends == [1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith('0.')
    assert all(p.grad is None for p in model.parameters())


def test_a_step_of_a_frozen_model_is_its_forward():
    model = stack().requires_grad_(False)
    TrainStep(model, rows(False))()
    assert model.training


def test_loss_of_all_outputs():
    outputs = (torch.full((2, ), 2.), [torch.full((3, ), 3.)])
    assert loss_of(outputs).item() == 4 + 9


def test_autocast_of_a_step():
    dtypes = []

    def loss(y):
        dtypes.append(y.dtype)
        return loss_of(y)

    TrainStep(stack(), rows(False), autocast=torch.bfloat16, loss=loss)()
    assert dtypes == [torch.bfloat16]


def test_calls_take_turns():
    now, order = [0.], []

    def call(name, seconds):

        def run():
            order.append(name)
            now[0] += seconds

        return run

    seconds = interleave(
        dict(a=call('a', 1.), b=call('b', 2.)), 2, clock=lambda: now[0])
    assert order == ['a', 'b'] * 3
    assert seconds == dict(a=[1., 1.], b=[2., 2.])
