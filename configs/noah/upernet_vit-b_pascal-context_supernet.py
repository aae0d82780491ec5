_base_ = './upernet_vit-b_pascal-context.py'
custom_hooks = [dict(type='mmpeft.SubnetHook')]
