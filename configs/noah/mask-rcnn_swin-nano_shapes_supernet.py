_base_ = './mask-rcnn_swin-nano_shapes.py'
custom_hooks = [
    dict(
        type='mmpeft.SubnetHook',
        num_tokens=(1, 3, 5),
        rank=(1, 3, 5),
        dim=(1, 3, 5))
]
