"""Every method on two ranks against one process; a script for torchrun.

    torchrun ranks.py OUT KIND...

Writes JSON: by kind of backbone and method, the largest difference of a weight
after two steps, relative to the largest entry of its tensor.
"""
import json
import os.path as osp
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, osp.dirname(osp.abspath(__file__)))

import conftest  # noqa: E402
from kinds import KINDS  # noqa: E402

from mmpeft.cli import leave_ranks  # noqa: E402
from mmpeft.engine.listing import refusal  # noqa: E402


def build(kind, method):
    """A backbone without drop-path and dropout, which ranks draw apart, and
    without statistics of a batch, of which each rank has its own; in float64,
    where the order of a sum does not matter."""
    _, peft = conftest.build_pair(kind, method)
    for module in conftest.perturb(peft).modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
        for rate in ('drop_prob', 'drop_path_rate'):
            if hasattr(module, rate):
                setattr(module, rate, 0.)
    return peft.double()


def train(model, batches):
    """Two steps; the mean over a batch, so that ranks average to it."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=.05)
    for image in batches:
        optimizer.zero_grad()
        sum((o**2).mean() for o in model(image)).backward()
        optimizer.step()


def compare(kind, rank, ranks):
    """By method, the largest relative difference."""
    size = KINDS[kind].sizes[0]
    batches = [torch.randn(2 * ranks, 3, *size).double() for _ in range(2)]
    family, gaps = conftest.family_of(kind), {}
    for name, method in conftest.METHODS.items():
        if name == 'Frozen' or refusal(conftest.method_of(name), family):
            continue
        single, double = build(kind, method), build(kind, method)
        double.load_state_dict(single.state_dict())
        train(single, batches)
        wrapped = DistributedDataParallel(double, find_unused_parameters=False)
        train(wrapped, [b[2 * rank:2 * rank + 2] for b in batches])
        gaps[name] = max(
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-3))
            for a, b in zip(single.parameters(), double.parameters()))
    return gaps


def main():
    dist.init_process_group('gloo')
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gaps = {kind: compare(kind, rank, ranks) for kind in sys.argv[2:]}
    if rank == 0:
        with open(sys.argv[1], 'w') as file:
            json.dump(gaps, file)
    leave_ranks()


if __name__ == '__main__':
    main()
