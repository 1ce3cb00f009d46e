"""The ball that an attack looks in. A norm is one class here: whatever depends on the norm, asks its ball.

The kernels of `afd.ops` know three norms by name; another one overrides `start`, `step`, `step_` and `project_`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from afd import ops
from afd.attacks.inputs import rows_of
from afd.errors import one_of

Norm = Literal["Linf", "L2", "L1"]  # the classes below, for annotations
NORMS: dict[str, type[Ball]] = {}  # by name; each class registers itself


@dataclass(frozen=True)
class Ball:
    """All images within eps of an image x in a norm, and within bounds; ``Ball("L2", 0.5)`` is an `L2`.

    Attributes:
        norm: one of `NORMS`: "Linf", "L2" or "L1".
        eps: radius, in units of the image, a number or one per sample, [N].
        bounds: lowest and highest value of an image.
        order: of the norm, p of Lp.
        sign: of the norm, in a text.
        in_levels: whether a radius may be told in grey levels, as 8/255.
        sparse: whether Auto-PGD takes steps along few elements, without momentum (`afd.attacks.apgd.SparseRun`).
        stages: of a run of Auto-PGD: radii in eps, and their shares of the steps.

    Raises:
        InputError: unknown norm.
    """

    norm: Norm
    eps: float | Tensor
    bounds: tuple[float, float] = (0.0, 1.0)

    order: ClassVar[float]
    sign: ClassVar[str]
    in_levels: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    stages: ClassVar[tuple[tuple[float, float], ...]] = ((1.0, 1.0),)

    def __init_subclass__(cls) -> None:
        """Registers a norm."""
        NORMS[cls.__name__] = cls

    def __new__(cls, norm: str | None = None, *_eps_and_bounds: Any, **_settings: Any) -> Ball:
        """Of the norm's class."""
        return super().__new__(ball_of_norm(norm) if cls is Ball else cls)

    def start(self, x: Tensor, *, seed: int | Tensor, first_sample: int | Tensor = 0) -> Tensor:
        """A random point around each image, uniform in the ball and clamped to the bounds: `ops.random_start`.

        first_sample may be the index of each image, [N] int64, which the host reads: images that follow each other in
        the data are drawn together.
        """
        if isinstance(first_sample, Tensor):
            found = torch.empty_like(x)
            for rows, first in _in_a_row(first_sample.tolist()):
                found[rows] = self.take(rows).start(x[rows], seed=seed, first_sample=first)
            return found
        return ops.random_start(
            x, eps=self.eps, seed=seed, first_sample=first_sample, bounds=self.bounds, norm=self.norm
        )

    def step(self, x_adv: Tensor, x: Tensor, grad: Tensor, alpha: float | Tensor) -> Tensor:
        """`step_` into a new tensor."""
        return ops.pgd_step(x_adv, x, grad, alpha=alpha, eps=self.eps, bounds=self.bounds, norm=self.norm)

    def step_(
        self, x_adv: Tensor, x: Tensor, grad: Tensor, alpha: float | Tensor, sparsity: float | Tensor = 0.05
    ) -> Tensor:
        """One step of steepest ascent from x_adv, of length alpha, projected, in place: `ops.pgd_step_`.

        A sparse one moves a share `sparsity` of the elements.
        """
        return ops.pgd_step_(
            x_adv, x, grad, alpha=alpha, eps=self.eps, bounds=self.bounds, norm=self.norm, sparsity=sparsity
        )

    def momentum_step_(
        self, x_adv: Tensor, x_adv_old: Tensor, x: Tensor, grad: Tensor, step: Tensor, weight: float
    ) -> None:
        """Auto-PGD's step: `step` mixed with where x_adv came from, in place; x_adv_old becomes what x_adv was."""
        mixed = ops.momentum_point(x_adv, x_adv_old, self.step(x_adv, x, grad, step), weight)
        x_adv_old.copy_(x_adv)
        x_adv.copy_(self.project_(mixed, x))

    def project_(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """x_adv moved into the ball around x and into the bounds, in place: `ops.project_`."""
        return ops.project_(x_adv, x, eps=self.eps, bounds=self.bounds, norm=self.norm)

    def radii(self, x: Tensor) -> Tensor:
        """eps of each image, [N]."""
        return self.eps if isinstance(self.eps, Tensor) else x.new_full(x.shape[:1], self.eps)

    def take(self, kept: Tensor | slice) -> Self:
        """That of the images which `kept` names, indices or a slice."""
        return replace(self, eps=self.eps[kept]) if isinstance(self.eps, Tensor) else self

    # --- Lengths ----------------------------------------------------------------------------------------------------

    @classmethod
    def distance(cls, x_adv: Tensor, x: Tensor) -> Tensor:
        """‖x_adv - x‖ of each image, float64 [N], from images [N, ...]."""
        length: Tensor = torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), cls.order, dim=1)
        return length

    @classmethod
    def diameter(cls, values: int) -> float:
        """The largest distance of two images of so many values in [0, 1]."""
        return float(values ** (1 / cls.order))

    def holds(self, lengths: Tensor) -> Tensor:
        """Whether distances [N] are at most eps, up to the rounding of float32 images: 1e-6 and 1e-5 of eps."""
        return lengths <= self.eps * (1 + 1e-5) + 1e-6

    def shorten(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """x_adv pulled back into the ball towards x, as Foolbox does, here by scaling; eps is a number.

        What lies inside stays as it is, bit for bit.
        """
        lengths = self.distance(x_adv, x)
        share = rows_of((self.eps / lengths.clamp(min=1e-30)).to(x.dtype), x)
        return torch.where(rows_of(lengths <= self.eps, x), x_adv, x + (x_adv - x) * share)


class Linf(Ball):
    """The largest of the differences."""

    order, sign, in_levels = math.inf, "L∞", True

    def momentum_step_(
        self, x_adv: Tensor, x_adv_old: Tensor, x: Tensor, grad: Tensor, step: Tensor, weight: float
    ) -> None:
        """See `Ball`: one pass over memory, `ops.apgd_step_`."""
        ops.apgd_step_(x_adv, x_adv_old, x, grad, step=step, eps=self.eps, a=weight, bounds=self.bounds, norm=self.norm)

    def shorten(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """See `Ball`, here by clamping."""
        return torch.maximum(torch.minimum(x_adv, x + self.eps), x - self.eps)


class L2(Ball):
    """The Euclidean length of the differences."""

    order, sign = 2, "L2"

    @classmethod
    def diameter(cls, values: int) -> float:
        """See `Ball`."""
        return math.sqrt(values)


class L1(Ball):
    """The sum of the differences. Steps move few elements (Croce & Hein, "Mind the box", ICML 2021)."""

    order, sign, sparse = 1, "L1", True
    stages = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


def _in_a_row(numbers: list[int]) -> Iterator[tuple[slice, int]]:
    """The stretches of a list in which each number is one more than that before, with the first number of each."""
    ends = [end for end in range(1, len(numbers)) if numbers[end] != numbers[end - 1] + 1]
    for begin, end in pairwise([0, *ends, len(numbers)]):
        yield slice(begin, end), numbers[begin]


def ball_of_norm(norm: str | None) -> type[Ball]:
    """The class of a norm by its name.

    Raises:
        InputError: unknown norm.
    """
    if not isinstance(norm, str) or norm not in NORMS:
        one_of("norm", norm, NORMS)
    return NORMS[str(norm)]
