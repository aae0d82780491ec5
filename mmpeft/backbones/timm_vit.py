"""Vision Transformer blocks of timm: ViT, DeiT, DINOv2, CLIP, SigLIP."""
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError, SiteError
from ..registry import SITE_MAPS
from ..sites import TOKEN_SITES, Site
from ..stream import Stream
from .base import Block, Part, TrunkBlock
from .grid import layout_of, watch_stem
from .places import parts_of
from .prenorm import JoinedAttention
from .timm_models import StemGrid, TimmForward, TimmSites, is_a

__all__ = ['TimmViTSites']

ATTENTION = ('timm.layers.attention.Attention',
             'timm.models.vision_transformer.Attention')


class TimmViTForward(TimmForward):
    """The stock forward; the shape of the map comes from the stem."""

    def forward(self,
                x: Tensor,
                attn_mask: Optional[Tensor] = None,
                is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C), N = extra tokens + H * W"""
        layout = layout_of(self.peft, x)
        mask = {}
        if attn_mask is not None or is_causal:
            mask = dict(attn_mask=attn_mask, is_causal=is_causal)
        return self.peft.call(self._forward, x, layout, self.with_cp, mask)

    def run_attention(self, normed: Tensor, mask: dict) -> Tensor:
        return self.ls1(self.attn(normed, **mask))

    def run_mlp(self, normed: Tensor) -> Tensor:
        return self.ls2(self.mlp(normed))


class JoinedTimmAttention(JoinedAttention):
    """The stock attention, with extra tokens before the others.

    Extra keys join behind the norm of the keys, if there is one.
    """

    def forward(self,
                x: Tensor,
                attn_mask: Optional[Tensor] = None,
                is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        if attn_mask is not None or is_causal:
            raise PEFTError('Extra tokens have no place in an attention mask; '
                            'choose a method without them.')
        joined, extra = self.take()
        num_joined = joined.shape[1]
        num_asked = num_joined if self.queries else 0
        x = torch.cat([joined, x], dim=1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x[:, num_joined - num_asked:]
        q = q[:, num_joined - num_asked:]

        def heads(t: Tensor) -> Tensor:
            # (B, N, C) -> (B, heads, N, C / heads)
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = self.q_norm(heads(q)), self.k_norm(heads(k)), heads(v)
        # (B or 1, p, C) -> (B, heads, p, C / heads), in autocast's precision
        keys, values = (heads(e.to(t.dtype).expand(len(t), -1, -1))
                        for e, t in zip(extra, (k, v)))
        out = self.attend(q, torch.cat([keys, k], dim=2),
                          torch.cat([values, v], dim=2))
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        out = self.proj_drop(self.proj(out))
        if self.queries:
            self.seen = out[:, :num_asked]
        return out[:, num_asked:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the stock attention does it, in one call or step by step."""
        if self.fused_attn:
            return F.scaled_dot_product_attention(
                q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.attn_drop(weights) @ v


@SITE_MAPS.register_module()
class TimmViTSites(TimmSites):
    """ViT of timm: class and register tokens before the grid.

    ``attn_branch`` and ``ffn_branch`` are behind LayerScale. With a packed
    SwiGLU (DINOv2's giant) ``fc1`` is the layer of gate and value together.
    """

    block_types = ('timm.models.vision_transformer.Block', )
    model_types = ('timm.models.vision_transformer.VisionTransformer', )
    modules_with = ('vision_transformer', 'vision_transformer_hybrid', 'deit',
                    'vitamin')
    block_pattern = r'(?P<stage_path>(?:timm_model\.)?(?:model\.)?blocks)\.\d+'
    mixin = TimmViTForward
    attention_mixin = JoinedTimmAttention

    @classmethod
    def modules(cls, block: nn.Module) -> Dict[str, nn.Module]:
        layers = dict(
            norm1=block.norm1,
            norm2=block.norm2,
            qkv=block.attn.qkv,
            proj=block.attn.proj)
        layers.update({
            name: getattr(block.mlp, name)
            for name in ('fc1', 'fc2') if hasattr(block.mlp, name)
        })
        return layers

    @classmethod
    def site(cls, block: Block, name: str) -> Site:
        module = block.module
        layer = name[:-len('_input')] if name.endswith('_input') else name
        if layer in ('fc1', 'fc2') and layer not in cls.modules(module):
            raise SiteError(
                f'Site {name!r} is not offered by {block.path}: its '
                f'{type(module.mlp).__name__} has no one layer {layer}, but '
                f'{", ".join(n for n, _ in module.mlp.named_children())}.')
        if name in TOKEN_SITES and not is_a(module.attn, ATTENTION):
            raise SiteError(
                f'Site {name!r} is not offered by {block.path}: only tokens '
                f'of the plain attention can join, and it has '
                f'{type(module.attn).__name__}.')
        return super().site(block, name)

    @classmethod
    def embed_dims(cls, block: nn.Module) -> int:
        return block.attn.qkv.in_features

    @classmethod
    def stem(cls, backbone: nn.Module) -> Tuple[int, int]:
        model = cls.model(backbone)[1]
        return model.embed_dim, int(model.patch_embed.feat_ratio())

    @classmethod
    def parts(cls, backbone: nn.Module) -> List[Part]:
        prefix, model = cls.model(backbone)
        stem = model.patch_embed
        parts = [('patch_embed', f'{prefix}patch_embed.proj', 0, stem.proj),
                 ('patch_norm', f'{prefix}patch_embed.norm', 0,
                  getattr(stem, 'norm', None)),
                 ('patch_norm', f'{prefix}norm_pre', 0, model.norm_pre)]
        parts += [('out_norm', prefix + path, 0, getattr(model, path))
                  for path in cls.out_norms(backbone)]
        return parts_of(parts)

    @classmethod
    def out_norms(cls, backbone: nn.Module) -> List[str]:
        """Norms of the outputs, in order; an identity has no weight."""
        getter, model = cls.getter(backbone), cls.model(backbone)[1]
        names = ['norm', 'fc_norm']
        if getter is not None:
            names = ['norm'] if getter.norm else []
        return [n for n in names if hasattr(getattr(model, n), 'weight')]

    @classmethod
    def last(cls, backbone: nn.Module) -> int:
        """Number of the last block that is an output."""
        getter, model = cls.getter(backbone), cls.model(backbone)[1]
        count = len(model.blocks)
        return cls.taken(getter, count)[-1] if getter else count - 1

    @classmethod
    def trunk_block(cls, block: Block) -> TrunkBlock:
        linear = [
            m for m in block.module.mlp.modules() if isinstance(m, nn.Linear)
        ]
        return TrunkBlock(
            block.index,
            block.stage,
            block.path,
            embed_dims=cls.embed_dims(block.module),
            num_heads=block.module.attn.num_heads,
            mlp_dims=linear[-1].in_features)

    @classmethod
    def no_trunk(cls, backbone: nn.Module) -> Optional[str]:
        getter, model = cls.getter(backbone), cls.model(backbone)[1]
        if getter and not getter.norm and hasattr(model.norm, 'weight'):
            return ('they are taken in front of the norm; build the features '
                    'with prune=True, as timm does')
        return None

    @classmethod
    def outputs(cls, backbone: nn.Module) -> Dict[int, Optional[str]]:
        return {0: f'{cls.model(backbone)[0]}norm'}

    @classmethod
    def join_outputs(cls, backbone: nn.Module, stream: Stream,
                     stages: Sequence[int]) -> list:
        getter = cls.getter(backbone)
        if getter is not None:
            # The norm that was taken out is an identity, which every output
            # can pass, and the stream that goes on does not.
            getter._stock_norm, getter.norm = getter.norm, True
        return super().join_outputs(backbone, stream, stages)

    @classmethod
    def watch(cls, backbone: nn.Module, blocks: Sequence[Block]) -> list:
        model = cls.model(backbone)[1]
        return watch_stem(model.patch_embed, model.num_prefix_tokens,
                          [b.module for b in blocks], StemGrid)

    @classmethod
    def release(cls, backbone: nn.Module) -> None:
        getter = cls.getter(backbone)
        if hasattr(getter, '_stock_norm'):
            getter.norm = getter.__dict__.pop('_stock_norm')

    @classmethod
    def grid_ends(cls, block: Block) -> bool:
        backbone = block.backbone
        model = cls.model(backbone)[1]
        reads_class_token = model.attn_pool is None and (
            model.global_pool == 'token' or hasattr(model, 'dist_token'))
        return (reads_class_token and cls.getter(backbone) is None
                and block.index == cls.last(backbone))

    @classmethod
    def unreached(cls, backbone: nn.Module) -> List[str]:
        prefix, model = cls.model(backbone)
        getter = cls.getter(backbone)
        if getter is None:
            return []
        last, count = cls.last(backbone), len(model.blocks)
        names = [f'blocks.{i}' for i in range(last + 1, count)]
        names += ['fc_norm', 'head'] + ['norm'] * (not getter.norm)
        return [prefix + n for n in names]

    @classmethod
    def final_norm(cls, backbone: nn.Module) -> str:
        prefix, model = cls.model(backbone)
        norms = cls.out_norms(backbone)
        if not norms:
            raise PEFTError(f'This {type(model).__name__} has no norm behind '
                            'its last output; leave final_norm=True out.')
        return prefix + norms[-1]
