"""After an epoch: validation images classified, and BatchNorm statistics of averaged weights computed anew.

An average of running statistics lags behind the averaged weights, and the live model's are of other weights; what the
averaged model itself meets is known by a pass of it (Izmailov et al. 2018, `torch.optim.swa_utils.update_bn`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from afd.attacks import Attack
from afd.attacks.diagnostics import COULD_NOT_AIM
from afd.attacks.inputs import outside_inference
from afd.data.images import images_and_labels
from afd.errors import InputError, ModelWarning, warn_caller
from afd.metrics import accuracy
from afd.nn.modes import evaluating
from afd.runtime import Group
from afd.training import loader_state
from afd.training.data import Loader, ResumableLoader, checked


def shared_accuracy(
    model: nn.Module,
    batches: Loader,
    attack: Attack | None,
    group: Group,
    num_classes: int | None = None,
    each: Callable[[int], None] | None = None,
) -> float:
    """Share of images classified correctly, batches dealt out to the processes one by one.

    An attack starts at each image as it would in one process. All processes must ask.

    Args:
        model: images [N, ...] -> logits.
        batches: as described in `Loader`, the same in all processes.
        attack: on the model; None for clean images.
        group: of the processes; its device is the model's.
        num_classes: labels are below it; None if nobody knows.
        each: called after each batch, in every process, with the number of its images.

    Raises:
        InputError, InputTypeError: there are no images, or a batch is not as described in `Loader`.
        ModelError: the model returned NaN.

    Warns:
        ModelWarning: images at which the attack could not aim, and which count as robust for that.
    """
    correct, seen, blind = 0.0, 0, 0
    for number, item in enumerate(batches):
        x, y = checked("validation", item, num_classes, batches)
        if number % group.size == group.rank:
            started = None if attack is None else partial(_shifted, attack, seen)
            with warnings.catch_warnings():  # said once for all batches, below
                warnings.filterwarnings("ignore", f".*{COULD_NOT_AIM}", ModelWarning)
                correct += accuracy(model, [(x.to(group.device), y.to(group.device))], started) * len(y)
            blind += _blind(attack)
        seen += len(y)
        if each is not None:
            each(len(y))
    if not seen:
        raise InputError("validation holds no images")
    counts = torch.tensor([round(correct), blind], dtype=torch.float64, device=group.device)
    right, blind = map(int, group.sum(counts).tolist())
    if blind and group.leads:
        warn_caller(
            f"for {blind} of {seen} images the gradient of the loss was exactly zero or NaN wherever the attack "
            f"looked, so {COULD_NOT_AIM}: that they withstand it shows no robustness",
            ModelWarning,
        )
    return right / seen


def _blind(attack: Attack | None) -> int:
    """At how many images an attack of ours could not aim in its last call."""
    report = getattr(attack, "report", None)
    return 0 if report is None else int(report.blind.sum())


def _shifted(
    attack: Attack,
    offset: int,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    seed: int | None = None,
    first_sample: int = 0,
) -> torch.Tensor:
    return attack(x, y, seed=seed, first_sample=offset + first_sample)


# --- BatchNorm statistics of an average ---------------------------------------------------------------------------


def tracking(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    loader: ResumableLoader,
    group: Group,
    each: Callable[[int], None] = lambda _images: None,
    followed: nn.Module | None = None,
) -> None:
    """Has BatchNorm layers keep the mean of the statistics of all training batches, instead of what they keep.

    One pass over the batches of the epoch, in evaluation mode but for these layers, which normalise by each batch: the
    arithmetic of `torch.optim.swa_utils.update_bn`. Each of several processes passes its own batches, and all keep the
    mean of their means and variances: as many batches each, so that it is the mean over all parts of batches (or, with
    synchronised layers, over joint batches). The loader is as if nobody had looked.

    Args:
        model: images [N, ...] -> anything; all else in it stays as it is.
        loader: of the training batches.
        group: of the processes, which all ask.
        each: called after each batch with the number of its images.
        followed: the model that this is the average of, in training mode; what is frozen there stays as it is.
    """
    layers = tracking(model)
    if followed is not None:
        trains = {name for name, layer in followed.named_modules() if layer.training}
        layers = [layer for name, layer in model.named_modules() if layer in layers and name in trains]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    with evaluating(model, keep=layers), loader_state.untouched(loader.loader):
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.train()
                layer.momentum = None  # a cumulative mean
            loader_state.begin_anew({"train": loader.loader})
            for item in islice(loader.loader, loader.steps // loader.repeats):
                x = images_and_labels(item, loader.labels)[0]
                model(outside_inference(x.to(loader.device, non_blocking=True)))
                each(len(x))
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    for layer in layers:
        for kept in (layer.running_mean, layer.running_var):
            assert isinstance(kept, Tensor)
            kept.copy_(group.mean(kept))
