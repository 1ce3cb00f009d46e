"""A second look at every adversarial image that was saved: another batch size, in float32, nothing remembered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.attacks.strangers import inside
from afd.evaluation.runner import Runner
from afd.evaluation.target import distance, within


@dataclass(frozen=True)
class Verification:
    """What the second look found.

    Attributes:
        images: adversarial images looked at.
        standing: of these, how many the model gets right this time.
        outside: of these, how many are not in the ball, or not in [0, 1].
        batch_size: of the second look.
    """

    images: int
    standing: int
    outside: int
    batch_size: int


def other_batch_size(batch_size: int) -> int:
    """A batch size that pairs other images with each other: an odd one, about a third of the first."""
    return batch_size // 3 | 1 if batch_size > 3 else batch_size + 1


def verify(runner: Runner) -> Verification:
    """Looks again at what all processes saved, each at its own part."""
    size = other_batch_size(runner.batch_size)
    totals = torch.zeros(3, dtype=torch.int64, device="cpu")
    for x_adv, y, outside in _chunks(runner, size):
        standing = runner.predict(x_adv).classes == y
        totals += torch.tensor([len(y), int(standing.sum()), int(outside.sum())], device="cpu")
    images, standing, outside = runner.place.total(totals).tolist()
    return Verification(images, standing, outside, size)


def _chunks(runner: Runner, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Adversarial images, labels, and whether they lie outside of what is allowed, in batches of that size."""
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    count = 0
    for part in _saved(runner):
        held.append(part)
        count += len(part[1])
        if count < size:
            continue
        whole = [torch.cat(tensors) for tensors in zip(*held, strict=True)]
        full = count // size * size
        for start in range(0, full, size):
            x_adv, y, outside = (tensor[start : start + size] for tensor in whole)
            yield x_adv, y, outside
        x_adv, y, outside = (tensor[full:] for tensor in whole)
        held, count = [(x_adv, y, outside)], count - full
    if count:
        x_adv, y, outside = (torch.cat(tensors) for tensors in zip(*held, strict=True))
        yield x_adv, y, outside


def _saved(runner: Runner) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What each unit saved."""
    device = runner.images.device
    for number, stage, positions, unit in runner.saved():
        if not len(unit.rows):
            continue
        index = (unit.rows + number * runner.batch_size).to(device)
        x_adv = unit.images.to(device)
        legal = inside(x_adv)
        if not stage.minimal:
            eps = float(stage.epsilons[positions[-1]])
            legal &= within(distance(x_adv, runner.images.images(index), stage.norm), eps)
        yield x_adv, runner.images.labels[index], ~legal
