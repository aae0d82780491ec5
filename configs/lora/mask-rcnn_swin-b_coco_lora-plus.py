# LoRA+: the learning rate of B is 16 times that of A.
_base_ = './mask-rcnn_swin-b_coco.py'
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'.lora_B': dict(lr_mult=16)}))
