# The first three questions, on the data that mmpeft draws itself:
# 1. How far is full fine-tuning from a linear probe? The head of
#    `segmentation` is one 1 x 1 convolution, so Frozen is the linear probe.
# 2. What does one method of each category of the survey do in between?
#    Adapters: Mona. Prompts: VPTDeep. Prefixes: PrefixTuning. Side networks:
#    DTL. Chosen parameters: BitFit. Reparameterisation: LoRA.
# 3. Does it hold on a dense task with a real head (Mask R-CNN), and what does
#    it cost at inference? One rate for all there, that of the source training.
# Widths are in the ratio of the papers: 64 at Swin-B's 128 are 16 at 32.
title = 'First three: linear probe, categories, a dense task'

bases = [
    dict(
        config='mmpeft::_base_/mask-rcnn_swin-nano_shapes-source.py',
        out='data/shapes_v1/swin-nano_source.pth',
        options=dict(randomness=dict(seed=0)))
]

costs = dict(image_size=(128, 128), batch_size=4)
tasks = dict(
    segmentation=dict(
        config='mmpeft::_base_/upernet_swin-nano_shapes.py',
        metric='mIoU',
        seeds=(0, 1, 2),
        budget=dict(iters=80),
        tuning=dict(
            lrs=(2.5e-4, 1e-3, 4e-3, 1.6e-2), budget=dict(iters=40), seed=100),
        holdout=5,
        options=dict(
            train_dataloader=dict(batch_size=4),
            model=dict(
                backbone=dict(drop_path_rate=0.),
                decode_head=dict(
                    _delete_=True,
                    type='mmseg.FCNHead',
                    in_channels=[32, 64, 128, 256],
                    in_index=[0, 1, 2, 3],
                    input_transform='resize_concat',
                    channels=480,
                    num_convs=0,
                    concat_input=False,
                    dropout_ratio=0.,
                    num_classes=6,
                    align_corners=False,
                    loss_decode=dict(
                        type='mmseg.CrossEntropyLoss',
                        # Nine of ten pixels are background.
                        class_weight=[0.2, 1., 1., 1., 1., 1.])),
                auxiliary_head=None)),
        methods={
            'Full': 'Full',
            'Frozen': 'Frozen',
            'Mona': 'Mona:dim=16',
            'VPTDeep': 'VPTDeep:num_tokens=12',
            'PrefixTuning': 'PrefixTuning:num_tokens=5',
            'DTL': 'DTL:rank=4',
            'BitFit': 'BitFit',
            'LoRA': 'LoRA:rank=16'
        }),
    detection=dict(
        config='mmpeft::_base_/mask-rcnn_swin-nano_shapes.py',
        metric='coco/segm_mAP',
        metric_scale=100.,
        seeds=(0, ),
        budget=dict(epochs=6),
        tuning=dict(lrs=(1e-3, )),
        methods={
            'Full': 'Full',
            'Frozen': 'Frozen',
            'Mona': 'Mona:dim=16',
            'LoRA': 'LoRA:rank=16'
        }))
