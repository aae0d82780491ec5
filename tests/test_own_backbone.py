"""A backbone in somebody else's package, as the documentation shows it."""
import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import mmpeft
from mmpeft.backbones import SiteMap, class_path
from mmpeft.config import add_method, find_backbones
from mmpeft.errors import PEFTError, SiteError
from mmpeft.injection import eject
from mmpeft.registry import SITE_MAPS

PAGE = Path(__file__).resolve().parents[1] / 'docs/en/add_a_backbone.md'
METHODS = ('LoRA:rank=4,targets=[q,k,v,proj,fc1,fc2]', 'Mona:dim=4', 'BitFit',
           'Adapter:dim=4')


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """The package of the page, imported by nothing but a config."""
    folder = tmp_path_factory.mktemp('own')
    blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S)
    (folder / 'toy_net').mkdir()
    (folder / 'toy_net' / '__init__.py').touch()
    for name in ('model', 'peft'):
        text, = (b for b in blocks if b.startswith(f'# toy_net/{name}.py'))
        (folder / 'toy_net' / f'{name}.py').write_text(text)
    config, = (b for b in blocks if 'toy_net.peft' in b and 'stock=' in b)
    path = folder / 'toy.py'
    path.write_text(config)
    sys.path.insert(0, str(folder))
    assert 'toy_net' not in sys.modules
    yield Config.fromfile(path)
    sys.path.remove(str(folder))
    from toy_net.peft import ToySites
    SITE_MAPS.module_dict.pop(class_path(ToySites))


def build(toy, method, **kwargs):
    """A stock ToyNet, and a PEFT one with its weights."""
    torch.manual_seed(0)
    stock = MODELS.build(dict(type='ToyNet', dims=16, depth=2))
    for parameter in stock.parameters():
        parameter.data += .05 * torch.randn_like(parameter)
    cfg = dict(toy.model.backbone, method=method, dims=16, depth=2, **kwargs)
    peft = MODELS.build(cfg)
    peft.load_state_dict(stock.state_dict(), strict=False)
    return stock, peft


def image():
    return torch.randn(
        2, 3, 40, 24, generator=torch.Generator().manual_seed(1))


def test_config_of_the_page_builds(toy):
    backbone = MODELS.build(toy.model.backbone)
    assert sum('.peft.mona.' in n for n, _ in backbone.named_parameters()) > 0
    assert backbone.norm.weight.requires_grad is False


@pytest.mark.parametrize('method', ('Frozen', *METHODS))
def test_starts_and_ends_as_the_bare_backbone(toy, method):
    stock, peft = build(toy, method)
    if not method.startswith('Mona'):
        torch.testing.assert_close(peft(image()), stock(image()))
    assert set(stock.state_dict()) <= set(peft.state_dict())
    eject(peft)
    assert type(peft.blocks[0]) is type(stock.blocks[0])
    assert torch.equal(peft(image())[0], stock(image())[0])


@pytest.mark.parametrize('method', METHODS)
def test_exactly_the_declared_parameters_train(toy, method):
    _, peft = build(toy, method)
    noise(peft)
    peft(image())[0].square().sum().backward()
    for name, parameter in peft.named_parameters():
        declared = '.peft.' in name or (method == 'BitFit'
                                        and name.endswith('bias'))
        assert parameter.requires_grad == declared, name
        assert (parameter.grad is not None) == declared, name
    # The key half of a bias cancels in the softmax, so sums are asked.
    assert all(p.grad.abs().sum() > 0 for p in peft.parameters()
               if p.requires_grad)


def noise(backbone):
    generator = torch.Generator().manual_seed(3)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data += .1 * torch.randn(
                parameter.shape, generator=generator)


@pytest.mark.parametrize('method', [METHODS[0], 'BitFit'])
def test_merging_gives_a_stock_file(toy, method):
    stock, peft = build(toy, method)
    noise(peft)
    expected = peft(image())[0]
    assert not torch.allclose(expected, stock(image())[0], atol=1e-2)
    stock.load_state_dict(mmpeft.merged_state_dict(peft), strict=True)
    torch.testing.assert_close(stock(image())[0], expected)


