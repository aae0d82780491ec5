# UPerNet, Swin-B, Cityscapes: the recipe of Pascal Context on the stock data
# (crops of 512 x 1024, 19 classes). Learning rate of the recipe: 6e-5 for 16
# images (8 GPUs x 2).
_base_ = __import__('mmpeft') and [
    './parts/upernet_swin-b.py', 'mmseg::_base_/datasets/cityscapes.py'
]

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19))
