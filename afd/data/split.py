"""Cutting a part from labelled data, the same one on every machine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions that stay and positions held out, the held-out part drawn class by class.

    Args:
        labels: int64 [N].
        fraction: part of every class to hold out, in (0, 1), to the nearest image: at least one image of a class is
            held out and at least one stays, unless the class has a single image, which stays.
        seed: which draw; the same labels, fraction and seed give the same positions on every machine and version.

    Returns:
        Two int64 tensors of ascending positions, disjoint, together all of [0, N).
    """
    # NumPy promises that RandomState's streams never change; torch and newer NumPy generators do not. Were the split to
    # move, a saved model's validation score would be measured on its own training images.
    order = np.random.RandomState(seed).permutation(len(labels))
    classes = labels.cpu().numpy()[order]
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(classes):
        members = order[classes == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[:count]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """Positions of `count` images, drawn class by class in proportion, ascending; of all where there are no more.

    Args:
        labels: int64 [N].
        count: of images, at least 1. Every class is among them if there are as many classes or fewer.
        seed: which draw, as for `stratified`; of two counts, the smaller one's images are among the larger one's.
    """
    order = np.random.RandomState(seed).permutation(len(labels))
    classes = labels.cpu().numpy()[order]
    share = np.zeros(len(labels))  # of its class that comes before an image
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        share[members] = np.arange(len(members)) / len(members)
    first = np.lexsort((classes, share))[:count]
    return torch.from_numpy(np.sort(order[first]))
