"""Kinds of bad deltas and checkpoints, each as many files as are wanted.

A kind is a function of a path, a good file, and random numbers; it leaves a
bad file at the path. What is expected to be said of it stands beside.
"""
import json
import os
import pickle
import shutil
import struct
import zipfile

import payloads
import torch
from safetensors.torch import save

from mmpeft.delta_file import KEY, read_delta, write_delta

#: Refused by whatever opens a file; ``{name: (what is said, function)}``.
FILES = {}
#: Whole files that do not fit the model.
DELTAS = {}
#: Of full checkpoints.
CHECKPOINTS = {}


def kind(kinds, said):
    """Register a kind by its name."""

    def add(function):
        kinds[function.__name__] = said, function
        return function

    return add


def _content(good):
    with open(good, 'rb') as file:
        return bytearray(file.read())


def _write(path, content):
    with open(path, 'wb') as file:
        file.write(content)


def _header_length(content):
    return 8 + int.from_bytes(content[:8], 'little')


def _flip(content, start, stop, rng):
    content[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)


def _write_raw(path, tensors, text):
    """A file whose header nobody checked."""
    _write(path, save(tensors, metadata={KEY: text}))


def _header(good):
    with open(good, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        return json.loads(json.loads(file.read(length))['__metadata__'][KEY])


@kind(FILES, 'damaged')
def truncated(path, good, rng, marker):
    content = _content(good)
    _write(path, content[:rng.randrange(9, len(content))])


@kind(FILES, 'damaged')
def grown(path, good, rng, marker):
    _write(path, _content(good) + rng.randbytes(rng.randrange(1, 99)))


@kind(FILES, 'damaged|header')
def flipped_in_the_header(path, good, rng, marker):
    content = _content(good)
    _flip(content, 0, _header_length(content), rng)
    _write(path, content)


@kind(FILES, 'damaged|not finite')
def flipped_in_the_tensors(path, good, rng, marker):
    content = _content(good)
    _flip(content, _header_length(content), len(content), rng)
    _write(path, content)


@kind(FILES, 'header')
def huge_header(path, good, rng, marker):
    """Of a length that nobody has the memory for, or that would fit."""
    content = _content(good)
    length = rng.choice([2**63 - 1, 2**40, 2**25 + rng.randrange(9)])
    content[:8] = struct.pack('<Q', length)
    _write(path, content)
    if length < 2**26:
        os.truncate(path, length + 99)


@kind(FILES, 'damaged')
def random_bytes(path, good, rng, marker):
    _write(path, rng.randbytes(rng.randrange(9, 5000)))


@kind(FILES, 'damaged')
def empty(path, good, rng, marker):
    _write(path, rng.randbytes(rng.randrange(0, 9)) * rng.randrange(2))


@kind(FILES, 'There is no')
def folder(path, good, rng, marker):
    os.mkdir(path)
    _write(f'{path}/{rng.randrange(99)}', b'')


@kind(FILES, 'header says')
def shapes_beside_the_header(path, good, rng, marker):
    tensors, header = read_delta(good)
    name = rng.choice([k for k, v in tensors.items() if v.ndim > 1])
    tensors[name] = tensors[name].flatten()
    _write_raw(path, tensors, json.dumps(vars(header)))


@kind(FILES, 'header says')
def dtypes_beside_the_header(path, good, rng, marker):
    tensors, header = read_delta(good)
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].to(
        rng.choice([torch.float16, torch.bfloat16, torch.int32]))
    _write_raw(path, tensors, json.dumps(vars(header)))


@kind(FILES, 'lacks')
def tensors_that_are_missing(path, good, rng, marker):
    tensors, header = read_delta(good)
    for name in rng.sample(sorted(tensors), rng.randrange(1, 5)):
        del tensors[name]
    _write_raw(path, tensors, json.dumps(vars(header)))


@kind(FILES, 'has besides')
def tensors_that_are_left_over(path, good, rng, marker):
    tensors, header = read_delta(good)
    tensors[f'backbone.{rng.randrange(99)}'] = torch.zeros(2)
    _write_raw(path, tensors, json.dumps(vars(header)))


@kind(FILES, 'not finite')
def not_finite(path, good, rng, marker):
    tensors, header = read_delta(good)
    name = rng.choice([k for k, v in tensors.items() if v.is_floating_point()])
    flat = tensors[name].flatten()
    flat[rng.randrange(len(flat))] = float(rng.choice(['nan', 'inf', '-inf']))
    tensors[name] = flat.view(tensors[name].shape)
    write_delta(path, tensors, header)


@kind(FILES, 'of format .* use a newer mmpeft')
def newer_format(path, good, rng, marker):
    tensors, header = read_delta(good)
    header.format_version = rng.randrange(2, 99)
    write_delta(path, tensors, header)


