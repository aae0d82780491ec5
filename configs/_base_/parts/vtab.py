# VTAB-1k: one of 19 tasks, chosen by the environment variable VTAB_TASK, in
# the folders and lists in which the papers on visual PEFT share it: 800 + 200
# pictures to train on (train800.txt to tune on val200.txt), test.txt to test.
# No augmentation, as in these papers.
task = '{{$VTAB_TASK:cifar}}'
num_classes = dict(
    # natural
    cifar=100,
    caltech101=102,
    dtd=47,
    oxford_flowers102=102,
    oxford_iiit_pet=37,
    svhn=10,
    sun397=397,
    # specialized
    patch_camelyon=2,
    eurosat=10,
    resisc45=45,
    diabetic_retinopathy=5,
    # structured
    clevr_count=8,
    clevr_dist=6,
    dmlab=6,
    kitti=4,
    dsprites_loc=16,
    dsprites_ori=16,
    smallnorb_azi=18,
    smallnorb_ele=9)[task]

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=224, interpolation='bicubic', backend='pillow'),
    dict(type='PackInputs')
]
data_root = f'data/vtab-1k/{task}'
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        ann_file='train800val200.txt',
        pipeline=pipeline))
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        ann_file='test.txt',
        pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
