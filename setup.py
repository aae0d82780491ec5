"""Packaging. What mim looks for travels in the wheel under mmpeft/.mim."""
import os
import shutil
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = os.path.dirname(os.path.abspath(__file__))
MIM = ('configs', 'tools', 'model-index.yml')


def read(*names):
    """Text of a file of the checkout."""
    with open(os.path.join(ROOT, *names), encoding='utf-8') as f:
        return f.read()


def requirements(name):
    """Lines of a requirements file that require something."""
    lines = (
        line.split('#')[0].strip()
        for line in read('requirements', f'{name}.txt').splitlines())
    return [line for line in lines if line]


def version():
    """``mmpeft.__version__``, without an import that would need torch."""
    scope = {}
    exec(read('mmpeft', 'version.py'), scope)
    return scope['__version__']


def add_mim(package, link):
    """Puts what mim looks for into the package.

    Args:
        package (str): Folder of the package.
        link (bool): Whether to link to the checkout, or else copy.
    """
    folder = os.path.join(package, '.mim')
    os.makedirs(folder, exist_ok=True)
    for name in MIM:
        source = os.path.join(ROOT, name)
        target = os.path.join(folder, name)
        if os.path.islink(target) or os.path.isfile(target):
            os.remove(target)
        elif os.path.isdir(target):
            shutil.rmtree(target)
        if link:
            os.symlink(os.path.join('..', '..', name), target)
        elif os.path.isdir(source):
            ignore = shutil.ignore_patterns('__pycache__')
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copyfile(source, target)


class BuildPy(build_py):
    """Adds ``.mim``: links in an editable install, copies in a wheel."""

    def run(self):
        """Builds the package, then ``.mim`` in it."""
        super().run()
        editable = getattr(self, 'editable_mode', False)
        root = ROOT if editable else self.build_lib
        add_mim(os.path.join(root, 'mmpeft'), link=editable)


class Develop(develop):
    """Adds ``.mim``: an older pip's editable install builds nothing."""

    def run(self):
        """Links ``.mim``, then installs."""
        add_mim(os.path.join(ROOT, 'mmpeft'), link=True)
        super().run()


if __name__ == '__main__':
    setup(
        name='mmpeft',
        version=version(),
        description='Parameter-efficient fine-tuning for MMDetection, '
        'MMSegmentation and MMPretrain',
        long_description=read('README.md'),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        keywords='computer vision, PEFT, adapter, LoRA, Mona, OpenMMLab',
        packages=find_packages(include=['mmpeft', 'mmpeft.*']),
        package_data={'mmpeft.bench.published': ['*.csv']},
        python_requires='>=3.8',
        install_requires=requirements('runtime'),
        extras_require={
            name: requirements(name)
            for name in ('mminstall', 'optional', 'tests')
        },
        cmdclass={
            'build_py': BuildPy,
            'develop': Develop
        },
        zip_safe=False,
        classifiers=[
            'Development Status :: 3 - Alpha',
            'Intended Audience :: Science/Research',
            'Operating System :: POSIX',
            'Programming Language :: Python :: 3',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
        ])