@kind(FILES, 'is a pickle and no safetensors')
def pickle_with_a_payload(path, good, rng, marker):
    value = dict(state_dict={}, x=payloads.touch(marker))
    _write(path, pickle.dumps(value, protocol=rng.randrange(2, 6)))


@kind(FILES, 'is a pickle and no safetensors')
def torch_file_with_a_payload(path, good, rng, marker):
    torch.save(
        dict(state_dict={}, x=[payloads.touch(marker)]),
        path,
        _use_new_zipfile_serialization=rng.random() < .5)


@kind(FILES, "metadata has no 'mmpeft'")
def other_safetensors(path, good, rng, marker):
    _write(path, save({str(rng.random()): torch.zeros(3)}))


@kind(FILES, 'header')
def header_of_another_kind(path, good, rng, marker):
    """Lists, numbers, text, and nests too deep for a parser."""
    tensors, _ = read_delta(good)
    deep = rng.choice('[{') * rng.randrange(10**4, 10**5)
    text = rng.choice([
        '[]', 'null', '1', '"text"', '{}', '{', '', deep,
        deep.replace('{', '{"a":'), '[' * 9999 + ']' * 9999,
        '{"format_version": "1"}', '{"format_version": []}',
        '{"format_version": 0}', '{"format_version": 1}',
        '{"format_version": 1, "x": 1}', '{"format_version": 1e999}'
    ])
    _write_raw(path, tensors, text)


@kind(FILES, 'header')
def header_with_wrong_types(path, good, rng, marker):
    """One field, anywhere, that is something else."""
    tensors, _ = read_delta(good)
    header = _header(good)
    at = rng.choice([('backbones', ), ('base', ), ('tensors', ),
                     ('packages', ), ('meta', ), ('format_version', ),
                     ('base', 'fingerprint'), ('base', 'names'),
                     ('base', 'names', 0), ('base', 'sources'),
                     ('base', 'sources', 0),
                     ('base', 'sources', 0, 'checkpoint'),
                     ('base', 'sources', 0, 'at'), ('backbones', 'backbone'),
                     ('backbones', 'backbone', 'stock'),
                     ('backbones', 'backbone', 'method'),
                     ('backbones', 'backbone', 'method', 0),
                     ('backbones', 'backbone', 'method', 0, 'type'),
                     ('tensors', sorted(tensors)[0])])
    node = header
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = rng.choice([
        v for v in (3.5, True, ['x'], 'x', {
            'x': 'x'
        }, [[]], [{}]) if type(v) is not type(node[at[-1]])
    ])
    _write_raw(path, tensors, json.dumps(header))


@kind(DELTAS, 'lacks|tensors differ')
def without_some(path, good, rng, marker):
    """As if they had never been trained."""
    tensors, header = read_delta(good)
    extra = set(header.base['names'])
    for name in rng.sample(sorted(set(tensors) - extra), rng.randrange(1, 4)):
        del tensors[name]
    write_delta(path, tensors, header)


@kind(DELTAS, 'has besides|tensors differ')
def with_more(path, good, rng, marker):
    tensors, header = read_delta(good)
    start = rng.choice(['backbone.stages.0.blocks.0.', 'decode_head.', ''])
    tensors[f'{start}peft.x{rng.randrange(9)}.weight'] = torch.zeros(2)
    write_delta(path, tensors, header)


@kind(DELTAS, 'here')
def of_other_shapes(path, good, rng, marker):
    tensors, header = read_delta(good)
    name = rng.choice(sorted(tensors))
    shapes = [(), (3, ), (2, 2), (1, 1, 9)]
    tensors[name] = torch.zeros(
        rng.choice([s for s in shapes if s != tensors[name].shape]))
    write_delta(path, tensors, header)


@kind(DELTAS, 'here')
def of_other_types(path, good, rng, marker):
    tensors, header = read_delta(good)
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].to(
        rng.choice([torch.float16, torch.bfloat16, torch.float64]))
    write_delta(path, tensors, header)


@kind(DELTAS, 'another base')
def of_another_base(path, good, rng, marker):
    """The fingerprint of other weights."""
    tensors, header = read_delta(good)
    digits = header.base['fingerprint']
    at = rng.randrange(len(digits))
    new = rng.choice([c for c in '0123456789abcdef' if c != digits[at]])
    header.base['fingerprint'] = digits[:at] + new + digits[at + 1:]
    write_delta(path, tensors, header)


