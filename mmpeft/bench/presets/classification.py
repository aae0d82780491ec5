# The classification half: the 19 tasks of VTAB-1k with ViT-B/16, through
# mmpretrain. Rates are chosen on 800 / 200 of the 1000 training pictures;
# then all 1000 train, and the test split reports. --data-root is the folder
# of the tasks (data/vtab-1k); --cfg-options deletes none of them, but a plan
# of yours may inherit this one (_base_) and name other tasks.
title = 'Classification: VTAB-1k, 19 tasks'

_root = '{{$MMPEFT_DATA_ROOT:data/vtab-1k}}'
seeds = (0, 1, 2)
costs = dict(image_size=(224, 224), batch_size=64)
tuning = dict(lrs=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
methods = {
    'Full': 'Full',
    'Frozen': 'Frozen',
    'Partial-1': 'Partial:num_blocks=1',
    'BitFit': 'BitFit',
    'LNTune': 'LNTune',
    'Adapter': 'Adapter:dim=8,placement=pfeiffer',
    'AdaptFormer': 'AdaptFormer:dim=8,scale=0.1',
    'LoRA': 'LoRA:rank=8,targets=[q,v]',
    'VPTShallow': 'VPTShallow:num_tokens=100',
    'VPTDeep': 'VPTDeep:num_tokens=50',
    'PrefixTuning': 'PrefixTuning:num_tokens=20',
    'SSF': 'SSF',
    # Uniform; tools/search_noah.py finds widths for each block.
    'NOAH': 'NOAH:num_tokens=10,rank=10,dim=10',
    'SCT': 'SCT:num_channels=96',
    'FacTTT': 'FacTTT:rank=16',
    'FacTTK': 'FacTTK:rank=32',
    'RepAdapter': 'RepAdapter:dim=8',
    'Hydra': 'Hydra:rank=2',
    'LST': 'LST:reduction=8',
    'LAST': 'LAST:rank=16',
    'SNF': 'SNF:num_flows=5',
    'BAPAT': 'BAPAT:dim=32,adaptformer_dim=64',
    'DTL': 'DTL:rank=2',
    'DTLPlus': 'DTLPlus:rank=2',
    'HST': 'HST',
    'GPS': 'GPS:num_inputs=1',
    'Mona': 'Mona:dim=64'
}
tasks = {
    _task:
    dict(
        config='mmpeft::_base_/vit-b_vtab.py',
        metric='accuracy/top1',
        env=dict(VTAB_TASK=_task),
        # As in configs/hst/vit-b_vtab.py.
        method_options=dict(
            HST=dict(
                model=dict(
                    neck=dict(
                        _delete_=True, type='mmpretrain.GlobalAveragePooling'),
                    head=dict(type='mmpretrain.LinearClsHead',
                              in_channels=72)))),
        options=dict(
            train_dataloader=dict(dataset=dict(data_root=f'{_root}/{_task}')),
            val_dataloader=dict(dataset=dict(data_root=f'{_root}/{_task}'))),
        tune=dict(
            train_dataloader=dict(dataset=dict(ann_file='train800.txt')),
            val_dataloader=dict(dataset=dict(ann_file='val200.txt'))))
    for _task in ('cifar', 'caltech101', 'dtd', 'oxford_flowers102',
                  'oxford_iiit_pet', 'svhn', 'sun397', 'patch_camelyon',
                  'eurosat', 'resisc45', 'diabetic_retinopathy', 'clevr_count',
                  'clevr_dist', 'dmlab', 'kitti', 'dsprites_loc',
                  'dsprites_ori', 'smallnorb_azi', 'smallnorb_ele')
}
