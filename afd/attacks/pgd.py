"""Projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from afd import ops
from afd.attacks.base import GradientAttack, Piece, not_negative


class PGD(GradientAttack):
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
        loss: "ce", "dlr" (not targeted) or "margin", summed over samples.
        bounds: lowest and highest value of an image.
        seed: of the random start; the same seed gives the same result.
        precision: "fp32", "bf16" (the model runs in bfloat16, everything else in float32), or "auto" (bfloat16 where
            the device multiplies it in hardware).
        piece: rows attacked together on a CPU; by default as many as keep the model's activations in its caches.

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
        precision: str = "fp32",
        piece: int | None = None,
    ) -> None:
        super().__init__(
            model, norm=norm, eps=eps, steps=steps, targeted=targeted, loss=loss, bounds=bounds, seed=seed,
            precision=precision, piece=piece,
        )  # fmt: skip
        not_negative("alpha", alpha)
        self.alpha, self.random_start = alpha, random_start

    def _run(self, piece: Piece) -> Tensor:
        x, ball = piece.x, self._ball(piece)
        if self.random_start:
            x_adv = ops.random_start(x, seed=piece.seed, first_sample=piece.first_sample, **ball)
        else:
            x_adv = x.clone()
        alpha = piece.of(-self.alpha if self.targeted else self.alpha)
        for _ in range(self.steps):
            grad, _, _ = self._ascent(x_adv, piece)
            ops.pgd_step_(x_adv, x, grad, alpha=alpha, **ball)
        return x_adv
