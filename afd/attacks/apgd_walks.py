"""How Auto-PGD moves, norm by norm: its step, and what it does when it looks back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from afd import ops
from afd.attacks.apgd_state import APGDState
from afd.attacks.piece import rows_of, take

MOMENTUM = 0.75  # the weight a of the gradient step after the first iteration
FIRST_SPARSITY, SPARSER, SETTLED = 0.2, 1.5, 0.95
SHORTER, SHORTEST = 1.5, 10.0


class Walk(ABC):
    """The way of one run around the images x.

    Args:
        x: images [N, ...].
        ball: where it may go, in the words of the ops.
        steps: how many it will take.

    Attributes:
        intervals: for each step, the iterations since the last checkpoint of `ops.apgd_update_` if it is one, else 0.
    """

    def __init__(self, x: Tensor, ball: dict[str, Any], steps: int) -> None:
        self.x, self.ball, self.steps = x, ball, steps
        self.intervals = [0] * steps

    @property
    def eps(self) -> Tensor:
        """The radius of each sample, [N]."""
        eps = self.ball["eps"]
        return eps if isinstance(eps, Tensor) else self.x.new_full(self.x.shape[:1], eps)

    @abstractmethod
    def first_step(self) -> Tensor:
        """Step sizes to begin with, [N]."""

    @abstractmethod
    def move_(self, x_adv: Tensor, grad: Tensor, step: Tensor) -> None:
        """Takes x_adv one step along the gradient."""

    @abstractmethod
    def look_back_(self, iteration: int, x_adv: Tensor, grad: Tensor, state: APGDState) -> None:
        """What else happens after the update of iteration 1 ... steps."""

    def take(self, kept: Tensor) -> Self:
        """The same walk on the samples that the indices `kept` name."""
        other = object.__new__(type(self))
        eps = self.ball["eps"]
        vars(other).update({k: take(v, kept) if isinstance(v, Tensor) else v for k, v in vars(self).items()})
        other.ball = {**self.ball, "eps": eps[kept] if isinstance(eps, Tensor) else eps}
        return other


class MomentumWalk(Walk):
    """In Linf and L2: momentum, and steps that `ops.apgd_update_` halves at ever closer checkpoints."""

    def __init__(self, x: Tensor, ball: dict[str, Any], steps: int, x_adv: Tensor) -> None:
        super().__init__(x, ball, steps)
        self.x_adv_old, self.a = x_adv.clone(), 1.0
        self.intervals = checkpoint_intervals(steps)

    def first_step(self) -> Tensor:
        """See `Walk`."""
        return 2 * self.eps

    def move_(self, x_adv: Tensor, grad: Tensor, step: Tensor) -> None:
        """See `Walk`."""
        if self.ball["norm"] == "Linf":
            ops.apgd_step_(x_adv, self.x_adv_old, self.x, grad, step=step, a=self.a, **self.ball)
        else:
            z = ops.pgd_step(x_adv, self.x, grad, alpha=step, **self.ball)
            mixed = ops.momentum_point(x_adv, self.x_adv_old, z, self.a)
            self.x_adv_old.copy_(x_adv)
            x_adv.copy_(ops.project_(mixed, self.x, **self.ball))
        self.a = MOMENTUM

    def look_back_(self, iteration: int, x_adv: Tensor, grad: Tensor, state: APGDState) -> None:
        """See `Walk`."""


class SparseWalk(Walk):
    """In L1 (Croce & Hein, "Mind the box", ICML 2021): steps on ever fewer elements, without momentum.

    `left` is the point that another run has left, if it goes on from one.

    Every 4% of the steps the number k of elements that the best point moves is counted. The next steps move k / 1.5;
    where k fell by 5% or more, they go back to the best point and to the first step size, eps; elsewhere the step
    shrinks by 1.5, down to eps / 10.
    """

    def __init__(self, x: Tensor, ball: dict[str, Any], steps: int, left: Tensor | None) -> None:
        super().__init__(x, ball, steps)
        if left is not None:
            self._follow(left)
        else:
            self.moved = torch.full_like(self.eps, x[0].numel())
            self.sparsity = torch.full_like(self.eps, FIRST_SPARSITY)

    def first_step(self) -> Tensor:
        """See `Walk`."""
        return self.eps.clone()

    def move_(self, x_adv: Tensor, grad: Tensor, step: Tensor) -> None:
        """See `Walk`."""
        ops.pgd_step_(x_adv, self.x, grad, alpha=step, sparsity=self.sparsity, **self.ball)

    def look_back_(self, iteration: int, x_adv: Tensor, grad: Tensor, state: APGDState) -> None:
        """See `Walk`."""
        if iteration % max(int(0.04 * self.steps), 1):
            return
        before = self.moved
        self._follow(state.x_best)
        sparser = self.moved < SETTLED * before
        shorter = torch.maximum(state.step / SHORTER, self.eps / SHORTEST)
        state.step.copy_(torch.where(sparser, self.eps, shorter))
        rows = rows_of(sparser, x_adv)
        x_adv.copy_(torch.where(rows, state.x_best, x_adv))
        grad.copy_(torch.where(rows, state.grad_best, grad))

    def _follow(self, point: Tensor) -> None:
        self.moved = (point != self.x).flatten(1).sum(1).to(self.eps.dtype)
        self.sparsity = self.moved / (self.x[0].numel() * SPARSER)


def checkpoint_intervals(steps: int) -> list[int]:
    """For each iteration 1 ... steps, 0, or at a checkpoint the number of iterations since the one before.

    The first interval is 0.22 of the steps; each is 0.03 of them shorter than the last, but at least 0.06 of them.
    """
    interval, decrease, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, since = [], 0
    for _ in range(steps):
        since += 1
        at_checkpoint = since == interval
        marks.append(interval if at_checkpoint else 0)
        if at_checkpoint:
            interval, since = max(interval - decrease, least), 0
    return marks
