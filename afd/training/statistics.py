"""BatchNorm statistics of averaged weights, computed anew over the training images.

An average of running statistics lags behind the averaged weights, and the live model's are of other weights; what the
averaged model itself meets is known by a pass of it (Izmailov et al. 2018, `torch.optim.swa_utils.update_bn`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from afd.attacks.inputs import outside_inference
from afd.data.images import images_and_labels
from afd.nn.modes import evaluating
from afd.runtime import Group
from afd.training import loader_state
from afd.training.data import ResumableLoader


def tracking(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, loader: ResumableLoader, group: Group, each: Callable[[int], None] = lambda _images: None
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
    """
    layers = tracking(model)
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
