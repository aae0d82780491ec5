"""Names, paths, metafiles and README tables of the configs agree."""
import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location(
    'check_metafile', ROOT / '.dev_scripts/check_metafile.py')
checker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checker)

METHODS = [folder.name for folder in checker.method_folders(ROOT)]


def test_everything_agrees():
    assert list(checker.check(ROOT)) == []


def test_every_method_has_a_folder():
    from mmpeft.engine.listing import list_methods
    assert METHODS == sorted(row['name'] for row in list_methods())


@pytest.fixture
def copied(tmp_path):
    """Configs to break."""
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    shutil.copy(ROOT / 'model-index.yml', tmp_path)
    return tmp_path


@pytest.mark.parametrize('path, old, new, problem', [
    ('model-index.yml', 'configs/lora/metafile.yml', 'configs/x/metafile.yml',
     'missing in model-index.yml'),
    ('configs/lora/metafile.yml', 'Name: lora_mask', 'Name: lora_mask2',
     'should be named'),
    ('configs/lora/metafile.yml', 'In Collection: LoRA', 'In Collection: X',
     'unknown collection'),
    ('configs/lora/metafile.yml', 'Config: configs/lora/upernet',
     'Config: configs/lora/uppernet', 'there is no'),
    ('configs/lora/README.md', '[mask-rcnn_swin-b_coco]', '[mask]',
     'no row for mask-rcnn_swin-b_coco'),
    ('configs/lora/README.md', '3.080 ', '3,08  ', 'not a number'),
    ('configs/lora/README.md', '(../README.md)', '(../READ.md)',
     'broken link'),
    ('configs/lora/README.md', 'mmdet::swin/mask-rcnn_swin-t',
     'mmdet::swin/mask-rcnn_swin-x', 'does not inherit'),
    ('configs/lora/mask-rcnn_swin-b_coco.py', '../_base_/', './',
     'does not inherit'),
    ('configs/README.md', '](lora)', '](lore)', 'no link to lora'),
])
def test_disagreement_is_found(copied, path, old, new, problem):
    text = (copied / path).read_text()
    assert old in text
    (copied / path).write_text(text.replace(old, new))
    assert any(problem in line for line in checker.check(copied))


def test_missing_file_is_found(copied):
    (copied / 'configs/mona/upernet_swin-l_ade20k.py').unlink()
    (copied / 'configs/bitfit/metafile.yml').unlink()
    problems = '\n'.join(checker.check(copied))
    assert 'configs/mona: has no upernet_swin-l_ade20k.py' in problems
    assert 'configs/bitfit: has no metafile.yml' in problems
