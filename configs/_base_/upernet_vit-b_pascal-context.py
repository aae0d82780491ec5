# UPerNet, ViT-B/16, Pascal Context with the 60 classes of the stock data set
# (59 and background). Model (the stock ViT one: norm behind the last of four
# outputs, multi-level neck), data, schedule (80k, 16 images: 4 GPUs x 4) and
# runtime are the stock parts, the optimizer is that of the stock ViT configs.
# Learning rate of the recipe: 6e-5 for 16 images.
# Importing mmpeft first makes 'mmseg::' known on every stack, also to a stock
# tool that opens this file.
_base_ = __import__('mmpeft') and [
    'mmseg::_base_/models/upernet_vit-b16_ln_mln.py',
    'mmseg::_base_/datasets/pascal_context.py', './parts/segmentation_80k.py',
    './parts/vit_backbones.py'
]

model = dict(
    # -1 to 1, as the weights were trained.
    data_preprocessor=dict(size=(480, 480), mean=[127.5] * 3, std=[127.5] * 3),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        out_type='featmap',
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        **_base_.vit.b_in21k),
    decode_head=dict(num_classes=60),
    auxiliary_head=dict(num_classes=60))

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'pos_embed': dict(decay_mult=0.),
            'cls_token': dict(decay_mult=0.),
            # What mmpretrain calls its norms.
            '.ln1': dict(decay_mult=0.),
            '.ln2': dict(decay_mult=0.)
        }))
