"""Auto-PGD (Croce & Hein, "Reliable evaluation of adversarial robustness", ICML 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from afd import ops
from afd.attacks.apgd_state import APGDState, checkpoint_intervals
from afd.attacks.base import GradientAttack, Piece
from afd.errors import InputError, at_least, one_of

NORMS = ("Linf", "L2")
MOMENTUM = 0.75  # the weight a of the gradient step after the first iteration


class APGD(GradientAttack):
    """PGD with momentum, whose step starts at 2 eps and is halved, sample by sample, when progress stalls.

    The model is treated as `PGD` treats it. It follows AutoAttack's implementation, with these differences: a start is
    uniform in the ball and not scaled to touch it; the first of the increases that are counted compares with the loss
    at the start, as in the paper, and not with 0; with eot_iter > 1, losses and logits are averaged like the
    gradients; a sample that no restart breaks gives the point of the highest loss, not x.

    Args:
        model: classifier, images -> logits [N, classes].
        norm: "Linf" or "L2".
        eps: radius of the ball, in units of the image; a float >= 0 or one per sample [N].
        steps: number of steps, >= 0.
        n_restarts: number of runs, >= 1, each from its own random start.
        rho: share of steps in which the loss must rise, or the step is halved; in [0, 1].
        eot_iter: evaluations of the model that are averaged at each point, >= 1; for models that draw at random.
        loss: "ce", "dlr" (not targeted, 3 classes or more) or "margin".
        seed: of the random starts; the same seed gives the same result.
        bounds: lowest and highest value of an image.
        targeted: y is the class to reach, and the loss is descended.
        precision: as in `PGD`; a success found in bfloat16 counts only where float32 confirms it.
        piece: as in `PGD`.

    The attack returns, for each sample, the last point that fooled the model in the first restart that did; else x if
    the model is wrong there; else the point of the highest loss.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        rho: float = 0.75,
        eot_iter: int = 1,
        loss: str = "ce",
        seed: int = 0,
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: bool = False,
        precision: str = "fp32",
        piece: int | None = None,
    ) -> None:
        super().__init__(
            model, norm=norm, eps=eps, steps=steps, targeted=targeted, loss=loss, bounds=bounds, seed=seed,
            precision=precision, piece=piece,
        )  # fmt: skip
        one_of("norm", norm, NORMS)
        at_least("n_restarts", n_restarts, 1)
        at_least("eot_iter", eot_iter, 1)
        if not 0 <= rho <= 1:
            raise InputError(f"rho is {rho}; it must be in [0, 1]")
        self.n_restarts, self.rho, self.eot_iter = n_restarts, rho, eot_iter

    def _run(self, piece: Piece) -> Tensor:
        x, y = piece.x, piece.y
        result, broken = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        loss_best = x.new_full(y.shape, -math.inf)
        for restart in range(self.n_restarts):
            seed = (piece.seed + restart) % 2**63
            x_adv = ops.random_start(x, seed=seed, first_sample=piece.first_sample, **self._ball(piece))
            run = self._ascend(x_adv, piece)
            fooled = run.broken
            if self.precision != "fp32":  # a success in low precision counts once the model confirms it in full
                fooled = fooled & self._fooled(self.model(run.x_best_adv), y)
            found = torch.where(_rows(fooled, x), run.x_best_adv, run.x_best)
            better = ~broken & (fooled | (run.loss_best > loss_best))
            result = torch.where(_rows(better, x), found, result)
            loss_best = torch.where(better, run.loss_best, loss_best)
            broken |= fooled
        wrong = self._fooled(self.model(x), y)
        return torch.where(_rows(wrong & ~broken, x), x, result)

    def _ascend(self, x_adv: Tensor, piece: Piece) -> APGDState:
        """One run from the start x_adv, which it overwrites."""
        x_adv_old, ball = x_adv.clone(), self._ball(piece)
        state = APGDState.before_start(x_adv, ball["eps"])
        grad, loss, fooled = self._evaluate(x_adv, piece)
        ops.apgd_update_(x_adv, grad, loss, fooled, **vars(state))
        for i, interval in enumerate(checkpoint_intervals(self.steps)):
            self._step_(x_adv, x_adv_old, piece.x, grad, state.step, MOMENTUM if i else 1.0, ball)
            grad, loss, fooled = self._evaluate(x_adv, piece)
            ops.apgd_update_(x_adv, grad, loss, fooled, **vars(state), interval=interval, rho=self.rho)
        return state

    def _step_(
        self, x_adv: Tensor, x_adv_old: Tensor, x: Tensor, grad: Tensor, step: Tensor, a: float, ball: dict[str, Any]
    ) -> None:
        """Moves x_adv along the gradient with momentum, and x_adv_old to where it was."""
        if self.norm == "Linf":
            ops.apgd_step_(x_adv, x_adv_old, x, grad, step=step, a=a, **ball)
            return
        z = ops.pgd_step(x_adv, x, grad, alpha=step, **ball)
        mixed = ops.momentum_point(x_adv, x_adv_old, z, a)
        x_adv_old.copy_(x_adv)
        x_adv.copy_(ops.project_(mixed, x, **ball))

    def _evaluate(self, x_adv: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient and loss to ascend, and whether the model is fooled: sums over eot_iter serve as well as means."""
        grad, loss, logits = self._ascent(x_adv, piece)
        for _ in range(1, self.eot_iter):
            drawn = self._ascent(x_adv, piece)
            grad, loss, logits = grad + drawn[0], loss + drawn[1], logits + drawn[2]
        if self.targeted:
            grad, loss = -grad, -loss
        if grad.stride() != x_adv.stride():  # the update overwrites it, so no element may stand for two
            grad = torch.empty_like(x_adv).copy_(grad)
        return grad, loss.to(x_adv.dtype), self._fooled(logits, piece.y)

    def _fooled(self, logits: Tensor, y: Tensor) -> Tensor:
        return (logits.argmax(1) == y) == self.targeted


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    """A mask [N] in a shape that broadcasts against x."""
    return mask.view(-1, *([1] * (x.dim() - 1)))