@pytest.mark.parametrize('method', ['Mona:dim=4', 'Adapter:dim=4'])
def test_what_cannot_be_merged_says_so(toy, method):
    with pytest.raises(mmpeft.MergeError):
        mmpeft.merged_state_dict(build(toy, method)[1])


@pytest.mark.parametrize('method, reason',
                         [('VPTDeep', 'no tokens can join ToyNet yet'),
                          ('LST', 'no network can run beside ToyNet yet')])
def test_what_is_refused_says_the_reason_of_the_package(toy, method, reason):
    with pytest.raises(SiteError, match=reason):
        build(toy, method)


@pytest.mark.parametrize('name, scope', [('ToyNet', None), ('ToyNet', 'mmdet'),
                                         ('ToyNet', 'mmpretrain'),
                                         ('toy_net.model.ToyNet', 'mmdet')])
def test_stock_config_is_recognised(toy, name, scope):
    """``--method`` on a config that holds the bare backbone."""
    if scope:
        pytest.importorskip(scope)
    cfg = Config(dict(model=dict(backbone=dict(type=name, dims=16, depth=2))))
    if scope:
        cfg.default_scope = scope
    assert list(find_backbones(cfg)) == ['model.backbone']
    cfg, _ = add_method(cfg, 'LoRA:rank=2')
    backbone = MODELS.build(cfg.model.backbone)
    assert type(backbone).__name__ == 'ToyNet'
    assert hasattr(backbone.blocks[0], 'peft')


def test_built_model_is_recognised(toy):
    stock, _ = build(toy, 'Frozen')
    model = torch.nn.ModuleDict(dict(backbone=stock))
    mmpeft.apply(model, 'Mona:dim=4')
    assert hasattr(stock.blocks[1], 'peft')


@pytest.mark.parametrize('members, message', [
    (dict(block_types='a.Block'), 'block_types must be a tuple.*a.Block'),
    (dict(block_types=('Block', )), 'block_types must be a tuple'),
    (dict(backbone_types=()), 'backbone_types must be a tuple'),
    (dict(block_types=('toy_net.model.NoBlock', )),
     'block_types names .*NoBlock.* no such class'),
    (dict(block_pattern=r'blocks\.\d+'), 'block_pattern needs the groups'),
    (dict(refused=dict(token='none')), 'refused names token'),
    (dict(refused={}), 'attention is missing'),
    (dict(mixin=object), 'mixin must be a class whose forward'),
    (dict(modules=lambda cls, block: {}), 'modules must be a classmethod'),
    (dict(no_trunk=SiteMap.__dict__['no_trunk']), 'trunk_block is missing'),
])
def test_mistakes_are_found_at_registration(toy, members, message):
    members = {'block_types': ('a.B', ), **members}
    before = dict(SITE_MAPS.module_dict)
    from toy_net.peft import ToySites
    with pytest.raises(PEFTError, match=rf'Other\.{message}'):
        mmpeft.register_family(type('Other', (ToySites, ), members))
    assert SITE_MAPS.module_dict == before


def test_taken_blocks_and_other_classes(toy):
    from toy_net.peft import ToySites
    other = type('Other', (ToySites, ), {})
    with pytest.raises(PEFTError, match='toy_net.model.Block belong to .*Toy'):
        mmpeft.register_family(other)
    with pytest.raises(PEFTError, match='subclass of mmpeft.backbones.Site'):
        mmpeft.register_family(torch.nn.Linear)
    # A cell of a notebook that runs twice.
    count = len(SITE_MAPS.module_dict)
    assert mmpeft.register_family(ToySites) is ToySites
    assert len(SITE_MAPS.module_dict) == count


def test_own_families_keep_the_rules():
    from mmpeft.backbones.register import check_family
    SITE_MAPS.import_from_location()
    assert len(SITE_MAPS.module_dict) > 2
    for cls in SITE_MAPS.module_dict.values():
        check_family(cls)
