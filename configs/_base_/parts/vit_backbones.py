# Released weights of ViT, each with the backbone of mmpretrain that they are
# from. A config takes one as `backbone=dict(**_base_.vit.b_mae, ...)`.
# Position embeddings keep the size of the weights; the stock backbone resizes
# them to that of the picture. URLs are those of mmpretrain's metafiles and
# configs; MAE, DINOv2 and DeiT III take pictures normalised by the mean of
# ImageNet, as stock configs do, the ImageNet-21k weights from -1 to 1.


def weights(path):
    return dict(
        type='Pretrained',
        checkpoint='https://download.openmmlab.com/' + path,
        prefix='backbone.')


def backbone(path, stock='VisionTransformer', **kwargs):
    return dict(
        type='mmpeft.PEFTBackbone',
        stock=f'mmpretrain.{stock}',
        init_cfg=weights(path),
        **kwargs)


def p16(path, **kwargs):
    return backbone(path, img_size=224, patch_size=16, **kwargs)


def dinov2(path, **kwargs):
    return backbone(
        path,
        img_size=518,
        patch_size=14,
        layer_scale_init_value=1e-5,
        **kwargs)


vit = dict(
    # Google's, pre-trained on ImageNet-21k; 'in1k' in its name is a slip.
    b_in21k=p16(
        'mmclassification/v0/vit/pretrain/vit-base-p16_3rdparty_pt-64xb64_'
        'in1k-224_20210928-02284250.pth',
        arch='base'),
    b_mae=p16(
        'mmselfsup/1.x/mae/mae_vit-base-p16_8xb512-fp16-coslr-1600e_in1k/'
        'mae_vit-base-p16_8xb512-fp16-coslr-1600e_in1k_20220825-f7569ca2.pth',
        arch='base'),
    l_mae=p16(
        'mmselfsup/1.x/mae/mae_vit-large-p16_8xb512-fp16-coslr-1600e_in1k/'
        'mae_vit-large-p16_8xb512-fp16-coslr-1600e_in1k_20220825-cc7e98c9.pth',
        arch='large'),
    b_dinov2=dinov2(
        'mmpretrain/v1.0/dinov2/vit-base-p14_dinov2-pre_3rdparty_20230426-'
        'ba246503.pth',
        arch='base'),
    l_dinov2=dinov2(
        'mmpretrain/v1.0/dinov2/vit-large-p14_dinov2-pre_3rdparty_20230426-'
        'f3302d9e.pth',
        arch='large'),
    # DeiT III, pre-trained on ImageNet-21k and fine-tuned on ImageNet-1k.
    b_deit3=p16(
        'mmclassification/v0/deit3/deit3-base-p16_in21k-pre_3rdparty_in1k_'
        '20221009-87983ca1.pth',
        stock='DeiT3',
        arch='base'),
    l_deit3=p16(
        'mmclassification/v0/deit3/deit3-large-p16_in21k-pre_3rdparty_in1k_'
        '20221009-d8d27084.pth',
        stock='DeiT3',
        arch='large'))
