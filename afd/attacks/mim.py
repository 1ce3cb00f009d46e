"""The momentum iterative method (Dong et al. 2018)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from afd import ops
from afd.attacks import inputs
from afd.attacks.base import GradientAttack
from afd.attacks.execution import Running, check_running
from afd.attacks.piece import Piece
from afd.errors import InputError


class MIM(GradientAttack):
    """Steps of steepest ascent along g ← decay * g + ∇ / mean|∇|, from x, inside the ball of radius eps.

    The paper divides by the sum of |∇| instead of its mean; the direction of g is the same. Each gradient is divided
    by its largest magnitude first, so that tiny and huge ones count alike; one that is zero adds nothing. NaN counts as
    0 and infinity as the largest number. The model is treated as `PGD` treats it.

    Args:
        model: classifier, images -> logits [N, classes].
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball, in units of the image; a float >= 0 or one per sample [N].
        alpha: step size, in units of the image; a float >= 0 or one per sample [N].
        steps: number of steps, >= 0.
        decay: μ, of the gathered gradient, >= 0.
        targeted: y is the class to reach, and the loss is descended.
        loss: as in `PGD`.
        bounds: lowest and highest value of an image.
        running: precision, piece, look and fold, as in `PGD`.

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
        decay: float = 1.0,
        targeted: bool = False,
        loss: str = "ce",
        bounds: tuple[float, float] = (0.0, 1.0),
        **running: Unpack[Running],
    ) -> None:
        check_running(running)
        super().__init__(
            model, norm=norm, eps=eps, steps=steps, targeted=targeted, loss=loss, bounds=bounds, seed=0,
            **running,
        )  # fmt: skip
        if loss == "kl":
            raise InputError("loss is 'kl', whose gradient at the image itself is 0; it needs a random start")
        self.alpha, self.decay = inputs.size("alpha", alpha), inputs.number("decay", decay, 0.0)

    def _run(self, piece: Piece) -> Tensor:
        (x_adv,) = self._climbed(self._climb, self._aimed(piece), piece.x.clone())
        return x_adv

    def _climb(self, piece: Piece, x_adv: Tensor) -> tuple[Tensor]:
        ball, alpha = self._ball(piece), piece.of(-self.alpha if self.targeted else self.alpha)
        gathered = torch.zeros_like(x_adv)
        for step in range(self.steps):
            grad, _, _ = self._ascent(x_adv, piece, step)
            gathered.mul_(self.decay).add_(_of_mean_one(grad))
            ops.pgd_step_(x_adv, piece.x, gathered, alpha=alpha, **ball)
        return (x_adv,)


def _of_mean_one(grad: Tensor) -> Tensor:
    """Each sample's gradient scaled to a mean magnitude of 1; zero stays zero, and NaN spoils nothing else."""
    grad = grad.nan_to_num()
    images = tuple(range(1, grad.dim()))
    largest = grad.abs().amax(images, keepdim=True)
    scaled = grad / largest.where(largest > 0, torch.ones_like(largest))
    mean = scaled.abs().mean(images, keepdim=True)
    return scaled / mean.where(mean > 0, torch.ones_like(mean))
