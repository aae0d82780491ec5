import pytest
from conftest import build_pair

from mmpeft.backbones import find_family
from mmpeft.errors import PEFTError
from mmpeft.plan import match_blocks, parse_method_string, parse_methods


def names(method):
    return [plan.name for plan in parse_methods(method)]


def test_strings():
    assert parse_method_string('Mona') == [dict(type='Mona')]
    assert parse_method_string(
        'LoRA:rank=8,targets=[q,v],rslora=True+LNTune') == [
            dict(type='LoRA', rank=8, targets=['q', 'v'], rslora=True),
            dict(type='LNTune')
        ]
    assert parse_method_string('Adapter:placement=pfeiffer,init_std=1e-2') == [
        dict(type='Adapter', placement='pfeiffer', init_std=.01)
    ]
    assert parse_method_string('Mona:layers=(-1,stage:2)') == [
        dict(type='Mona', layers=[-1, 'stage:2'])
    ]
    with pytest.raises(PEFTError, match='KEY=VALUE'):
        parse_method_string('Mona:64')


def test_names():
    assert names(['LoRA', dict(type='LNTune'),
                  'AdaptFormer']) == ['lora', 'ln_tune', 'adaptformer']
    assert names(dict(type='mmpeft.Mona', name='task_a')) == ['task_a']
    with pytest.raises(PEFTError, match='Two methods are named .lora.'):
        parse_methods('LoRA+LoRA')
    for bad in ('a.b', 'Upper', 'run', 'pop', '1st'):
        with pytest.raises(PEFTError, match='parameter key'):
            parse_methods(dict(type='Mona', name=bad))


@pytest.mark.parametrize('method, says', [
    ('Moan',
     "no method 'Moan'.*did you mean 'Mona'.*Known: AdaLoRA, AdaptFormer"),
    (dict(dim=64), 'needs a type'),
    ('Mona:dims=8', "no argument 'dims'.*did you mean 'dim'.*It takes dim"),
    (dict(type='Mona', overrides={0: dict(rank=1)}), "no argument 'rank'"),
    (dict(type='BitFit', overrides={0: {}}), 'nothing to override'),
    ([], 'list of methods is empty'),
])
def test_mistakes(method, says):
    with pytest.raises(PEFTError, match=says):
        parse_methods(method)


def test_blocks(library):
    stock, _ = build_pair(library, 'Frozen')
    blocks = [b for _, b in find_family(stock)]

    def paths(pattern):
        return [b.path for b in match_blocks(pattern, blocks, 'layers')]

    assert [b.path for b in blocks
            ] == [f'stages.{s}.blocks.{b}' for s in (0, 1) for b in (0, 1)]
    assert paths(-1) == paths([3]) == paths('-1') == ['stages.1.blocks.1']
    assert paths('stage:0') == paths(r'stages\.0\..*') == [
        'stages.0.blocks.0', 'stages.0.blocks.1'
    ]
    # Sorted and without repetition, whatever the order given.
    assert paths([3, 'stage:1', 0]) == [
        'stages.0.blocks.0', 'stages.1.blocks.0', 'stages.1.blocks.1'
    ]
    for pattern in (4, -5, 'stage:2', 'blocks', [0, r'stages\.7.*']):
        with pytest.raises(PEFTError, match='matches no block.*stage:1'):
            paths(pattern)
    with pytest.raises(PEFTError, match='not a regular expression'):
        paths('(')
