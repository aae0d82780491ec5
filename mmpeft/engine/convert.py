"""From a checkpoint in one library's names to one in another's."""
from argparse import Namespace

from torch import Tensor

from ..errors import PEFTError
from ..key_styles import STYLES, Report, convert
from ..released import convert_released
from .checkpoint import check_out, read_checkpoint, write_checkpoint

__all__ = ['convert_checkpoint']


def convert_checkpoint(args: Namespace) -> Report:
    """Convert ``args.checkpoint`` to the style ``args.to``, into ``args.out``.

    Raises:
        PEFTError: If the file is not a Swin or ViT, or if the output exists.
    """
    check_out(args.out, args.force, args.checkpoint)
    checkpoint = read_checkpoint(args.checkpoint)
    if 'peft_delta' in checkpoint:
        raise PEFTError(f'{args.checkpoint} is a delta, without the weights '
                        'of a backbone; convert its base, or a merged file.')
    state = checkpoint['state_dict']
    # Microsoft's and Meta's files keep the tensors under 'model'.
    if isinstance(state.get('model'), dict):
        state = state['model']
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if args.source == 'mona':
        out, report = convert_released(state)
    elif args.to is None:
        raise PEFTError(f'--to says which names to write: {", ".join(STYLES)}'
                        '; or --from mona.')
    else:
        out, report = convert(state, args.to)
    meta = checkpoint.get('meta') or {}
    meta = {k: meta[k] for k in ('epoch', 'iter') if k in meta}
    write_checkpoint(dict(meta=meta, state_dict=out), args.out)
    return report
