_base_ = './vit-b_vtab.py'
custom_hooks = [dict(type='mmpeft.SubnetHook')]
