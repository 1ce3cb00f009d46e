"""Projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from afd import ops
from afd.attacks import engine
from afd.attacks.inputs import check_batch
from afd.errors import InputError, at_least
from afd.ops import checks


class PGD:
    """`steps` steps of steepest ascent inside the ball of radius eps around each image.

    The model runs in evaluation mode with its parameters frozen and is left exactly as it was found. Images live in
    `bounds`; any normalisation belongs inside the model.

    Args:
        model: classifier, images -> logits [N, classes].
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball, in units of the image; a float >= 0 or one per sample [N].
        alpha: step size, in units of the image; a float >= 0 or one per sample [N].
        steps: number of steps, >= 0.
        random_start: start at a uniform point of the ball instead of at x.
        targeted: y is the class to reach, and the loss is descended.
        loss: "ce", summed over samples.
        bounds: lowest and highest value of an image.
        seed: of the random start; the same seed gives the same result.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        targeted: bool = False,
        loss: str = "ce",
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        checks.norm(norm)
        checks.bounds(*bounds)
        checks.counter("seed", seed)
        at_least("steps", steps, 0)
        _not_negative("eps", eps)
        _not_negative("alpha", alpha)
        self.model, self.norm, self.eps, self.alpha, self.steps = model, norm, eps, alpha, steps
        self.random_start, self.targeted, self.bounds, self.seed = random_start, targeted, bounds, seed
        self.loss = engine.loss_named(loss)

    @classmethod
    def partial(cls, **settings: Any) -> Callable[[nn.Module], PGD]:
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
        if x.shape[0] == 0:
            return x.clone()
        ball: dict[str, Any] = {"eps": self.eps, "bounds": self.bounds, "norm": self.norm}
        if self.random_start:
            start_seed = self.seed if seed is None else seed
            x_adv = ops.random_start(x, seed=start_seed, first_sample=first_sample, **ball)
        else:
            x_adv = x.clone()
        alpha = -self.alpha if self.targeted else self.alpha
        with engine.evaluating(self.model):
            for _ in range(self.steps):
                grad = engine.input_gradient(self.model, self.loss, x_adv, y, largest_label)
                ops.pgd_step_(x_adv, x, grad, alpha=alpha, **ball)
        return x_adv

    perturb = __call__


def _not_negative(name: str, setting: float | Tensor) -> None:
    least = float(setting.min()) if isinstance(setting, Tensor) and setting.numel() else setting
    if isinstance(least, Tensor):
        raise InputError(f"{name} is an empty tensor; it must be a number or one value per sample")
    at_least(name, least, 0.0)
