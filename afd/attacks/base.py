"""What gradient attacks share: their common settings, and a checked batch on a model that is left as it was found."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from afd.attacks import engine, execution
from afd.attacks.inputs import check_batch
from afd.attacks.losses import loss_named
from afd.errors import InputError, at_least
from afd.ops import checks


@dataclass(frozen=True)
class Piece:
    """Rows of a batch that are attacked together.

    Attributes:
        x: images [N, ...] of these rows.
        y: labels [N].
        rows: which rows of the batch they are.
        seed: of random starts.
        first_sample: index of the first row in the whole data set.
        largest_label: max(y) or more, known to the host.
    """

    x: Tensor
    y: Tensor
    rows: slice
    seed: int
    first_sample: int
    largest_label: int

    def of(self, setting: float | Tensor) -> float | Tensor:
        """A setting of the batch for these rows: one number, or theirs of one per sample."""
        return setting[self.rows] if isinstance(setting, Tensor) else setting


class GradientAttack(ABC):
    """Base of the attacks: settles common settings; `_run` is the algorithm.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str,
        eps: float | Tensor,
        steps: int,
        targeted: bool,
        loss: str,
        bounds: tuple[float, float],
        seed: int,
        precision: str,
        piece: int | None,
    ) -> None:
        checks.norm(norm)
        checks.bounds(*bounds)
        checks.counter("seed", seed)
        at_least("steps", steps, 0)
        not_negative("eps", eps)
        execution.check_execution(precision, piece)
        self.model, self.norm, self.eps, self.steps = model, norm, eps, steps
        self.targeted, self.bounds, self.seed = targeted, bounds, seed
        self.precision, self.piece = precision, piece
        self.loss = loss_named(loss, targeted=targeted)

    @classmethod
    def partial(cls, **settings: Any) -> Callable[[nn.Module], Self]:
        """The attack with everything settled but its model."""
        return functools.partial(cls, **settings)

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """Adversarial images.

        Args:
            x: images [N, ...], float32 in `bounds`.
            y: labels [N] int64; the class to reach if `targeted`.
            seed: overrides the attack's own for this call.
            first_sample: index of x's first row in the whole data set, so that batches of any size start alike.

        Returns:
            [N, ...] like x, within eps of it and within bounds.

        Raises:
            InputError, InputTypeError: x or y is not as described, or a label is not one of the model's classes.
        """
        largest_label = check_batch(x, y, self.bounds)
        x_adv = torch.empty_like(x)
        if x.shape[0] == 0:
            return x_adv
        seed = self.seed if seed is None else seed
        with engine.evaluating(self.model):
            for rows in execution.pieces(self.model, x, self.piece):
                images = execution.channels_last(x[rows])
                x_adv[rows] = self._run(Piece(images, y[rows], rows, seed, first_sample + rows.start, largest_label))
        return x_adv

    def perturb(self, x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """The same as calling the attack."""
        return self(x, y, seed=seed, first_sample=first_sample)

    @abstractmethod
    def _run(self, piece: Piece) -> Tensor:
        """The algorithm on a checked piece that is not empty, its model in evaluation mode, without autograd."""

    def _ball(self, piece: Piece) -> dict[str, Any]:
        """Where the iterates may lie, in the words of the ops."""
        return {"eps": piece.of(self.eps), "bounds": self.bounds, "norm": self.norm}

    def _ascent(self, x_adv: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient, losses and logits at x_adv, with the model in the attack's precision."""
        with execution.autocast(self.precision, x_adv.device):
            return engine.loss_gradient(self.model, self.loss, x_adv, piece.y, piece.largest_label)


def not_negative(name: str, setting: float | Tensor) -> None:
    """Raises InputError unless a setting, or the least of one per sample, is a finite number >= 0."""
    least = float(setting.min()) if isinstance(setting, Tensor) and setting.numel() else setting
    if isinstance(least, Tensor):
        raise InputError(f"{name} is an empty tensor; it must be a number or one value per sample")
    at_least(name, least, 0.0)
