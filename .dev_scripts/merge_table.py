#!/usr/bin/env python3
"""Prints how far merged models are from unmerged ones.

    .venv/bin/python .dev_scripts/merge_table.py [KIND ...]

One row for each method that merges, on the tiny backbones of the tests: the
largest difference of an output, relative to its largest entry, in float32 and
in float64, over two sizes of images.
"""
import copy
import logging
import os.path as osp
import sys

import torch

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
sys.path[:0] = [ROOT, osp.join(ROOT, 'tests')]

from conftest import METHODS, build_pair, method_of, perturb  # noqa: E402
from kinds import KINDS  # noqa: E402

from mmpeft.errors import MergeError, SiteError  # noqa: E402
from mmpeft.merging import merged_state_dict  # noqa: E402
from mmpeft.state import attached_modules, load_whole  # noqa: E402


@torch.no_grad()
def difference(stock, peft, kind, dtype):
    """Of the outputs of a model and of the stock one with merged weights."""
    stock, peft = (copy.deepcopy(m).to(dtype) for m in (stock, peft))
    load_whole(stock, merged_state_dict(peft))
    stock.eval(), peft.eval()
    worst = 0.
    for size in KINDS[kind].sizes:
        torch.manual_seed(2)
        image = torch.randn(2, 3, *size, dtype=dtype)
        for a, b in zip(stock(image), peft(image)):
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


def main(kinds):
    logging.disable(logging.INFO)
    print('| method |' + ''.join(f' {k}, fp32 | fp64 |' for k in kinds))
    print('| :--- |' + ' ---: | ---: |' * len(kinds))
    for name, method in METHODS.items():
        if getattr(method_of(name), 'no_merge', None) is not None:
            continue
        cells = []
        for kind in kinds:
            try:
                stock, peft = build_pair(kind, method)
                perturb(peft)
                if not attached_modules(peft):
                    break  # in place, merging changes nothing
                cells += [
                    f'{difference(stock, peft, kind, d):.1e}'
                    for d in (torch.float32, torch.float64)
                ]
            except (MergeError, SiteError):
                cells += ['refused', '']
        if cells:
            print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:] or ['mmdet', 'vit', 'beit', 'timm_vit'])
