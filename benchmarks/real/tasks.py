"""Datasets with their models, and the methods on them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

CONFIGS = Path(__file__).parent / 'configs'

# One rule for every bottleneck. Swin: half the width of the first stage, as 64
# is for the 128 channels of Swin-B in the papers. Here that is 16 of 32.
METHODS = {
    'Full': 'Full',
    'Frozen': 'Frozen',
    'BitFit': 'BitFit',
    'LoRA': 'LoRA:rank=16',
    'Adapter': 'Adapter:dim=16',
    'Mona': 'Mona:dim=16'
}
# ViT: a twelfth of the width, as 64 is for the 768 channels of ViT-B.
VIT_METHODS = {
    'Full': 'Full',
    'Frozen': 'Frozen',
    'BitFit': 'BitFit',
    'LoRA': 'LoRA:rank=16',
    'AdaptFormer': 'AdaptFormer:dim=16',
    'VPTDeep': 'VPTDeep:num_tokens=10',
    'Mona': 'Mona:dim=16'
}


@dataclass(frozen=True)
class Task:
    """A dataset with its model.

    Args:
        name (str): As in the names of cells.
        config (str): File in ``configs``.
        metric (str): What learning rates are chosen by, in percent.
        grid (tuple): Learning rates, the same for every method.
        tune_seed (int): Seed of the runs that choose the learning rate.
        seeds (tuple): Seeds of the runs that are reported. Empty: the runs
            of the grid are reported, on images that chose nothing.
        why_mults (dict): Part (a) of the examination: for each method the
            factors on Frozen's learning rate that its backbone gets, while
            the head has Frozen's rate.
        why_long (tuple): Part (b): methods to train ``STRETCH`` times as
            long, at their chosen rates.
        why_long_mults (dict): Part (b) with the rates of part (a).
        methods (dict): Methods, and how ``--method`` names them.
        head_grid (tuple): If given, learning rates of neck and head alone.
            Frozen chooses one, all methods get it, and ``grid`` is for what
            they train of the backbone.
        base (str): The pre-trained backbone, a key of ``data.BASES``.
        size (tuple, optional): (width, height) CamVid is resized to.
        page (str): File in ``docs/en`` its table is in.
    """

    name: str
    config: str
    metric: str
    grid: tuple
    tune_seed: int
    seeds: tuple = ()
    why_mults: dict = field(default_factory=dict)
    why_long: tuple = ()
    why_long_mults: dict = field(default_factory=dict)
    methods: dict = field(default_factory=lambda: METHODS)
    head_grid: tuple = ()
    base: str = 'swin-nano'
    size: Optional[tuple] = None
    page: str = 'real_data'

    @property
    def config_path(self) -> Path:
        return CONFIGS / self.config


TASKS = {
    'camvid':
    Task(
        name='camvid',
        config='upernet_swin-nano_camvid.py',
        metric='mIoU',
        grid=(5e-4, 1.5e-3, 4.5e-3, 1.35e-2),
        tune_seed=100,
        seeds=(0, 1, 2),
        size=(240, 180),
        why_mults=dict(
            Full=(0.03, 0.1),
            BitFit=(0.3, ),
            LoRA=(0.3, ),
            Adapter=(0.3, ),
            Mona=(0.3, )),
        why_long=('Full', 'Frozen', 'LoRA', 'Mona'),
        why_long_mults=dict(LoRA=(0.3, ), Full=(0.03, ))),
    'coco-mini':
    Task(
        name='coco-mini',
        config='mask-rcnn_swin-nano_coco-mini.py',
        metric='bbox_mAP',
        grid=(1.5e-3, 4.5e-3),
        tune_seed=0),
    'camvid-vit':
    Task(
        name='camvid-vit',
        config='setr_deit-tiny_camvid.py',
        metric='mIoU',
        grid=(1e-4, 4e-4, 1.6e-3, 6.4e-3),
        head_grid=(1e-3, 3e-3, 9e-3, 2.7e-2),
        tune_seed=100,
        seeds=(0, 1, 2),
        methods=VIT_METHODS,
        base='deit-tiny',
        size=(240, 176),
        page='real_data_vit')
}
