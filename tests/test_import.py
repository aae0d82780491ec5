"""What `import mmpeft` brings along, and what counting parameters takes."""
import json
import os
import os.path as osp
import subprocess
import sys

import pytest

import mmpeft

# What anybody who reads a config has imported.
BASE = 'import torch, mmengine.registry, mmengine.config'


def imported(code, after=BASE):
    """Modules that code imports after others."""
    program = (f'import sys, json; {after}; before = set(sys.modules); {code}'
               '; print(json.dumps(sorted(set(sys.modules) - before)))')
    done = subprocess.run([sys.executable, '-c', program],
                          capture_output=True,
                          text=True,
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_adds_three_small_modules():
    new = {m for m in imported('import mmpeft') if m.startswith('mmpeft')}
    assert new == {'mmpeft', 'mmpeft.compat', 'mmpeft.version'}


def test_import_adds_nothing_of_others():
    others = [
        m.partition('.')[0] for m in imported('import mmpeft')
        if not m.startswith('mmpeft')
    ]
    assert not set(others) - set(sys.stdlib_module_names)


def test_the_registry_waits_until_a_type_is_asked_for():
    """Which every config with the prefix `mmpeft.` imports."""
    new = imported('import mmpeft.registry')
    assert 'mmpeft.methods' not in new and 'mmpeft.engine' not in new
    heavy = {m.partition('.')[0]
             for m in new} & {
                 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'torchvision',
                 'cv2', 'matplotlib', 'rich', 'safetensors'
             }
    assert not heavy
    assert not [
        m for m in new if m.startswith(('mmengine.runner', 'mmengine.hooks',
                                        'mmengine.model', 'mmengine.visual'))
    ]


def test_a_method_needs_no_library_and_no_runner():
    new = imported('import mmpeft.methods')
    assert not [
        m for m in new if m.partition('.')[0] in
        ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm',
         'matplotlib') or m.startswith(('mmengine.runner', 'mmengine.hooks'))
    ]


@pytest.mark.slow
def test_counting_swin_l():
    """Two gigabytes, imports and building included; the seconds, which depend
    on what else the machine does, are printed."""
    pytest.importorskip('mmseg')
    root = osp.dirname(osp.dirname(osp.abspath(__file__)))
    config = mmpeft.config_path('mona/upernet_swin-l_ade20k.py')
    program = ('import resource, subprocess, sys; '
               'subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr); '
               'used = resource.getrusage(resource.RUSAGE_CHILDREN); '
               'print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)')
    done = subprocess.run([
        sys.executable, '-c', program, sys.executable,
        osp.join(root, 'tools', 'count_params.py'), config, '--json'
    ],
                          capture_output=True,
                          text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1'),
                          check=True)
    seconds, gigabytes = map(float, done.stdout.split())
    print(f'{seconds:.1f} s of CPU time')
    assert gigabytes <= 2
