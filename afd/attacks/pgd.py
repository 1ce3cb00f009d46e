"""Projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from torch import Tensor, nn

from afd import ops
from afd.attacks import starts
from afd.attacks.base import GradientAttack
from afd.attacks.execution import Running
from afd.attacks.losses import Value
from afd.attacks.piece import Piece
from afd.attacks.settings import BatchNormMode, Init, LossName, Norm, OutputsName, PGDSettings, step_size


class PGD(GradientAttack):
    """`steps` steps of steepest ascent inside the ball of radius eps around each image.

    The model runs in evaluation mode (its BatchNorm layers as `batchnorm` says) with its parameters frozen and is left
    exactly as it was found. Images live in `bounds`; any normalisation belongs inside the model.

    Args:
        model: classifier, images -> logits [N, classes].
        norm, eps, alpha, steps, random_start, targeted, loss, bounds, seed, init, start_scale, outputs, batchnorm: see
            `afd.attacks.PGDSettings`; a step size that is not given is 2/255 here.
        running: precision, piece, look and fold; likewise.

    On CUDA all steps are recorded in one graph and replayed (`afd.attacks.replay`). `torch.compile(model)` may be
    attacked like any other model.

    Raises:
        InputTypeError: the model is no module, or a setting of another type.
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Norm = "Linf",
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor | None = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        targeted: bool = False,
        loss: LossName | Value = "ce",
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        init: Init = "uniform",
        start_scale: float | None = None,
        outputs: OutputsName = "logits",
        batchnorm: BatchNormMode = "eval",
        **running: Unpack[Running],
    ) -> None:
        settings = PGDSettings(
            norm=norm, eps=eps, alpha=alpha, steps=steps, random_start=random_start, targeted=targeted, loss=loss,
            bounds=bounds, seed=seed, init=init, start_scale=start_scale, outputs=outputs, batchnorm=batchnorm,
            **running,
        )  # fmt: skip
        super().__init__(model, settings, steps=settings.steps, seed=settings.seed)
        self._alpha, self.random_start = settings.alpha, settings.random_start
        self.init, self.start_scale = settings.init, settings.start_scale

    @property
    def alpha(self) -> float | Tensor:
        """The step size; where none was set, that which goes with eps and steps as they are now."""
        return step_size(self._alpha, self.eps, self.steps)

    @alpha.setter
    def alpha(self, value: float | Tensor | None) -> None:
        self._alpha = value

    def _run(self, piece: Piece) -> Tensor:
        if piece.start is not None:
            x_adv = piece.start
        elif self.random_start:
            x_adv = starts.drawn(self.init, self.start_scale, piece, self._ball(piece))
        else:
            x_adv = piece.x.clone()
        if not self.steps and (piece.start is not None or self.init == "gaussian"):  # no step will project it
            ops.project_(x_adv, piece.x, **self._ball(piece))
        (x_adv,) = self._climbed(self._climb, self._aimed(piece), x_adv)
        return x_adv

    def _climb(self, piece: Piece, x_adv: Tensor) -> tuple[Tensor]:
        ball, alpha = self._ball(piece), piece.of(self.alpha, -1.0 if self.targeted else 1.0)
        direction = self._directions(x_adv)
        for step in range(self.steps):
            grad, _, _ = self._ascent(x_adv, piece, step)
            ops.pgd_step_(x_adv, piece.x, direction(grad), alpha=alpha, **ball)
        return (x_adv,)

    def _directions(self, _x_adv: Tensor) -> Callable[[Tensor], Tensor]:
        """What is told the gradient at each point of a climb, and says along what the next step ascends."""
        return lambda grad: grad
