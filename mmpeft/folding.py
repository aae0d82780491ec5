"""Attached modules in fewer steps, for deployment."""
import torch
import torch.nn as nn

from .delta_parts import unwrap
from .errors import PEFTError
from .methods.folded import refuse_loading
from .state import attached_modules
from .tasks import list_tasks

__all__ = ['fold']


def fold(model: nn.Module) -> nn.Module:
    """Replace attached modules by equal ones with fewer steps, in place.

    For methods that have no place in a stock layer, so that
    :func:`mmpeft.merge` refuses them: what is linear in a module is multiplied
    out, once, in float64. A method takes part by a ``folded()`` that returns a
    :class:`mmpeft.methods.folded.Folded`; the others stay as they are.

    A folded model is for inference. It has no state dict, loads no weights
    and does not train; each is refused. Deep copies work.

    Examples:
        >>> model = init_detector(config, 'epoch_12.pth')
        >>> mmpeft.fold(model)

    Args:
        model (nn.Module): In evaluation mode.

    Returns:
        nn.Module: The same model.

    Raises:
        PEFTError: If the model is in training mode, has tasks, or has nothing
            that can be folded; then nothing has changed.
    """
    model = unwrap(model)
    if list_tasks(model):
        raise PEFTError('Tasks take turns in this model, and would be '
                        'unfolded again; fold one that is built with the '
                        'method.')
    attached = attached_modules(model)
    with torch.no_grad():
        folded = {id(m): m.folded() for m in attached}
    folded = {k: v for k, v in folded.items() if v is not None}
    if not folded:
        names = sorted({type(m).__name__ for m in attached})
        raise PEFTError(
            f'There is nothing to fold in {type(model).__name__}, which has '
            f'{", ".join(names) or "no method"}; methods that go into stock '
            'layers are merged by mmpeft.merge().')
    if model.training or any(m.training for m in attached):
        raise PEFTError('Only a model for inference is folded; call '
                        'model.eval() first.')
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) in folded:
                setattr(parent, name, folded[id(child)])
    hook = model._register_load_state_dict_pre_hook(refuse_loading)
    # Before any other looks at what there is to load.
    model._load_state_dict_pre_hooks.move_to_end(hook.id, last=False)
    return model
