"""One step of training of each type of detector and segmentor."""
import importlib.util
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData

from mmpeft.config import add_method, load_config

mmdet = pytest.importorskip('mmdet')
mmseg = pytest.importorskip('mmseg')

HEIGHT, WIDTH = 64, 96
# mmseg's ViTs are built for one size, here in pixels.
SIDE = 64
#: Channels of every part become an eighth; in DINO and DeformableDETR, where
#: the positions of proposals have 512, only those of the backbone.
NARROWER = 8
CHANNELS = re.compile(r'(\w+_)?(channels?|embed_dims?|num_feats|hidden_dim)')
#: By type of detector, the stock config with Swin that is tried. Of those that
#: stock has, Mask2FormerVideo is missing: it trains on clips of videos.
DETECTORS = {
    'ATSS, DyHead':
    'dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py',
    'CascadeRCNN':
    'v3det/cascade_rcnn_swinb_fpn_8x4_sample1e-3_mstrain_v3det_2x.py',
    'DDQDETR':
    'ddq/ddq-detr-4scale_swinl_8xb2-30e_coco.py',
    'DINO':
    'dino/dino-5scale_swin-l_8xb2-12e_coco.py',
    'DeformableDETR':
    'v3det/deformable-detr-refine-twostage_swin_16xb2_sample1e-3_v3det_50e.py',
    'FasterRCNN':
    'v3det/faster_rcnn_swinb_fpn_8x4_sample1e-3_mstrain_v3det_2x.py',
    'Mask2Former':
    'mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
    'Mask2Former, panoptic':
    'mask2former/mask2former_swin-b-p4-w12-384-in21k_8xb2-lsj-50e_'
    'coco-panoptic.py',
    'MaskFormer':
    'maskformer/maskformer_swin-l-p4-w12_64xb1-ms-300e_coco.py',
    'MaskRCNN':
    'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'RTMDet':
    'rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py',
    'RetinaNet':
    'swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
}
#: Those that stock has with a ResNet only, where Swin takes its place.
WITH_RESNET = {
    'CascadeRCNN, masks': 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    # Stock has FCOS with Swin for V3Det, with a neck that does not build.
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'GFL': 'gfl/gfl_r50_fpn_1x_coco.py',
    'QueryInst': 'queryinst/queryinst_r50_fpn_1x_coco.py',
    'SOLOv2': 'solov2/solov2_r50_fpn_1x_coco.py',
    'SparseRCNN': 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'TOOD': 'tood/tood_r50_fpn_1x_coco.py',
}
#: By decode head and backbone.
SEGMENTORS = {
    'UPerHead, Swin':
    'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-'
    '512x512.py',
    'UPerHead, ViT':
    'vit/vit_deit-b16_upernet_8xb2-160k_ade20k-512x512.py',
    'UPerHead, ViT, MultiLevelNeck':
    'vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'UPerHead, BEiT':
    'beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py',
    'UPerHead, MAE':
    'mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py',
    'SegformerHead':
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'IterativeDecodeHead':
    'knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py',
    'Mask2FormerHead':
    'mask2former/mask2former_swin-t_8xb2-160k_ade20k-'
    '512x512.py',
    'MaskFormerHead':
    'maskformer/maskformer_swin-t_upernet_8xb2-160k_ade20k-512x512.py',
    'DPTHead':
    'dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py',
    'FCNHead':
    'segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py',
    'SegmenterMaskTransformerHead':
    'segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py',
    'SETRUPHead, naive':
    'setr/setr_vit-l_naive_8xb2-160k_ade20k-512x512.py',
    'SETRUPHead, PUP':
    'setr/setr_vit-l_pup_8xb2-160k_ade20k-512x512.py',
    'SETRMLAHead':
    'setr/setr_vit-l-mla_8xb1-160k_ade20k-512x512.py',
    'SideAdapterCLIPHead':
    'san/san-vit-b16_coco-stuff164k-640x640.py',
}
#: What needs a package for text, and which.
WITH_TEXT = {
    'GLIP':
    'mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_'
    'funtune_coco.py',
    'GroundingDINO':
    'mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py',
}


