"""Registries of mmpeft, children of mmengine's where mmengine has one.

A type written as ``mmpeft.X`` resolves from any scope: mmengine imports this
module by itself when it meets the prefix, and ``locations`` import the rest
on first use, so that ``import mmpeft`` stays cheap.
"""
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

__all__ = ['MODELS', 'HOOKS', 'METHODS', 'SITE_MAPS']

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    locations=['mmpeft.injection'],
    scope='mmpeft')
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    locations=['mmpeft.engine.hooks'],
    scope='mmpeft')
# WHAT is attached: one class per published method.
METHODS = Registry('peft method', locations=['mmpeft.methods'], scope='mmpeft')
# WHERE it can be attached: one class per family of transformer blocks.
SITE_MAPS = Registry(
    'site map', locations=['mmpeft.backbones'], scope='mmpeft')
