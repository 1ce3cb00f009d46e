"""Mixup and CutMix: the images of a batch mixed with one another, and their labels with them, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from afd.attacks.inputs import check_classes, check_rows
from afd.errors import InputError, number, whole

KEY = 0x6D6978  # keeps its draws apart from all others of the same seed


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019), or one of them at half the time, as in timm.

    A batch's two neighbours are partners, row 2k and row 2k + 1, and each becomes a mixture of both: mixup's images are
    ``λ x + (1 - λ) x_partner``; CutMix pastes a box of the partner's image, of area 1 - λ where the border does not cut
    it off, and λ is then what is left of the image. Labels are ``λ y + (1 - λ) y_partner`` in both. Batches are
    shuffled, so partners are random ones.

    λ ~ Beta(α, α), the box, and which of the two it is are drawn once a batch, on the host, from the seed and the step
    alone: processes that hold rows of one joint batch draw alike, and a run that goes on needs no state. Each process
    mixes its own rows. A row whose partner it does not hold stays as it is: the last one of an odd batch, and, where
    processes have an odd number of rows each, the two on both sides of the border, which one process would mix.

    Attributes:
        mixup: α of mixup's Beta distribution; 0 for no mixup.
        cutmix: α of CutMix's Beta distribution; 0 for no CutMix.

    Raises:
        InputError, InputTypeError: one is no finite number of at least 0.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        number("mixup", self.mixup, 0.0)
        number("cutmix", self.cutmix, 0.0)

    @property
    def active(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def check(self, x: Tensor, y: Tensor | None) -> None:
        """Finds that batches like this one can be mixed; reads no value.

        Raises:
            InputError: there are no labels to mix, or no boxes in such images.
        """
        if self.active and y is None:
            raise InputError("y is None; mixup and CutMix need labels to mix")
        if self.cutmix > 0 and x.dim() != 4:
            raise InputError(f"x has shape {list(x.shape)}; CutMix needs images [N, C, H, W]")

    @torch.no_grad()
    def __call__(
        self, x: Tensor, y: Tensor, num_classes: int, *, seed: int, step: int = 0, first_sample: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Mixed images, laid out like x, and soft labels [N, num_classes] of x's dtype; new tensors, no gradients.

        Nothing here waits for the device.

        Args:
            x: images [N, ...], floating; for CutMix [N, C, H, W].
            y: classes [N] int64, or soft labels [N, num_classes].
            num_classes: K.
            seed: of the run, at least 0.
            step: number of the batch, at least 0.
            first_sample: index of the first row in the joint batch of all processes.

        Raises:
            InputError, InputTypeError: an argument is not as described.
        """
        whole("seed", seed, 0)
        whole("step", step, 0)
        self.check(x, y)
        labels = _soft(x, y, num_classes)
        partner = _partners(len(x), first_sample, x.device)
        stream = _stream(seed, step)
        cuts = self.cutmix > 0 and (self.mixup == 0 or stream.random_sample() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = float(stream.beta(alpha, alpha)) if alpha > 0 else 1.0
        if cuts:
            rows, columns = _box(share, x.shape[2], x.shape[3], stream)
            share = 1 - len(rows) * len(columns) / (x.shape[2] * x.shape[3])
            mixed = x.clone()
            box = (..., slice(rows.start, rows.stop), slice(columns.start, columns.stop))
            mixed[box] = x[box].index_select(0, partner)
        else:
            mixed = torch.lerp(x.index_select(0, partner), x, share, out=torch.empty_like(x))
        return mixed, torch.lerp(labels.index_select(0, partner), labels, share)


def _soft(x: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Labels as shares of the classes, [N, num_classes], of the dtype of x."""
    if not (y.dim() == 2 and y.is_floating_point()):
        check_classes(x, y)
        return torch.zeros(len(y), num_classes, dtype=x.dtype, device=x.device).scatter_(1, y[:, None], 1.0)
    check_rows("y", y, x)
    if y.shape[1] != num_classes:
        raise InputError(f"y has shape {list(y.shape)}; soft labels of {num_classes} classes are [N, {num_classes}]")
    return y.to(x.dtype)


def _partners(rows: int, first: int, device: torch.device) -> Tensor:
    """The row that each is mixed with, int64 [rows]: its own where its partner in the joint batch is not among them."""
    own = torch.arange(first, first + rows, device=device)
    other = own ^ 1
    here = (other >= first) & (other < first + rows)
    return torch.where(here, other, own) - first


def _stream(seed: int, step: int) -> np.random.RandomState:
    """The draws of one batch. NumPy promises that RandomState's streams never change."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(step, KEY))))


def _box(share: float, height: int, width: int, stream: np.random.RandomState) -> tuple[range, range]:
    """Rows and columns of CutMix's box: 1 - share of the image around a random centre, cut off at the border."""
    side = math.sqrt(1 - share)
    spans = []
    for length in (height, width):
        half, centre = int(length * side) // 2, int(stream.randint(length))
        spans.append(range(max(centre - half, 0), min(centre + half, length)))
    return spans[0], spans[1]