def narrow(value, key='', keys=CHANNELS):
    """A copy with few channels and queries, and without what needs a GPU."""
    if isinstance(value, dict):
        return {
            k: narrow(v, k, keys)
            for k, v in value.items() if k != 'init_cfg'
        }
    if isinstance(value, (list, tuple)):
        return type(value)(narrow(v, key, keys) for v in value)
    if keys.fullmatch(key) and isinstance(value, int):
        return max(value // NARROWER, 4) if value >= 32 else value
    fixed = dict(
        num_queries=10,
        num_points=64,
        num_groups=4,
        num_blocks=1,
        pretrained=None)
    return 'BN' if value == 'SyncBN' else fixed.get(key, value)


def built(name):
    """The model of a config with LoRA, small, and its backbone."""
    cfg = load_config(name)
    if 'r50' in name:
        widths = [96 * 2**i for i in range(4)]
        cfg.model.backbone = dict(type='SwinTransformer')
        cfg.model.neck.in_channels = widths
    cfg, at = add_method(cfg, 'LoRA:rank=2')
    model = cfg.model.to_dict()
    key = at.partition('.')[2]
    fixed = model['type'] in ('DINO', 'DeformableDETR')
    model = narrow(
        model, keys=re.compile('in_channels') if fixed else CHANNELS)
    backbone = model[key]
    backbone['allow_random_base'] = True
    if 'Swin' in backbone['stock']:
        backbone.update(
            embed_dims=cfg.model.backbone.get('embed_dims', 96) // NARROWER,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 8))
    elif 'Mix' not in backbone['stock']:
        backbone['img_size'] = SIDE
    if model['type'] == 'DDQDETR':
        model['bbox_head']['embed_dims'] = 256 // NARROWER
    if key == 'image_encoder':
        # As many as there are queries; and one prompt for each class.
        model['decode_head']['maskgen_cfg']['sos_token_num'] = 10
        model['text_encoder']['templates'] = ['a photo of a {}.']
    preprocessor = model['data_preprocessor']
    preprocessor.pop('batch_augments', None)
    if cfg.default_scope == 'mmseg':
        preprocessor['size'] = (SIDE, SIDE)
        preprocessor.pop('size_divisor', None)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(Config(dict(model=model)).model)
    if key == 'image_encoder':
        # Its init_weights needs the weights of CLIP.
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=.05)
    else:
        # SparseRCNN sets its boxes here.
        model.init_weights()
    return model, getattr(model, key)


def step(model, backbone, samples, shape):
    """The loss of one step, and what trains in the backbone without having
    got a gradient."""
    data = dict(
        inputs=[
            torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
            for _ in samples
        ],
        data_samples=samples)
    model.train()
    # That detector asks it, and a runner says it.
    MessageHub.get_current_instance().update_info('epoch', 0)
    data = model.data_preprocessor(data, training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    trained = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained and all('.peft.' in n for n in trained)
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    return loss, [n for n, p in trained.items() if p.grad is None]


def detection_sample(shape, with_masks):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    height, width = shape
    boxes = torch.tensor([[4., 6., 40., 44.], [30., 10., 90., 60.]])
    masks = np.zeros((len(boxes), height, width), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    classes = torch.from_numpy(masks).any(0).long()
    sample = DetDataSample(
        metainfo=dict(
            img_shape=shape,
            ori_shape=shape,
            scale_factor=(1., 1.),
            flip=False))
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([0, 2]))
    if with_masks:
        sample.gt_instances.masks = BitmapMasks(masks, height, width)
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample.gt_sem_seg = PixelData(sem_seg=classes[None] + 80)
    return sample


@pytest.mark.parametrize('name', [*DETECTORS, *WITH_RESNET])
def test_detector(name):
    config = {**DETECTORS, **WITH_RESNET}[name]
    model, backbone = built(f'mmdet::{config}')
    assert type(model).__name__ == name.split(',')[0]
    shape = (HEIGHT, WIDTH)
    # RTMDet takes what has masks for another model of its family.
    samples = [detection_sample(shape, name != 'RTMDet') for _ in range(2)]
    loss, without = step(model, backbone, samples, shape)
    assert loss.isfinite() and not without


@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentor(name):
    from mmseg.structures import SegDataSample
    model, backbone = built(f'mmseg::{SEGMENTORS[name]}')
    head = model.decode_head
    head = head[-1] if isinstance(head, torch.nn.ModuleList) else head
    assert type(head).__name__ == name.split(',')[0]
    shape = (SIDE, SIDE)
    samples = [
        SegDataSample(
            gt_sem_seg=PixelData(data=torch.randint(0, 19, (1, *shape))),
            metainfo=dict(img_shape=shape, ori_shape=shape)) for _ in range(2)
    ]
    loss, without = step(model, backbone, samples, shape)
    assert loss.isfinite() and not without


@pytest.mark.parametrize('name', WITH_TEXT)
def test_models_with_text_need_a_package(name):
    """Their backbones alone are in the sweep of stock configs."""
    if importlib.util.find_spec('transformers'):
        pytest.skip('it would read the weights of a text encoder')
    with pytest.raises(RuntimeError, match='install (transformers|fairscale)'):
        built(WITH_TEXT[name])
