"""Read configs, and turn any of them into a PEFT config."""
import copy
import importlib
import importlib.util
import os.path as osp
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import MODELS as MMENGINE_MODELS

from .backbones.base import family_names
from .errors import MissingFileError, PEFTError
from .plan import parse_methods
from .registry import SITE_MAPS

__all__ = [
    'config_path', 'load_config', 'add_method', 'find_backbones',
    'find_peft_backbones', 'method_title'
]

STOCK = ('mmdet', 'mmseg', 'mmpretrain')
LIBRARIES = STOCK + ('mmpeft', )
#: Arguments of ``PEFTBackbone`` itself; the rest belongs to the stock type.
PEFT_ARGUMENTS = ('stock', 'method', 'freeze', 'allow_random_base',
                  'eval_frozen')


def configs_root(package: str) -> Path:
    """The folder of the configs that a package ships."""
    root = Path(importlib.import_module(package).__file__).parent
    # A wheel carries its configs in .mim, a checkout beside the package.
    for folder in (root / '.mim' / 'configs', root.parent / 'configs'):
        if folder.is_dir():
            return folder
    raise MissingFileError(f'{package} is installed without its configs; '
                           'give the path of a config file instead.')


def config_path(name: str) -> str:
    """Path of a config that mmpeft ships, such as
    ``mona/mask-rcnn_swin-b_coco.py``.

    Under stock tools ``_base_ = 'mmpeft::...'`` is not known yet when bases
    are read; ``_base_ = __import__('mmpeft').config_path('...')`` is.
    """
    return _existing(configs_root('mmpeft') / name, name)


def _existing(path: Path, name: str) -> str:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob('*.py'))
        hint = f' That folder has {", ".join(near[:8])}.' if near else ''
        raise MissingFileError(
            f'There is no config {name!r}; looked at {path}.{hint}')
    return str(path)


def load_config(name: str) -> Config:
    """Load a config file, or a shipped one by name (``mmdet::swin/...``).

    A shipped config that names no scope, such as mmpretrain's backbones
    without a head, gets that of its library.
    """
    package, colons, relative = name.partition('::')
    if colons:
        if package not in LIBRARIES:
            raise PEFTError(f'{name!r}: configs come from one of '
                            f'{", ".join(LIBRARIES)}, not from {package!r}.')
        try:
            root = configs_root(package)
        except ImportError:
            raise PEFTError(f'{name!r}: {package} is not installed; install '
                            'it, or give the path of a config.') from None
        path = _existing(root / relative, name)
    else:
        path = _existing(Path(name), name)
    cfg = _read(path)
    scope = package if colons else _library_of(Path(path))
    if scope in STOCK and cfg.get('default_scope') is None:
        cfg.default_scope = scope
    return cfg


def _read(path: str) -> Config:
    """The config, or one sentence on what is wrong with its text or bases."""
    try:
        return Config.fromfile(path)
    except FileNotFoundError as error:
        missing = error.filename or error
        raise MissingFileError(f'{path} inherits from, or reads, a file that '
                               f'is not there: {missing}.') from error
    except SyntaxError as error:
        raise PEFTError(f'{path} or a base of it is no valid Python, in line '
                        f'{error.lineno}: {error.msg}.') from error
    except PEFTError:
        raise
    except Exception as error:  # a config is a program
        # What mmengine says of a name that is none, and of what it lacks.
        said = ('::', 'not support to load', 'manually')
        kinds = (ValueError, AssertionError, ModuleNotFoundError)
        if isinstance(error, kinds) and any(w in str(error) for w in said):
            raise PEFTError(
                f'{path} inherits by a name that leads nowhere; a base is the '
                'path of a file, or LIBRARY::FOLDER/FILE.py of an installed '
                f'one of {", ".join(LIBRARIES)}.') from error
        text = ' '.join(str(error).split())
        raise PEFTError(f'{path} cannot be read as a config '
                        f'({type(error).__name__}: {text}).') from error


def _library_of(path: Path) -> Optional[str]:
    """The library that ships a config."""
    for package in STOCK:
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).resolve().parent if spec else None
        if root in path.resolve().parents:
            return package
    return None


