"""Check that names, paths, metafiles and README tables of configs/ agree.

Prints one line for each problem and exits with status 1 if there is any::

    python .dev_scripts/check_metafile.py [ROOT]
"""
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List

import yaml

# Configs of the embedded demo: no published setting, so no README row.
DEMO = '_shapes'
COLUMNS = ('Config', 'Inherits', 'Trainable (M)', 'Of backbone', 'Memory',
           'Metric', 'Ours', 'Published')
BLANK = 'not measured'
# What every method has; other tasks are for those with published numbers.
EVERYWHERE = ('mask-rcnn_swin-b_coco.py', 'upernet_swin-l_ade20k.py',
              'upernet_vit-b_pascal-context.py',
              'mask-rcnn_swin-nano_shapes.py')
# Methods that are for ViT alone have what of this is for ViT.
NO_SWIN = ('hst', 'vit_adapter')


def method_folders(root: Path) -> List[Path]:
    """Every folder of configs that stands for a method."""
    return sorted(
        p for p in (root / 'configs').iterdir()
        if p.is_dir() and not p.name.startswith(('_', '.')))


def readme_rows(folder: Path) -> Dict[str, Dict[str, str]]:
    """Rows of a README's table of results, by the name of the config."""
    rows = {}
    for line in (folder / 'README.md').read_text().splitlines():
        cells = [c.strip() for c in line.strip().strip('|').split('|')]
        link = re.fullmatch(r'\[(\S+)\]\(\./(\S+)\)', cells[0])
        if link and len(cells) == len(COLUMNS):
            rows[link[1]] = dict(zip(COLUMNS, cells), link=link[2])
    return rows


def check(root: Path) -> Iterator[str]:
    """Every problem, as one line."""
    folders = method_folders(root)
    imported = yaml.safe_load((root / 'model-index.yml').read_text())['Import']
    expected = [f'configs/{f.name}/metafile.yml' for f in folders]
    for path in sorted(set(imported) ^ set(expected)):
        state = 'missing in' if path in expected else 'unknown in'
        yield f'{path}: {state} model-index.yml'
    overview = (root / 'configs/README.md').read_text()
    for path in sorted((root / 'configs/_base_').glob('*.py')):
        if DEMO not in path.stem and f'`{path.stem}`' not in overview:
            yield f'configs/README.md: no row for {path.name}'
    for folder in folders:
        where = f'configs/{folder.name}'
        if f']({folder.name})' not in overview:
            yield f'configs/README.md: no link to {folder.name}'
        wanted = {
            n
            for n in EVERYWHERE
            if 'swin' not in n or folder.name not in NO_SWIN
        }
        for name in sorted(wanted - {p.name for p in folder.glob('*.py')}):
            yield f'{where}: has no {name}, as other methods do'
        for name in ('README.md', 'metafile.yml'):
            if not (folder / name).is_file():
                yield f'{where}: has no {name}'
                break
        else:
            yield from check_configs(folder, where)
            yield from check_links(folder, where)
            yield from check_metafile(folder, where, root)


def check_configs(folder: Path, where: str) -> Iterator[str]:
    """A method's file is its base and one block; the README has its row."""
    rows = readme_rows(folder)
    configs = {p.stem: p for p in folder.glob('*.py')}
    for name in sorted(set(rows) - set(configs)):
        yield f'{where}/README.md: row {name}, but there is no such config'
    for name, path in sorted(configs.items()):
        text = path.read_text()
        # A setting of a task, <task>_<setting>, inherits the task's file.
        task = name.rpartition('_')[0]
        base = f'./{task}.py'
        if task not in configs:
            task, base = name, f'../_base_/{name}.py'
        if f"_base_ = '{base}'" not in text:
            yield f'{where}/{path.name}: does not inherit {base}'
            continue
        if DEMO in name:
            continue
        if name not in rows:
            yield f'{where}/README.md: no row for {name}'
            continue
        row = rows[name]
        if row['link'] != f'{name}.py':
            yield f'{where}/README.md: {name} links to {row["link"]}'
        stock = row['Inherits'].strip('`')
        base = bases_text(folder.parent / '_base_' / f'{task}.py')
        # A long name is split over two strings there.
        if stock not in re.sub(r"'\s*'", '', base):
            yield f'{where}/README.md: {name} does not inherit {stock}'
        for column in ('Trainable (M)', 'Of backbone'):
            if not re.fullmatch(r'\d+\.\d+%?', row[column]):
                yield (f'{where}/README.md: {name}: {column} is '
                       f'{row[column]!r}, not a number')


def bases_text(path: Path) -> str:
    """A file and those of ours that it inherits."""
    text = path.read_text()
    inherited = re.findall(r"'(\./\S+\.py)'", text)
    return text + ''.join(bases_text(path.parent / name) for name in inherited)


def check_links(folder: Path, where: str) -> Iterator[str]:
    text = (folder / 'README.md').read_text()
    for link in re.findall(r'\]\((?!https?://)([^)#]+)', text):
        if not (folder / link).exists():
            yield f'{where}/README.md: broken link {link}'
    for path in re.findall(r'configs/\S+\.py', text):
        if not (folder.parent.parent / path).is_file():
            yield f'{where}/README.md: there is no {path}'


def check_metafile(folder: Path, where: str, root: Path) -> Iterator[str]:
    meta = yaml.safe_load((folder / 'metafile.yml').read_text())
    collections = {c['Name']: c for c in meta['Collections']}
    for name, collection in collections.items():
        if not (root / collection.get('README', 'missing')).is_file():
            yield f'{where}/metafile.yml: collection {name} has no README'
    rows = readme_rows(folder)
    listed = set()
    for model in meta['Models']:
        name = model['Name']
        at = f'{where}/metafile.yml: {name}'
        stem = Path(model['Config']).stem
        if model['Config'] != f'{where}/{stem}.py' or not (
                root / model['Config']).is_file():
            yield f'{at}: there is no {model["Config"]}'
        if name != f'{folder.name}_{stem}':
            yield f'{at}: should be named {folder.name}_{stem}'
        if stem in listed:
            yield f'{at}: is listed twice'
        listed.add(stem)
        if model.get('In Collection') not in collections:
            yield f'{at}: unknown collection {model.get("In Collection")}'
        if 'Training Data' not in model.get('Metadata', {}):
            yield f'{at}: has no Training Data'
        results = model.get('Results', [])
        if any({'Task', 'Dataset', 'Metrics'} - set(r) for r in results):
            yield f'{at}: a result needs Task, Dataset and Metrics'
        measured = rows.get(stem, {}).get('Ours', BLANK) != BLANK
        if stem in rows and bool(results) != measured:
            yield f'{at}: README and Results disagree on what is measured'
    for path in sorted(folder.glob('*.py')):
        if path.stem not in listed:
            yield f'{where}/metafile.yml: {path.name} is not listed'


def main() -> int:
    default = Path(__file__).resolve().parents[1]
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    problems = list(check(root))
    print(*problems, sep='\n', end='\n' if problems else '', file=sys.stderr)
    return int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