@kind(DELTAS, 'frozen weights|another model|another base|frozen')
def of_another_model(path, good, rng, marker):
    """A block more, or one less, in a base of which nothing is attached."""
    tensors, header = read_delta(good)
    names = header.base['names']
    if rng.random() < .5:
        own = [n for n in names if n not in tensors]
        names.remove(rng.choice(own))
    else:
        names.append(f'backbone.stages.0.blocks.{rng.randrange(2, 9)}.x')
        names.sort()
    write_delta(path, tensors, header)


@kind(DELTAS, 'holds|differ|registered|cannot be built|not for this model')
def of_another_method(path, good, rng, marker):
    """One argument, another method, or what is none."""
    tensors, header = read_delta(good)
    method = header.backbones['backbone']['method']
    change = rng.randrange(4)
    if change == 0:
        method[0]['rank'] = rng.randrange(5, 99)
    elif change == 1:
        method[0] = dict(type=rng.choice(['Mona', 'Adapter', 'SSF']))
    elif change == 2:
        method[0] = dict(
            type=rng.choice([
                'os.system', 'subprocess.Popen', 'builtins.open',
                'torch.hub.load'
            ]),
            args=['touch', marker],
            command=f'touch {marker}',
            file=marker)
    else:
        method[0]['rank'] = rng.choice(['x', [], {}, None, -1, 0])
    write_delta(path, tensors, header)


PLACES = ('state_dict', 'meta', 'optimizer', 'message_hub', 'param_schedulers',
          'peft_randomness', 'peft_sources', 'x')


@kind(CHECKPOINTS, 'refers to')
def payload_anywhere(path, good, rng, marker):
    """In each part of a checkpoint, in both formats of torch."""
    checkpoint = torch.load(good, weights_only=False)
    place, call = rng.choice(PLACES), payloads.touch(marker)
    part = checkpoint.get(place)
    if isinstance(part, dict) and rng.random() < .8:
        part[rng.choice(sorted(map(str, part)))] = call
    elif isinstance(part, list) and rng.random() < .8:
        part.append(call)
    else:
        checkpoint[place] = call
    torch.save(
        checkpoint, path, _use_new_zipfile_serialization=rng.random() < .5)


@kind(CHECKPOINTS, 'refers to builtins.getattr')
def payload_by_getattr(path, good, rng, marker):
    payloads.write_zip(path, payloads.by_getattr(f'{marker}{rng.random()}'))


@kind(CHECKPOINTS, 'damaged')
def truncated_zip(path, good, rng, marker):
    content = _content(good)
    _write(path, content[:rng.randrange(9, len(content))])


@kind(CHECKPOINTS, 'damaged|checksum|refers to')
def flipped_zip(path, good, rng, marker):
    """In the pickle or a tensor, which torch would not notice."""
    content = _content(good)
    with zipfile.ZipFile(good) as archive:
        records = [
            i for i in archive.infolist()
            if '/data' in i.filename and i.file_size
        ]
    info = rng.choice(records)
    # Behind a header with a name and padding.
    lengths = struct.unpack_from('<HH', content, info.header_offset + 26)
    start = info.header_offset + 30 + sum(lengths)
    _flip(content, start, start + info.file_size, rng)
    _write(path, content)


@kind(CHECKPOINTS, 'damaged')
def no_zip(path, good, rng, marker):
    _write(path, rng.randbytes(rng.randrange(0, 5000)))


@kind(CHECKPOINTS, 'let its name end in')
def safetensors_by_another_name(path, good, rng, marker):
    delta = good.replace('.pth', '_delta.safetensors')
    shutil.copy(delta, path)


@kind(CHECKPOINTS, 'is no checkpoint|holds a|damaged')
def other_content(path, good, rng, marker):
    value = rng.choice([[], 'text', 1, None,
                        dict(state_dict=[]),
                        dict(state_dict={}, meta='x'),
                        torch.zeros(2)])
    torch.save(value, path)


#: Good files of another model: only what knows the model can refuse them.
MISFITS = {}


@kind(MISFITS, 'lacks|missing|of another shape')
def parameters_missing(path, good, rng, marker):
    checkpoint = torch.load(good, weights_only=False)
    state = checkpoint['state_dict']
    for name in rng.sample(
        [k for k in state if k.endswith(('weight', 'bias'))],
            rng.randrange(1, 4)):
        del state[name]
    torch.save(checkpoint, path)


@kind(MISFITS, 'in another shape|of another shape')
def parameters_of_other_shapes(path, good, rng, marker):
    checkpoint = torch.load(good, weights_only=False)
    state = checkpoint['state_dict']
    name = rng.choice([k for k in state if k.endswith(('weight', 'bias'))])
    state[name] = torch.zeros(rng.choice([(), (2, 2), (1, 1, 9)]))
    torch.save(checkpoint, path)