def add_method(cfg: Config,
               method: Any,
               at: Optional[str] = None) -> Tuple[Config, str]:
    """Make a config a PEFT one.

    Args:
        cfg (Config): Any config with a supported backbone in ``model``. If
            the backbone is a PEFT one already, its method is replaced.
        method (dict | str | list): As for ``PEFTBackbone``.
        at (str, optional): Path of the backbone in the config, such as
            ``model.backbone``; None takes the only supported one.

    Returns:
        tuple[Config, str]: A changed copy, and the path of the backbone.

    Raises:
        PEFTError: If there is no supported backbone or more than one.
    """
    plans = parse_methods(method)
    cfg = copy.deepcopy(cfg)
    found = find_backbones(cfg)
    if at is None:
        if len(found) != 1:
            raise PEFTError(_which(cfg, list(found)))
        at = next(iter(found))
    elif at not in found:
        raise PEFTError(f'--at {at}: no supported backbone there. ' +
                        (f'Supported ones are at {", ".join(found)}.'
                         if found else _which(cfg, [])))
    node = found[at]
    if not _is_peft(node):
        node['stock'] = _scoped(cfg, node)
        node['type'] = 'mmpeft.PEFTBackbone'
    node['method'] = method if isinstance(method,
                                          str) else copy.deepcopy(method)
    hooks = cfg.get('custom_hooks') or []
    for hook in (h for plan in plans for h in plan.cls.hooks):
        if not any(_same_type(hook, other) for other in hooks):
            hooks = cfg.custom_hooks = [*hooks, dict(hook)]
    return cfg, at


def _same_type(hook: dict, other: dict) -> bool:
    names = [str(h['type']).rsplit('.', 1)[-1] for h in (hook, other)]
    return names[0] == names[1]


def find_backbones(cfg: Config) -> Dict[str, dict]:
    """Supported backbones anywhere in ``cfg.model``, by path."""
    SITE_MAPS.import_from_location()
    families = SITE_MAPS.module_dict.values()
    found = {}
    for path, node in nodes(cfg.get('model'), 'model'):
        cls = node['type']
        if isinstance(cls, str) and not _is_peft(node):
            cls = _resolve(_scoped(cfg, node))
        if _is_peft(node) or isinstance(cls, type) and any(
                f.recognises(cls, node) for f in families):
            found[path] = node
    return found


def _resolve(name: str) -> Optional[type]:
    """The class a scoped name stands for; None if there is none."""
    scope = name.split('.')[0] if '.' in name else None
    try:
        with MMENGINE_MODELS.switch_scope_and_registry(scope) as registry:
            return registry.get(name)
    except (ImportError, RuntimeError, KeyError):
        return None


def find_peft_backbones(cfg: Config) -> Dict[str, dict]:
    """PEFT backbones in ``cfg.model``, by path."""
    return {p: n for p, n in nodes(cfg.get('model'), 'model') if _is_peft(n)}


def method_title(cfg: Config) -> str:
    """Short name of the methods in a config, such as ``mona`` or
    ``lora+ln_tune``; empty for a stock config."""
    names: List[str] = []
    for node in find_peft_backbones(cfg).values():
        names += [plan.name for plan in parse_methods(node['method'])]
    return '+'.join(names)


def _is_peft(node: dict) -> bool:
    name = node['type']
    name = name if isinstance(name, str) else getattr(name, '__name__', '')
    return name.rsplit('.', 1)[-1] == 'PEFTBackbone'


def nodes(value: Any, path: str):
    """Every dict with a type, depth first."""
    if isinstance(value, dict):
        if 'type' in value:
            yield path, value
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        return
    for key, child in children:
        yield from nodes(child, f'{path}.{key}')


def _scoped(cfg: Config, node: dict) -> Any:
    """The type of a node, with the scope that the node would be built in."""
    name = node['type']
    # A config inherited from another library carries its scope along.
    scope = node.get('_scope_') or cfg.get('default_scope')
    if isinstance(name, str) and '.' not in name and scope:
        scoped = f'{scope}.{name}'
        # What a package registered with mmengine itself has no scope.
        return scoped if _resolve(scoped) or not _resolve(name) else name
    return name


def _which(cfg: Config, found: List[str]) -> str:
    if found:
        return (f'{len(found)} supported backbones are in this config, at '
                f'{", ".join(found)}; choose one with --at.')
    model = cfg.get('model')
    backbone = isinstance(model, dict) and model.get('backbone') or {}
    # TIMMBackbone stands for any model of timm.
    kind = ' of '.join(
        repr(backbone[k]) for k in ('type', 'model_name') if k in backbone)
    there = f' (model.backbone is {kind})' if kind else ''
    return (f'No supported backbone in {osp.basename(cfg.filename or "")!r}'
            f'{there}. Supported families: {family_names()}.')
