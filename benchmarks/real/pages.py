"""What stands around the tables of each page."""
from pathlib import Path

__all__ = ['INTROS', 'reading_of']

INTROS = {
    'real_data':
    """\
# PEFT methods on real data

The tables are written by `{command}`
and not edited by hand. A cell that says "not measured" was not run.

One Swin of 2.7 M parameters (widths 32 to 256, depths 2-2-4-2, window 7),
pre-trained on 100 classes of Tiny ImageNet at 64x64, is the start of every
run. So small a base, so few images and so short a training order methods
among themselves in this regime only; they say nothing about Swin-B on COCO.

- Every run is one call of `tools/train.py` with one thread; the bottleneck of
  each method is half the first stage's width, as 64 is for Swin-B: {specs}.
- One learning rate for all that trains: head, neck and what the method
  trains, as in the stock Swin recipes. Every method is tuned over the same
  grid; "(edge)" marks a choice at an end of it.
- Frozen and the PEFT methods keep the output norms `norm0` to `norm2`, which
  no classifier has, at weight 1 and bias 0, as the released Mona recipe does
  (BitFit trains their biases); Full trains them. `norm3` comes with the base.
- No drop-path, window 7 on sizes that 7 does not divide (padding is at work).
- PPT is `metric * exp(-log10(P / 1e7 + 1))`, P the trainable parameters of
  the backbone, of the first metric column.
- CPU s/step: median CPU time of a training step, data loading included.
  Other programs ran beside, so the wall clock is left out.
""",
    'real_data_vit':
    """\
# PEFT methods on real data, with a released DeiT-tiny

The tables are written by this command and not edited by hand. A cell that
says "not measured" was not run.

```bash
{command}
```

The released DeiT-tiny (5.5 M parameters without its classifier, pre-trained
on ImageNet-1k at 224x224) is the start of every run. It arrives through
`init_cfg`; every one of its tensors is compared with the model's before
training. Few images, short training and a light head order methods among
themselves in this regime only.

- Every run is one call of `tools/train.py` with one thread; the bottleneck of
  each method is a twelfth of the width, as 64 is for ViT-B: {specs}.
- The head learns at a rate of its own, which Frozen chooses for all methods;
  what a method trains in the backbone is tuned over one grid, the same for
  every method; "(edge)" marks a choice at an end of a grid.
- That rate of its own takes the place of the rule for norms in the head, so
  these have weight decay, for every method.
- The images are 15 x 11 patches; the positions of the 14 x 14 of the
  pre-training are interpolated in the forward, as stock does.
- No drop-path.
- PPT is `mIoU * exp(-log10(P / 1e7 + 1))`, P the trainable parameters of the
  backbone.
- CPU s/step: median CPU time of a training step, data loading included.
  Other programs ran beside, so the wall clock is left out.
"""
}


def reading_of(page: str) -> Path:
    """What a person wrote, after the tables."""
    return Path(__file__).with_name(f'reading_{page}.md')
