"""Say what a delta is: method, base, tensors.

    python tools/inspect_peft.py FILE [--json]
"""
import argparse
import json
import os.path as osp
import sys

sys.path.insert(0, osp.join(osp.dirname(osp.abspath(__file__)), '..'))

from mmpeft.cli import run  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', help='*_delta.safetensors')
    parser.add_argument(
        '--json', action='store_true', help='print one JSON list')
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    return parser.parse_args()


def main():
    args = parse_args()
    from mmpeft.engine.extract import describe_delta
    about = describe_delta(args.file)
    if args.json:
        print(json.dumps([about], indent=1))
        return
    print(f'{about["path"]}: {about["bytes"]:,} bytes, format '
          f'{about["format_version"]}')
    for path, backbone in about['backbones'].items():
        print(f'{path or "the model itself"}: {backbone["stock"]}')
        for method in backbone['method']:
            rest = ', '.join(
                f'{k}={v}' for k, v in method.items()
                if k not in ('type', 'name') and v not in (None, {}))
            print(f'  {method["name"]}: {method["type"]}({rest})')
    base = about['base']
    print(f'base: {base["tensors"]} frozen weights, sha256 '
          f'{base["fingerprint"]}')
    for source in base['sources']:
        at = source.get('at') or 'the model'
        print(f'  {at} from {source["checkpoint"]}'
              f'{" " + source["prefix"] if source.get("prefix") else ""}')
    for name, part in about['parts'].items():
        print(f'{name}: {part["tensors"]} tensors, {part["parameters"]:,} '
              'numbers')
    for name in ('epoch', 'iter', 'time', 'dataset_meta'):
        if name in about['meta']:
            print(f'{name}: {about["meta"][name]}')
    print('written by ' + ', '.join(f'{k} {v}'
                                    for k, v in about['packages'].items()))


if __name__ == '__main__':
    run(main)
