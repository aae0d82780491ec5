"""Several deltas on one base, against models built with each."""
import copy

import pytest
import torch
import torch.nn as nn
from conftest import METHODS, build_pair, method_of, perturb, stock_cfg
from kinds import KINDS
from mmengine.registry import MODELS

import mmpeft
from mmpeft.delta_parts import delta_names
from mmpeft.errors import MergeError, PEFTError

NAMES = [
    'LoRA', 'Mona', 'BitFit', 'SSF', 'DoRA', 'FacTTK', 'VPTShallow', 'LST',
    'E3VA', 'Full', 'AdaLoRA', 'PrefixTuning', 'SCT', 'GPS', 'DTL', 'NOAH'
]


class Model(nn.Module):
    """A backbone with a head that sees its last output."""

    def __init__(self, backbone, width):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((-2, -1)))


def models(name, kind='mmdet', seed=0):
    """A stock model, and one with a method on the same base, trained."""
    pytest.importorskip(KINDS[kind].library)
    stock, peft = build_pair(kind, METHODS[name])
    width = max(KINDS[kind].dims.values())
    torch.manual_seed(3)
    stock, peft = Model(stock, width), Model(peft, width)
    peft.head.load_state_dict(stock.head.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for key in sorted(delta_names(peft)):
            value = peft.state_dict(keep_vars=True)[key]
            if value.is_floating_point():
                value.add_(.05 * torch.randn_like(value))
    return evaluated(stock), evaluated(peft)


def evaluated(model):
    model.eval()
    return model


@pytest.fixture
def image():
    torch.manual_seed(2)
    return torch.randn(2, 3, 60, 44)


@pytest.mark.parametrize('name', NAMES)
def test_swapped_equals_built(name, image, tmp_path):
    stock, peft = models(name)
    other_stock, other = models('Mona' if name != 'Mona' else 'LoRA', seed=5)
    files = [str(tmp_path / f'{n}_delta.safetensors') for n in 'ab']
    for model, file in zip((peft, other), files):
        mmpeft.save_delta(model, file)
    base, expected, second = stock(image), peft(image), other(image)
    keys, kinds = list(stock.state_dict()), [type(m) for m in stock.modules()]
    pointers = {n: p.data_ptr() for n, p in stock.named_parameters()}
    mmpeft.attach(stock, files[0], 'a')
    mmpeft.attach(stock, files[1], 'b', activate=False)
    assert mmpeft.list_tasks(stock) == ['a', 'b'
                                        ] and mmpeft.active(stock) == 'a'
    parts = [m for m in stock.modules() if hasattr(m, 'reset_parameters')]
    for turn in range(2):
        assert torch.equal(stock(image), expected)
        with mmpeft.disable(stock):
            assert torch.equal(stock(image), base)
            assert list(stock.state_dict()) == keys
        mmpeft.set_active(stock, 'b')
        assert torch.equal(stock(image), second)
        mmpeft.set_active(stock, 'a')
    # Nothing was built again, and the base stays where it was.
    assert {id(m)
            for m in parts} == {
                id(m)
                for m in stock.modules() if hasattr(m, 'reset_parameters')
            }
    assert pointers == {
        n: p.data_ptr()
        for n, p in stock.named_parameters() if n in pointers
    }
    twin = copy.deepcopy(stock)
    mmpeft.set_active(twin, 'b')
    assert torch.equal(twin(image), second)
    assert torch.equal(stock(image), expected)
    for task in 'ab':
        mmpeft.detach(stock, task)
    assert torch.equal(stock(image), base)
    assert [type(m) for m in stock.modules()] == kinds


def test_a_network_with_outputs_of_its_own(image, tmp_path):
    """HST's are of other widths, so it takes turns on a backbone without a
    head for them."""
    pytest.importorskip(KINDS['vit'].library)
    files, expected = {}, {}
    for name in ('HST', 'LoRA'):
        stock, peft = build_pair('vit', METHODS[name])
        evaluated(perturb(peft))
        files[name] = str(tmp_path / f'{name}_delta.safetensors')
        mmpeft.save_delta(peft, files[name])
        expected[name] = peft(image)
    base = evaluated(stock)(image)
    for name, file in files.items():
        mmpeft.attach(stock, file, name)
    for name in ('HST', 'LoRA', 'HST'):
        mmpeft.set_active(stock, name)
        found = stock(image)
        assert [f.shape for f in found] == [f.shape for f in expected[name]]
        assert all(map(torch.equal, found, expected[name]))
    with mmpeft.disable(stock):
        assert all(map(torch.equal, stock(image), base))
    for name in files:
        mmpeft.detach(stock, name)
    assert all(map(torch.equal, stock(image), base))


@pytest.mark.parametrize('kind', ['vit', 'mmpretrain'])
def test_other_families(kind, image, tmp_path):
    stock, peft = models('LoRA', kind)
    file = str(tmp_path / 'a_delta.safetensors')
    mmpeft.save_delta(peft, file)
    base = stock(image)
    mmpeft.attach(stock, file, 'a')
    assert torch.equal(stock(image), peft(image))
    mmpeft.set_active(stock, None)
    assert torch.equal(stock(image), base)


def test_weighted_sum(image, tmp_path):
    stock, first = models('LoRA', seed=1)
    _, second = models('LoRA', seed=2)
    for name, model in dict(a=first, b=second).items():
        file = str(tmp_path / f'{name}_delta.safetensors')
        mmpeft.save_delta(model, file)
        mmpeft.attach(stock, file, name)
    alone = mmpeft.merge_tasks(stock, dict(a=1.), rest='a')
    merged = mmpeft.merged_state_dict(first)
    assert alone.keys() == merged.keys()
    assert all((alone[k] - v).abs().max() < 1e-6 for k, v in merged.items()
               if v.is_floating_point())
    both = mmpeft.merge_tasks(stock, dict(a=.3, b=-.5), rest='b')
    key = 'backbone.stages.0.blocks.1.attn.w_msa.qkv.weight'
    with mmpeft.disable(stock):
        start = stock.state_dict()[key].double().clone()
    expected = start.clone()
    for model, weight in ((first, .3), (second, -.5)):
        module = model.backbone.stages[0].blocks[1].peft['lora']['qkv']
        change = module.merge(start, None)[0] - start
        expected += weight * change
    assert (both[key].double() - expected).abs().max() < 1e-6
    assert torch.equal(both['head.weight'], second.head.weight)
    assert mmpeft.active(stock) == 'b'
    plain = Model(MODELS.build(stock_cfg('mmdet')), 32)
    plain.load_state_dict(both, strict=True)


def test_sums_that_make_no_sense_are_refused(tmp_path):
    for name, match in (('BitFit', 'trains .* stock tensors'),
                        ('Mona', 'cannot be merged')):
        stock, peft = models(name)
        file = str(tmp_path / f'{name}_delta.safetensors')
        mmpeft.save_delta(peft, file)
        mmpeft.attach(stock, file, 'a')
        with pytest.raises(MergeError, match=match):
            mmpeft.merge_tasks(stock, dict(a=1.), rest='a')
        assert mmpeft.active(stock) == 'a'


def test_refusals_leave_the_model_alone(image, tmp_path):
    stock, peft = models('LoRA')
    file = str(tmp_path / 'a_delta.safetensors')
    mmpeft.save_delta(peft, file)
    base = stock(image)
    other = copy.deepcopy(stock)
    perturb(other, only='')
    changed = other(image)
    with pytest.raises(PEFTError, match='trained on another base'):
        mmpeft.attach(other, file, 'a')
    assert torch.equal(other(image),
                       changed) and mmpeft.list_tasks(other) == []
    with pytest.raises(PEFTError, match='attached by its config'):
        mmpeft.attach(peft, file, 'a')
    mmpeft.attach(stock, file, 'a')
    with pytest.raises(PEFTError, match="a task 'a' already"):
        mmpeft.attach(stock, file, 'a')
    with pytest.raises(PEFTError, match="no task 'x'; there are a"):
        mmpeft.set_active(stock, 'x')
    with pytest.raises(PEFTError, match="no task 'x'"):
        mmpeft.detach(stock, 'x')
    assert torch.equal(stock(image), peft(image))
    _, wide = models('LoRA')
    wide.head = nn.Linear(32, 5)
    mmpeft.save_delta(wide, file)
    with pytest.raises(PEFTError, match=r"'head.bias'.* .5,.*here .* .3,"):
        mmpeft.attach(stock, file, 'wide')
    assert torch.equal(stock(image), peft(image))
    mmpeft.detach(stock, 'a')
    assert torch.equal(stock(image), base)
    assert method_of('LoRA') is not None


def test_names_in_a_file_are_not_imported(tmp_path):
    from mmpeft.delta_file import read_delta, write_delta
    stock, peft = models('LoRA')
    file = str(tmp_path / 'a_delta.safetensors')
    mmpeft.save_delta(peft, file)
    tensors, header = read_delta(file)
    header.backbones['backbone']['method'] = [
        dict(type='subprocess.Popen', args=['touch',
                                            str(tmp_path / 'ran')])
    ]
    write_delta(file, tensors, header)
    with pytest.raises(PEFTError, match='not registered.*subprocess.Popen'):
        mmpeft.attach(stock, file, 'a')
    with pytest.raises(PEFTError, match="There is no method 'subprocess"):
        mmpeft.apply(stock, dict(type='subprocess.Popen', args=['true']))
    assert not (tmp_path / 'ran').exists()
