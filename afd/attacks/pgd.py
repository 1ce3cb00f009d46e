"""Projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from afd import ops
from afd.attacks import inputs
from afd.attacks.base import GradientAttack
from afd.attacks.execution import Running
from afd.attacks.piece import Piece
from afd.errors import InputError


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
        loss: "ce", "margin", or, untargeted, "dlr", "dlr-targeted" (at the likeliest other class) or "kl" (TRADES: from
            the clean prediction, y unused); summed over samples.
        bounds: lowest and highest value of an image.
        seed: of the random start; the same seed gives the same result.
        precision: "fp32", "bf16" (the model runs in bfloat16, everything else in float32), or "auto" (bfloat16 where
            the device multiplies it in hardware).
        piece: rows attacked together on a CPU; by default as many as keep the model's activations in its caches, or
            all where a forward hook of yours looks on.
        look: check the values of x, y and the model's outputs, which waits for the device before the first step and
            after the last; False is for loops that see to that themselves (a label that is no class is then an error
            of torch's, or, -100 with "ce", one that the loss leaves out).
        fold: let convolutions do the work of the BatchNorm behind them, which changes rounding only
            (`afd.attacks.joining`).

    On CUDA all steps are recorded in one graph and replayed (`afd.attacks.replay`). `torch.compile(model)` may be
    attacked like any other model.

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
        **running: Unpack[Running],
    ) -> None:
        super().__init__(
            model, norm=norm, eps=eps, steps=steps, targeted=targeted, loss=loss, bounds=bounds, seed=seed,
            **running,
        )  # fmt: skip
        self.alpha, self.random_start = inputs.size("alpha", alpha), inputs.truth("random_start", random_start)
        if loss == "kl" and not random_start:
            raise InputError("loss is 'kl', whose gradient at the image itself is 0; it needs a random start")

    def _run(self, piece: Piece) -> Tensor:
        if self.random_start:
            x_adv = ops.random_start(piece.x, seed=piece.seed, first_sample=piece.first_sample, **self._ball(piece))
        else:
            x_adv = piece.x.clone()
        (x_adv,) = self._climbed(self._climb, self._aimed(piece), x_adv)
        return x_adv

    def _climb(self, piece: Piece, x_adv: Tensor) -> tuple[Tensor]:
        ball, alpha = self._ball(piece), piece.of(-self.alpha if self.targeted else self.alpha)
        for step in range(self.steps):
            grad, _, _ = self._ascent(x_adv, piece, step)
            ops.pgd_step_(x_adv, piece.x, grad, alpha=alpha, **ball)
        return (x_adv,)
