# UPerNet, Swin-B, Pascal Context with the 60 classes of the stock data set
# (59 and background). No stock Swin config has this data: model, data,
# schedule (80k, 16 images: 4 GPUs x 4) and runtime are the stock parts, the
# optimizer is that of the stock Swin configs. Learning rate of the recipe:
# 6e-5 for 16 images.
# Importing mmpeft first makes 'mmseg::' known on every stack, also to a stock
# tool that opens this file.
_base_ = __import__('mmpeft') and [
    './parts/upernet_swin-b.py', 'mmseg::_base_/datasets/pascal_context.py'
]

model = dict(
    data_preprocessor=dict(size=(480, 480)),
    decode_head=dict(num_classes=60),
    auxiliary_head=dict(num_classes=60))
