"""Models that are measured, with what they are measured on."""
import copy
import inspect
from contextlib import contextmanager
from typing import Any, Iterator, Optional

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import Tensor

from ..calibration import calibrate
from ..errors import PEFTError
from ..registry import MODELS
from .count import build_model
from .flops import FlopCounter
from .generated import generate
from .measure import TrainStep, loss_of
from .settings import DTYPES, Settings

__all__ = ['Subject', 'build_backbone', 'node_at', 'set_checkpointing']


class Subject:
    """A model in training mode with random weights, and generated inputs.

    Args:
        cfg (Config): Of a stock model, or a PEFT one.
        at (str): Path of the backbone in the config.
        settings (Settings): How it is measured.
        base (nn.Module, optional): Of another subject of the same config. Its
            stock weights become those of this one: where they are frozen
            here, the same tensors.

    Raises:
        PEFTError: If images and labels cannot be made for the model.
    """

    def __init__(self,
                 cfg: Config,
                 at: str,
                 settings: Settings,
                 base: Optional[nn.Module] = None) -> None:
        self.settings = settings
        self.whole = not settings.backbone_only
        torch.manual_seed(0)
        # Some losses ask for the epoch, which a runner says.
        MessageHub.get_current_instance().update_info('epoch', 0)
        with explained('cannot be built', cfg.model['type'], settings):
            model = build_model(cfg) if self.whole else build_backbone(cfg, at)
        model = revert_sync_batchnorm(model)
        self.model = model.to(settings.device, DTYPES[settings.dtype])
        if base is not None:
            _share(self.model, base)
        self.inputs = self._batch(cfg) if self.whole else (torch.randn(
            settings.batch_size,
            3,
            *settings.image_size,
            device=settings.device,
            dtype=DTYPES[settings.dtype]), )
        #: What trains: the model, or the model and the loss in it.
        self.trained = WithLoss(self.model) if self.whole else self.model
        self.loss_of = (lambda loss: loss) if self.whole else loss_of
        self.trained.train()

    def _batch(self, cfg: Config) -> tuple:
        data = generate(cfg, self.settings.batch_size,
                        self.settings.image_size)
        if cfg.default_scope == 'mmpretrain':
            # As its default collation does.
            data['inputs'] = torch.stack(data['inputs'])
        data = self.model.data_preprocessor(data, True)
        data['inputs'] = data['inputs'].to(DTYPES[self.settings.dtype])
        return (data, )

    def try_step(self) -> None:
        """One forward and backward, so that what is impossible is said once
        and early, caches are filled, and products are counted.

        Raises:
            PEFTError: If the model does not run on what was generated.
        """
        height, width = self.settings.image_size
        with explained(
                f'does not run a step on generated images of {height} x '
                f'{width}', self.model, self.settings):
            # Some methods choose what trains by a look at the images.
            calibrate(self.trained, [self.inputs],
                      lambda model, inputs: self.loss_of(model(*inputs)),
                      lambda model, inputs: None)
            step = TrainStep(
                self.trained,
                *self.inputs,
                autocast=self.settings.autocast,
                loss=self.loss_of)
            with FlopCounter() as counter:
                loss = self.loss_of(step.forward())
                if loss.requires_grad:
                    loss.backward()
            #: Operations of the products of a step.
            self.flops = counter.flops
            self.trained.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer(self, model: Optional[nn.Module] = None) -> Any:
        """Outputs for inference, without what follows the network."""
        settings = self.settings
        model = self.model if model is None else model
        with torch.autocast(
                torch.device(settings.device).type,
                settings.autocast,
                enabled=settings.amp is not None):
            if self.whole:
                return model(**self.inputs[0], mode='tensor')
            return model(*self.inputs)

    def why_no_latency(self) -> Optional[str]:
        """None if the model runs for inference without what follows the
        network, as a few detectors do not."""
        self.model.eval()
        try:
            self.infer()
        except Exception as error:
            line = ' '.join(str(error).split())[:300]
            return f'{type(error).__name__}: {line}'
        finally:
            self.model.train()
        return None

    def copy(self) -> nn.Module:
        """The model in evaluation mode, to be merged or folded."""
        model = copy.deepcopy(self.model)
        model.eval()
        return model


@contextmanager
def explained(what: str, model: Any, settings: Settings) -> Iterator[None]:
    """Turn the error of a library into one sentence.

    Raises:
        PEFTError: If anything is raised inside.
    """
    try:
        yield
    except PEFTError:
        raise
    except Exception as error:
        name = model if isinstance(model, str) else type(model).__name__
        line = ' '.join(str(error).split())[:300]
        way_out = 'try another config or --image-size' \
            if settings.backbone_only else \
            'measure the backbone with --backbone-only'
        raise PEFTError(f'{name} {what} ({type(error).__name__}: {line}); '
                        f'{way_out}.') from error


class WithLoss(nn.Module):
    """A detector, segmentor or classifier that returns its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> Tensor:
        """The weighted sum of all losses."""
        return self.model.parse_losses(self.model(**batch, mode='loss'))[0]


def build_backbone(cfg: Config, at: str) -> nn.Module:
    """The backbone of a config, without what is around it."""
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(node_at(cfg, at))


def node_at(cfg: Config, at: str) -> dict:
    """The part of a config at a path such as ``model.backbone``."""
    node: Any = cfg
    for key in at.split('.'):
        node = node[int(key) if isinstance(node, list) else key]
    return node


def set_checkpointing(cfg: Config, at: str) -> None:
    """Turn on ``with_cp`` of a backbone, in place.

    Raises:
        PEFTError: If the stock class has no such argument.
    """
    node = node_at(cfg, at)
    name = node.get('stock', node['type'])
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        cls = MODELS.get(name) if isinstance(name, str) else name
    if not any('with_cp' in inspect.signature(base.__init__).parameters
               for base in cls.__mro__):
        raise PEFTError(f'{cls.__name__} has no with_cp, so there is no '
                        'checkpointing to measure; leave out --with-cp.')
    node['with_cp'] = True


def _share(model: nn.Module, base: nn.Module) -> None:
    """Weights of the base: copied where they train, else the same tensors, so
    that many models fit into memory."""
    theirs = dict([*base.named_parameters(), *base.named_buffers()])
    for name, own in [*model.named_parameters(), *model.named_buffers()]:
        if name not in theirs:
            continue
        if isinstance(own, nn.Parameter) and not own.requires_grad:
            own.data = theirs[name].data
        else:
            own.data.copy_(theirs[name].data)
