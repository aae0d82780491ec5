# How much the result depends on the bottleneck: the images, base and tuning
# of `few_shot_plan.py`, three methods in the widths that papers try.
_base_ = ['./few_shot_plan.py']
name = 'few-shot-ranks'
title = 'Few-shot classification: width of the bottleneck'

seeds = (0, )
methods = dict(
    _delete_=True,
    **{
        f'{method}-{number}': f'{method}:{argument}={number}{rest}'
        for method, argument, rest in (('LoRA', 'rank', ',targets=[q,v]'),
                                       ('AdaptFormer', 'dim',
                                        ',scale=0.1'), ('Mona', 'dim', ''))
        for number in (1, 4, 16, 64)
    })
tasks = dict(few_shot=dict(method_options=dict(_delete_=True)))
