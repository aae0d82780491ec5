_base_ = './mask-rcnn_swin-b_coco.py'
custom_hooks = [dict(type='mmpeft.SubnetHook')]
