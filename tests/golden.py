"""The models behind the deltas in ``tests/data``, one for each format.

    python tests/golden.py 1 tests/data/delta_v1.safetensors

wrote the file, and prints the numbers that ``test_golden.py`` holds it to.
"""
import sys
import zlib

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import mmpeft
from mmpeft.delta_parts import delta_names

__all__ = ['MODELS', 'features']

META = dict(
    epoch=3, iter=60, dataset_meta=dict(classes=['a', 'b'], palette=[[1] * 3]))
SOURCE = dict(checkpoint='base.pth', at='backbone', prefix='backbone.')


class Model(nn.Module):
    """A backbone, and a head with statistics."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2, H / 8, W / 8)"""
        return self.head(self.norm(self.backbone(image)[-1]))


def draw(name: str, shape, scale: float) -> Tensor:
    """Numbers that belong to a name, the same to the bit everywhere: whole
    ones from a generator that numpy froze, over a power of 2."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    numbers = generator.randint(-1024, 1025, tuple(shape)) / 1024
    return torch.from_numpy(numbers * scale).float()


def fill(module: nn.Module) -> nn.Module:
    """Every parameter and statistic, by its name."""
    with torch.no_grad():
        for name, value in module.state_dict(keep_vars=True).items():
            if value.is_floating_point():
                one = value.ndim == 1 and name.endswith(('weight', 'var'))
                value.copy_(draw(name, value.shape, .25) + one)
    return module


def version_1(trained: bool) -> Model:
    """Swin with adapters and norms that train, as mmpeft was at format 1.

    Args:
        trained (bool): Whether to give values to what trains; otherwise only
            its base has its own.
    """
    from mmdet.models import SwinTransformer
    torch.manual_seed(0)
    backbone = SwinTransformer(
        embed_dims=8,
        depths=(1, 1),
        num_heads=(1, 2),
        strides=(4, 2),
        window_size=4,
        out_indices=(0, 1))
    model = fill(Model(backbone, 16))
    if not trained:
        nn.init.zeros_(model.head.weight)
    mmpeft.apply(
        model, [
            dict(type='LoRA', rank=2, alpha=3, targets=['q', 'v']),
            dict(type='LNTune', layers='stage:1'),
        ],
        at='backbone')
    if trained:
        own = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name in sorted(delta_names(model)):
                if own[name].is_floating_point():
                    own[name].add_(
                        draw(f'trained {name}', own[name].shape, .125))
    return model


MODELS = {1: version_1}


@torch.no_grad()
def features(model: nn.Module) -> list:
    """A few numbers that depend on all of a model."""
    model.backbone.eval(), model.norm.eval()
    out = model(draw('image', (1, 3, 40, 24), 1.)).double()
    return [float(v) for v in (*out[0, :, 2, 1], *out.std((0, 2, 3)))]


if __name__ == '__main__':
    MODEL = MODELS[int(sys.argv[1])](trained=True)
    mmpeft.save_delta(MODEL, sys.argv[2], [SOURCE], META)
    print(features(MODEL))
