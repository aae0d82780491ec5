"""Shipped configs at widths for a test."""
from mmpeft.config import find_peft_backbones

# Arguments of methods that are a width of their own.
WIDTHS = ('dim', 'rank', 'num_tokens', 'adaptformer_dim', 'num_channels')
PARTS = ('neck', 'head', 'decode_head', 'auxiliary_head', 'panoptic_head')


def narrow(cfg):
    """The same config with a backbone of 16 channels and small heads."""
    backbone, = find_peft_backbones(cfg).values()
    backbone.update(init_cfg=None, allow_random_base=True)
    if 'SwinTransformer' in backbone.stock:
        widths = _narrow_swin(backbone)
    else:
        widths = _narrow_vit(backbone)
    method = backbone.get('method')
    for argument in WIDTHS if isinstance(method, dict) else ():
        if argument in method:
            method[argument] = 4
    if isinstance(method, dict) and method.get('type') == 'ViTAdapter':
        # They divide half the width.
        method.num_heads = 2
    for part in PARTS:
        _replace(cfg.model.get(part), widths)
    for name in ('decode_head', 'auxiliary_head'):
        head = cfg.model.get(name, {})
        if head.get('type') in ('UPerHead', 'FCNHead'):
            head.channels = 16
    _fewer_queries(cfg.model)
    _fewer_boxes(cfg.model.get('train_cfg') or {})
    preprocessor = cfg.model.get('data_preprocessor', {})
    # Mask2Former pads to 1024 pixels, mmseg to its crops.
    preprocessor.pop('batch_augments', None)
    if 'size' in preprocessor:
        preprocessor.size = (32, 32)
    return cfg


def _narrow_swin(backbone):
    shape = dict(embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])
    if 'arch' in backbone:
        old, backbone.arch = dict(base=128, large=192)[backbone.arch], shape
        # Its maps end where they are smaller than a window.
        backbone.pad_small_map = True
    else:
        old = backbone.embed_dims
        backbone.update(shape)
    return {old * 2**i: 16 * 2**i for i in range(4)}


def _narrow_vit(backbone):
    old = dict(base=768, large=1024)[backbone.arch]
    backbone.arch = dict(
        embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32)
    if 'out_indices' in backbone:
        backbone.out_indices = tuple(range(len(backbone.out_indices)))
    return {old: 16}


def _replace(part, widths):
    """Channels that come from the backbone."""
    for item in part if isinstance(part, list) else [part or {}]:
        keys = ['in_channels', 'embed_dim']
        if item.get('type') == 'MultiLevelNeck':
            keys.append('out_channels')
        for key in set(keys) & set(item):
            value = item[key]
            # A method's own outputs are as narrow as they are.
            item[key] = [widths.get(v, v) for v in value] if isinstance(
                value, (list, tuple)) else widths.get(value, value)


def _fewer_queries(model):
    head = model.get('panoptic_head') or model.get('decode_head') or {}
    if 'num_queries' in head:
        head.num_queries = 4
        head.transformer_decoder.num_layers = 1
        head.pixel_decoder.encoder.num_layers = 1
        for train_cfg in (model.get('train_cfg'), head.get('train_cfg')):
            if train_cfg and 'num_points' in train_cfg:
                train_cfg.num_points = 64


def _fewer_boxes(train_cfg):
    if 'rcnn' in train_cfg:
        train_cfg.rpn_proposal.max_per_img = 16
        stages = train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 8
