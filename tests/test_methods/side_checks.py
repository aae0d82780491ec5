"""What every side network is held to, given its formula.

A formula has four functions in plain operations, on tokens in float64 and a
mapping ``p`` from parameter names to tensors: ``start(x, p)``,
``step(u, place, x, y, taps, hw, p)``, ``cross(u, stage, x, merge, hw, p)`` and
``output(u, x, stage, p)``.
"""
import copy
import functools
import itertools
from typing import Any, Callable, Dict, List, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmpeft.engine.measure import kept_by_forward
from mmpeft.methods.side import SideNetwork, Trunk, TrunkBlock
from mmpeft.recompute import MEMORY
from mmpeft.sites import TokenLayout
from . import reference as ref
from .checks import TOLERANCE, check_close, check_gradients
from .recorded import fill, tensor
from .swins import swin, trained

WIDTHS, HEADS, WINDOW = (16, 32), (2, 4), 4
# Sizes that windows of 4 do not divide; the second is half the first.
MAPS = ((7, 5), (4, 3))
SITES = ('attn_branch', 'ffn_branch')
IMAGE = (2, 3, 28, 20)


def trunk(window=WINDOW, outputs=(0, 1)) -> Trunk:
    """Two stages of two blocks, the second of each shifted."""
    blocks = []
    for stage, dims in enumerate(WIDTHS):
        for shift in (0, 0 if window is None else window // 2):
            blocks.append(
                TrunkBlock(
                    len(blocks), stage, f'stages.{stage}.blocks.x', dims,
                    HEADS[stage], 4 * dims, window, shift))
    return Trunk(tuple(blocks), dict(enumerate(WIDTHS)), outputs, WIDTHS[0])


def unfold(x: Tensor, hw: Tuple[int, int]) -> Tensor:
    """2 x 2 neighbours side by side: (B, H * W, C) -> (B, H/2 * W/2, 4 C)."""
    height, width = hw
    high, wide = -(-height // 2), -(-width // 2)
    grid = x.new_zeros(x.shape[0], 2 * high, 2 * wide, x.shape[-1])
    grid[:, :height, :width] = x.reshape(-1, height, width, x.shape[-1])
    parts = [grid[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.cat(parts, -1).flatten(1, 2)


def merging(hw: Tuple[int, int]) -> Callable:
    """A patch merging with a LayerNorm, like the stock one."""
    weight = tensor('merge', 2 * WIDTHS[0], 4 * WIDTHS[0]) / 8
    scale, shift = tensor('scale', 4 * WIDTHS[0]), tensor('b', 4 * WIDTHS[0])

    def merge(x: Tensor) -> Tensor:
        t = ref.layer_norm(unfold(x, hw), scale.to(x), shift.to(x))
        return ref.linear(t, weight.to(x), None)

    return merge


@functools.lru_cache(None)
def visible(hw: Tuple[int, int], window, shift: int) -> Tensor:
    """(H * W, H * W), whether two tokens of a map see each other."""
    height, width = hw
    if window is None:
        return torch.ones(height * width, height * width, dtype=torch.bool)
    labels = []
    for y in range(height):
        for x in range(width):
            label = []
            for position, size in ((y, height), (x, width)):
                full = -(-size // window) * window
                moved = (position - shift) % full
                label += [moved // window, position < shift]
            labels.append(label)
    labels = torch.tensor([[int(v) for v in row] for row in labels])
    return (labels[:, None] == labels[None]).all(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, hw: tuple,
              place: TrunkBlock) -> Tensor:
    """Over the whole map, with the weights of unseen tokens set to 0."""
    seen = visible(hw, place.window_size, place.shift_size)
    size = q.shape[-1] // heads
    outs = []
    for head in range(heads):
        part = slice(head * size, head * size + size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**.5
        weights = torch.exp(scores) * seen
        weights = weights / weights.sum(-1, keepdim=True)
        outs.append(weights @ v[..., part])
    return torch.cat(outs, -1)


def run_formula(formula: Any, p: Dict[str, Tensor], places: List[TrunkBlock],
                inputs: List[Dict], merges: Dict[int, Callable],
                outputs: tuple) -> List[Tensor]:
    """The network in plain operations; what goes into each output norm."""
    u, outs = formula.start(inputs[0]['x'], p), []
    for i, (place, seen) in enumerate(zip(places, inputs)):
        if i and place.stage != places[i - 1].stage:
            u = formula.cross(u, place.stage, inputs[i - 1]['y'],
                              merges[place.stage], inputs[i - 1]['hw'], p)
        u = formula.step(u, place, seen['x'], seen['y'], seen, seen['hw'], p)
        last = i + 1 == len(places) or places[i + 1].stage != place.stage
        if last and place.stage in outputs:
            outs.append(formula.output(u, seen['y'], place.stage, p))
    return outs


def check_network(network: SideNetwork, formula: Any, dtype) -> None:
    """Outputs and all gradients of a network that is driven by hand."""
    fill(network)
    network.to(dtype).train()
    places, outputs = network.trunk.blocks, network.trunk.outputs
    inputs = []
    for place in places:
        hw, dims = MAPS[place.stage], place.embed_dims
        inputs.append({
            name:
            tensor(f'{name} {place.index}', 2, hw[0] * hw[1], dims)
            for name in ('x', 'y') + SITES
        })
        inputs[-1]['hw'] = hw
    merge = merging(MAPS[0])

    def cast(t: Tensor) -> Tensor:
        # Not even a gradient that could be had is taken.
        return t.to(dtype).requires_grad_().detach()

    u, ours = network.start(cast(inputs[0]['x']), TokenLayout(MAPS[0])), []
    for i, (place, seen) in enumerate(zip(places, inputs)):
        layout = TokenLayout(seen['hw'])
        if i and place.stage != places[i - 1].stage:
            u = network.next_stage(u, place.stage, merge,
                                   TokenLayout(inputs[i - 1]['hw']))
        taps = {site: cast(seen[site]) for site in network.taps}
        u = network.step(u, place, cast(seen['x']), cast(seen['y']), taps,
                         layout)
        last = i + 1 == len(places) or places[i + 1].stage != place.stage
        if last and place.stage in outputs:
            ours.append(
                network.output(u, cast(seen['y']), place.stage, layout))
    leaves = ref.parameters(network)
    rounded = [{
        k: v.to(dtype).double() if isinstance(v, Tensor) else v
        for k, v in seen.items()
    } for seen in inputs]
    expected = run_formula(formula, leaves, places, rounded, {1: merge},
                           outputs)
    _compare(ours, expected, dtype)
    check_gradients(network, leaves, dtype, type(network).__name__)


def _compare(ours, expected, dtype) -> None:
    assert len(ours) == len(expected)
    total = expected_total = 0.
    for i, (mine, theirs) in enumerate(zip(ours, expected)):
        check_close(mine, theirs, TOLERANCE[dtype], f'output {i}')
        weight = tensor(f'weight {i}', *mine.shape, dtype=dtype)
        total = total + (mine * weight).sum()
        expected_total = expected_total + (theirs * weight.double()).sum()
    total.backward()
    expected_total.backward()


def record(stock: nn.Module, image: Tensor) -> List[Dict]:
    """Inputs, outputs and branches of the blocks of a stock Swin."""
    seen = []
    for stage in stock.stages:
        for block in stage.blocks:

            def note(module, args, kwargs, out):
                x = args[0]
                hw = tuple(args[1] if len(args) > 1 else kwargs['hw_shape'])
                seen[-1].update(x=x, y=out, hw=hw)

            block.register_forward_pre_hook(lambda *_: seen.append({}))
            block.register_forward_hook(note, with_kwargs=True)
            block.attn.register_forward_hook(
                lambda _, __, out: seen[-1].update(attn_branch=out))
            block.ffn.layers.register_forward_hook(
                lambda _, __, out: seen[-1].update(ffn_branch=out))
    with torch.no_grad():
        stock(image)
    return seen


def check_backbone(library: str,
                   method: dict,
                   formula: Any,
                   dtype=torch.float64,
                   **kwargs) -> None:
    """A whole backbone against the formula on what a stock one computes."""
    backbone = swin(library, method, **kwargs)
    stock = swin(library, None, **kwargs)
    for model in (backbone, stock):
        fill(model)
        model.to(dtype).train()
    image = tensor('image', *IMAGE, dtype=dtype)
    inputs = [{
        k: v.double() if isinstance(v, Tensor) else v
        for k, v in seen.items()
    } for seen in record(stock, image)]
    network = getattr(backbone.peft, method['type'].lower())
    leaves = ref.parameters(network)
    stock.double()
    merges = {}
    for before, place in zip(inputs, network.trunk.blocks[1:]):
        if place.stage not in merges:
            merging = stock.stages[place.stage - 1].downsample
            merges[place.stage] = _merge(merging, before['hw'])
    found = backbone(image)
    joined = run_formula(formula, leaves, network.trunk.blocks, inputs, merges,
                         network.trunk.outputs)
    expected = []
    for stage, tokens, mine in zip(network.trunk.outputs, joined, found):
        out = getattr(stock, f'norm{stage}')(tokens)
        expected.append(out.transpose(1, 2).reshape(mine.shape))
    _compare(found, expected, dtype)
    check_gradients(network, leaves, dtype, type(network).__name__)
    norms = [f'norm{s}.' for s in network.trunk.outputs]
    for name, parameter in backbone.named_parameters():
        if '.peft.' in f'.{name}':
            continue
        if network.trains_out_norms and name.startswith(tuple(norms)):
            check_close(parameter.grad,
                        stock.get_parameter(name).grad, TOLERANCE[dtype], name)
        else:
            assert parameter.grad is None, name


def _merge(merging: nn.Module, hw: tuple) -> Callable:
    return lambda tokens: merging(tokens, hw)[0]


def check_starts_frozen(library: str, method: dict) -> None:
    """At first the outputs are those of the stock backbone, bit for bit; in
    training where blocks compute as stock ones."""
    torch.manual_seed(0)
    backbone = swin(library, method, memory='stock')
    stock = swin(library)
    backbone.init_weights()
    stock.load_state_dict(
        {k: backbone.state_dict()[k]
         for k in stock.state_dict()})
    image = tensor('image', *IMAGE, dtype=torch.float32)
    for mode in (True, False):
        backbone.train(mode), stock.train(mode)
        for mine, theirs in zip(backbone(image), stock(image)):
            assert torch.equal(mine, theirs)


def check_backbone_keeps_nothing(method: dict) -> int:
    """No block saves a tensor for backward.

    Returns:
        int: Bytes that everything else saved.
    """
    backbone = swin('mmdet', method, drop_path_rate=.2).train()
    inside = []
    for stage in backbone.stages:
        for block in stage.blocks:
            for stock in (block.norm1, block.attn, block.norm2,
                          block.ffn.layers):
                stock.register_forward_pre_hook(lambda *_: inside.append(True))
                stock.register_forward_hook(lambda *_: inside.pop() and None)
    image = tensor('image', *IMAGE, dtype=torch.float32)
    return saved_bytes(backbone, image, inside)


def saved_bytes(backbone: nn.Module, image: Tensor, inside=()) -> int:
    """Bytes that a training forward keeps, each storage once."""
    own = {
        t.untyped_storage().data_ptr()
        for t in [*backbone.parameters(), *backbone.buffers()]
    }
    saved = {}

    def keep(t: Tensor) -> Tensor:
        assert not inside, f'a block keeps {tuple(t.shape)} for backward'
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    backbone.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outs = backbone(image)
        total = sum(saved.values())
    del outs
    return total


def share_of_full(method, memory='lean') -> float:
    """Bytes kept, as a share of those that full fine-tuning keeps."""
    kwargs = dict(depths=(2, 2, 6, 2), num_heads=(2, 4, 8, 16), window_size=7)
    image = tensor('image', 1, 3, 128, 96, dtype=torch.float32)
    ours, full = (
        kept_by_forward(
            swin('mmdet', m, embed_dims=32, memory=memory, **kwargs).train(),
            image).saved for m in (method, 'Full'))
    return ours / full


def gradients(backbone: nn.Module) -> Dict[str, Tensor]:
    """Of one training step on a fixed image."""
    backbone.zero_grad()
    image = tensor('image', *IMAGE, dtype=torch.float64)
    torch.manual_seed(0)
    loss = 0.
    for i, out in enumerate(backbone.double().train()(image)):
        loss = loss + (out * tensor(f'weight {i}', *out.shape)).sum()
    loss.backward()
    return {n: p.grad.clone() for n, p in trained(backbone).items()}


def check_recomputing(method: dict) -> None:
    """Gradients are the same whatever is computed again in backward."""
    found = []
    for block_cp, memory in itertools.product((False, True), MEMORY):
        for with_cp in ({}, dict(with_cp=True), dict(with_cp=False)):
            backbone = swin(
                'mmdet',
                dict(method, **with_cp),
                memory=memory,
                with_cp=block_cp,
                drop_path_rate=.3)
            fill(backbone)
            found.append(gradients(backbone))
    for other in found[1:]:
        assert list(other) == list(found[0])
        for name, grad in other.items():
            torch.testing.assert_close(
                grad, found[0][name], rtol=1e-10, atol=1e-12)


def check_all_tensors_move(method: dict) -> None:
    """After one step every tensor that trains has a gradient that is not 0,
    and nothing else has one."""
    torch.manual_seed(0)
    backbone = swin('mmdet', method)
    gradients(backbone)
    with torch.no_grad():
        for parameter in trained(backbone).values():
            assert parameter.grad is not None
            parameter -= 1e-2 * parameter.grad
    for name, grad in gradients(backbone).items():
        assert grad.abs().max() > 0, name
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def check_deepcopy(method: dict) -> None:
    """A copy runs its own network and holds no tensor of a forward."""
    backbone = swin('mmdet', method).double()
    fill(backbone)
    image = tensor('image', *IMAGE)
    outs = backbone(image)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in trained(twin).values():
            parameter.add_(.1)
    for first, again in zip(outs, backbone(image)):
        assert torch.equal(first, again)
    assert not torch.equal(outs[0], twin(image)[0])
