"""What a run of Auto-PGD remembers from one iteration to the next, and what it leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from afd.attacks.piece import rows_of, take


@dataclass(frozen=True)
class APGDState:
    """What `ops.apgd_update_` keeps between iterations, in its words. The tensors change, the object does not."""

    x_best: Tensor
    grad_best: Tensor
    x_best_adv: Tensor
    loss_best: Tensor
    loss_last: Tensor
    loss_at_check: Tensor
    step: Tensor
    increases: Tensor
    reduced: Tensor
    broken: Tensor
    moves: Tensor

    @classmethod
    def before_start(cls, x_adv: Tensor, step: Tensor) -> APGDState:
        """State that the first update, at the start point, makes that of a run whose best point is the start.

        A loss that is never more than NaN leaves the start as the best point.
        """
        x_best, grad_best, x_best_adv = x_adv.clone(), torch.zeros_like(x_adv), torch.zeros_like(x_adv)
        best, last = torch.full_like(step, -math.inf), torch.full_like(step, math.inf)
        reduced, broken = torch.ones_like(step, dtype=torch.bool), torch.zeros_like(step, dtype=torch.bool)
        increases, moves = (torch.zeros_like(step, dtype=kind) for kind in (torch.int32, torch.uint8))
        return cls(x_best, grad_best, x_best_adv, best, last, best.clone(), step, increases, reduced, broken, moves)

    def take(self, kept: Tensor) -> APGDState:
        """The samples that the indices `kept` name."""
        return APGDState(*(take(getattr(self, field.name), kept) for field in fields(self)))


@dataclass(frozen=True)
class Outcome:
    """What runs have found so far.

    Attributes:
        x_best: points of the highest loss, [N, ...].
        x_best_adv: points that fooled the model, where `broken`, [N, ...].
        loss_best: the highest losses, [N].
        broken: whether the model was fooled, [N] bool.
    """

    x_best: Tensor
    x_best_adv: Tensor
    loss_best: Tensor
    broken: Tensor

    @classmethod
    def before(cls, x: Tensor) -> Outcome:
        """Nothing found yet around the images x."""
        loss = x.new_full(x.shape[:1], -math.inf)
        return cls(x.clone(), x.clone(), loss, torch.zeros_like(loss, dtype=torch.bool))

    @classmethod
    def of(cls, state: APGDState) -> Outcome:
        """What one run has found so far."""
        return cls(state.x_best, state.x_best_adv, state.loss_best, state.broken)

    def note(self, found: Outcome, rows: Tensor) -> None:
        """Adds what a run found on these rows: the first run that fools the model counts, else the highest loss."""
        broken, best = self.broken[rows], self.loss_best[rows]
        first, higher = found.broken & ~broken, found.loss_best > best
        for target, source, where in (
            (self.x_best_adv, found.x_best_adv, first),
            (self.x_best, found.x_best, higher),
            (self.loss_best, found.loss_best, higher),
        ):
            target[rows] = torch.where(rows_of(where, source), source, target[rows])
        self.broken[rows] = broken | found.broken

    def points(self) -> Tensor:
        """For each sample the point that fooled the model, or else that of the highest loss, [N, ...]."""
        return torch.where(rows_of(self.broken, self.x_best), self.x_best_adv, self.x_best)
