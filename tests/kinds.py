"""Tiny stock backbones that tests of all families run on, one entry each."""
from dataclasses import dataclass
from typing import Dict, Tuple

__all__ = ['KINDS', 'LIBRARIES', 'Kind']

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


@dataclass(frozen=True)
class Kind:
    """A stock backbone of four blocks and two outputs, 16 channels at first,
    drop-path up to 0.2, for images of 60 x 44.

    Attributes:
        cfg (dict): Its config.
        patch_size (int): Side of a patch, in pixels.
        extra (int): Class and register tokens before the grid.
        grid (tuple): (H, W) of the stem's tokens.
        out_norms (tuple): Paths of the norms of outputs.
        dims (dict): By stage, its width; two blocks in each of two, or four
            in one.
        no_parts (tuple): Sites outside the blocks that it has none of.
        stem (str): Path of the stem's projection.
        sizes (tuple): Two sizes of images that it takes, of which the first
            is that of all other tests.
        init_by_layer (bool): Whether its ``init_cfg`` may be by layer type.
        post_norm (bool): Whether its norms end the branches.
        packages (tuple): What must be installed beside its library.
    """

    cfg: dict
    patch_size: int
    grid: Tuple[int, int]
    out_norms: Tuple[str, ...]
    dims: Dict[int, int]
    extra: int = 0
    no_parts: Tuple[str, ...] = ()
    stem: str = 'patch_embed.projection'
    sizes: Tuple[Tuple[int, int], ...] = ((60, 44), (33, 50))
    init_by_layer: bool = True
    post_norm: bool = False
    packages: Tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The package it is from."""
        return self.cfg['type'].split('.')[0]


def swin(library: str, **kwargs) -> Kind:
    """The Swin of a library, with two stages and windows of 7."""
    cfg = dict(
        type=f'{library}.SwinTransformer',
        out_indices=(0, 1),
        drop_path_rate=.2,
        **kwargs)
    return Kind(
        cfg,
        patch_size=4,
        grid=(15, 11),
        out_norms=('norm0', 'norm1'),
        dims={
            0: 16,
            1: 32
        },
        init_by_layer=library == 'mmpretrain')


def vit(cfg: dict, out_norms: Tuple[str, ...] = ('ln1', ), **facts) -> Kind:
    """One stage of four blocks, with patches of 8 and a class token."""
    cfg = dict(cfg, patch_size=8, out_indices=[1, 3], drop_path_rate=.2)
    missing = ('patch_norm', 'merge_norm',
               'merge_linear') + ('out_norm', ) * (not out_norms)
    facts = {'grid': (8, 6), 'extra': 1, **facts}
    return Kind(
        cfg,
        patch_size=8,
        out_norms=out_norms,
        dims={0: 16},
        no_parts=missing,
        **facts)


BLOCKS = dict(embed_dims=16, num_layers=4, num_heads=2)
ARCH = dict(BLOCKS, feedforward_channels=64)
SWIN = dict(embed_dims=16, depths=(2, 2), num_heads=(2, 4), strides=(4, 2))
KINDS = {
    'mmdet':
    swin('mmdet', **SWIN),
    'mmseg':
    swin('mmseg', **SWIN),
    'mmpretrain':
    swin(
        'mmpretrain',
        arch=dict(embed_dims=16, depths=[2, 2], num_heads=[2, 4]),
        pad_small_map=True),
    'vit':
    vit(
        dict(
            type='mmpretrain.VisionTransformer',
            arch=ARCH,
            img_size=48,
            out_type='featmap',
            layer_scale_init_value=.5)),
    # Fixed in size by its relative positions, and without _format_output.
    'beit':
    vit(dict(type='mmseg.BEiT', img_size=(60, 44), final_norm=True, **BLOCKS),
        grid=(7, 5),
        sizes=((60, 44), (57, 46)),
        init_by_layer=False),
    'beit_mmpretrain':
    vit(dict(
        type='mmpretrain.BEiTViT',
        arch=ARCH,
        img_size=(60, 44),
        out_type='featmap'),
        out_norms=(),
        sizes=((60, 44), (57, 41))),
    # Its blocks write the positions of the last image into buffers.
    'eva02':
    vit(
        dict(
            type='mmpretrain.ViTEVA02',
            arch=dict(BLOCKS, feedforward_channels=48),
            img_size=(60, 44),
            out_type='featmap')),
    # Norms behind the branches, one more behind every second block, and
    # windows of two sizes.
    'swin_v2':
    Kind(
        dict(
            type='mmpretrain.SwinTransformerV2',
            arch=dict(
                embed_dims=16,
                depths=[2, 2],
                num_heads=[2, 4],
                extra_norm_every_n_blocks=2),
            img_size=48,
            window_size=[7, 4],
            pad_small_map=True,
            out_indices=(0, 1),
            drop_path_rate=.2),
        patch_size=4,
        grid=(15, 11),
        out_norms=('norm0', 'norm1'),
        dims={
            0: 16,
            1: 32
        },
        post_norm=True),
    # Maps of channels last, windows that do not divide them, one global
    # block, and a neck.
    'vit_sam':
    vit(dict(
        type='mmpretrain.ViTSAM',
        arch=dict(ARCH, global_attn_indexes=[1]),
        img_size=48,
        window_size=3,
        out_channels=12),
        out_norms=('channel_reduction.3', ),
        extra=0),
    # Features of timm: class and register tokens, LayerScale, no norm, and a
    # stem that fills up the image.
    'timm_vit':
    vit(dict(
        type='mmpretrain.TIMMBackbone',
        model_name='vit_tiny_patch16_224',
        features_only=True,
        img_size=48,
        embed_dim=16,
        depth=4,
        num_heads=2,
        reg_tokens=2,
        init_values=.5,
        dynamic_img_size=True,
        dynamic_img_pad=True),
        out_norms=(),
        extra=3,
        stem='timm_model.model.patch_embed.proj',
        packages=('timm', )),
    # Maps of channels last; patch merging at the start of a stage.
    'timm_swin':
    Kind(
        dict(
            type='mmseg.TIMMBackbone',
            model_name='swin_tiny_patch4_window7_224',
            pretrained=False,
            img_size=112,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            dynamic_img_size=True,
            drop_path_rate=.2),
        patch_size=4,
        grid=(15, 11),
        out_norms=(),
        dims={
            0: 16,
            1: 32
        },
        no_parts=('out_norm', ),
        stem='timm_model.patch_embed.proj',
        sizes=((60, 44), (36, 52)),
        packages=('timm', )),
    # nn.MultiheadAttention, and maps of inner blocks.
    'vit_mmseg':
    vit(
        dict(
            type='mmseg.VisionTransformer',
            img_size=48,
            patch_bias=True,
            final_norm=True,
            **BLOCKS)),
    # Keys of a reduced map, and convolutions in the MLP.
    'mit':
    Kind(
        dict(
            type='mmseg.MixVisionTransformer',
            embed_dims=16,
            num_stages=2,
            num_layers=(2, 2),
            num_heads=(1, 2),
            patch_sizes=(7, 3),
            strides=(4, 2),
            sr_ratios=(2, 1),
            out_indices=(0, 1),
            drop_path_rate=.2),
        patch_size=7,
        grid=(15, 11),
        out_norms=('layers.0.2', 'layers.1.2'),
        no_parts=('merge_linear', ),
        dims={
            0: 16,
            1: 32
        },
        stem='layers.0.0.projection'),
}
