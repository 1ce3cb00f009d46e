"""One run of Auto-PGD, iteration by iteration."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from afd import ops
from afd.attacks.apgd_state import APGDState
from afd.attacks.apgd_walks import Walk
from afd.attacks.piece import Piece, take

Evaluate = Callable[[Tensor, Piece, int], tuple[Tensor, Tensor, Tensor]]


class Run:
    """A run from a start, which it overwrites.

    Args:
        evaluate: (x_adv, piece, iteration) -> gradient, losses, and whether the model is fooled.
        piece: what is attacked.
        x_adv: the start, like piece.x.
        walk: how to move.
        rho: as in `afd.attacks.APGD`.
    """

    def __init__(self, evaluate: Evaluate, piece: Piece, x_adv: Tensor, walk: Walk, rho: float) -> None:
        self.evaluate, self.piece, self.x_adv, self.walk, self.rho = evaluate, piece, x_adv, walk, rho
        self.grad: Tensor
        self.state = APGDState.before_start(x_adv, walk.first_step())
        self._look(0, 0)

    def advance(self, iteration: int) -> None:
        """One of the iterations 1 ... steps."""
        self.walk.move_(self.x_adv, self.grad, self.state.step)
        self._look(iteration, self.walk.intervals[iteration - 1])
        self.walk.look_back_(iteration, self.x_adv, self.grad, self.state)

    def keep(self, kept: Tensor) -> None:
        """Goes on with the samples that the indices `kept` name."""
        self.piece, self.walk, self.state = self.piece.take(kept), self.walk.take(kept), self.state.take(kept)
        self.x_adv, self.grad = take(self.x_adv, kept), take(self.grad, kept)

    def _look(self, iteration: int, interval: int) -> None:
        self.grad, loss, fooled = self.evaluate(self.x_adv, self.piece, iteration)
        ops.apgd_update_(self.x_adv, self.grad, loss, fooled, **vars(self.state), interval=interval, rho=self.rho)
