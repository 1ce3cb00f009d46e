"""Auto-PGD (Croce & Hein, "Reliable evaluation of adversarial robustness", ICML 2020)."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from afd import ops
from afd.attacks import engine
from afd.attacks.apgd_run import Run
from afd.attacks.apgd_state import Outcome
from afd.attacks.apgd_walks import MomentumWalk, SparseWalk, Walk
from afd.attacks.base import GradientAttack
from afd.attacks.execution import Running
from afd.attacks.losses import Value
from afd.attacks.piece import Piece, rows_of, take
from afd.attacks.settings import APGDSettings, BatchNormMode, LossName, Norm, OutputsName
from afd.errors import InputError

SHRINKING = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # radii in eps, and their shares of the steps
FIXED = ((1.0, 1.0),)
WORTH_DROPPING = 1 / 8  # share of the samples that must be broken before the others are gathered


class APGD(GradientAttack):
    """PGD with momentum, whose step starts at 2 eps and is halved, sample by sample, when progress stalls.

    In L1 it takes sparse steps instead, in balls that shrink from 3 eps over 2 eps to eps (`SparseWalk`). The model is
    treated as `PGD` treats it. It follows AutoAttack's implementation, with these differences: a start is uniform in
    the ball (AutoAttack scales it to touch the ball; in L1 it projects a normal draw, which breaks fewer samples); the
    first of the increases that are counted compares with the loss at the start, as in the paper, and not with 0; with
    eot_iter > 1, losses and logits are averaged like the gradients; a sample that no restart breaks gives the point of
    the highest loss, not x.

    Args:
        model: classifier, images -> logits [N, classes]; with outputs "features" it also has features_and_logits, as
            `afd.nn.Split` says.
        norm, eps, steps, n_restarts, rho, eot_iter, loss, n_target_classes, early_stop, seed, bounds, targeted,
            outputs, batchnorm: see `afd.attacks.APGDSettings`. A scalar loss is that of each sample.
        running: precision, piece, look and fold, likewise; a success found in bfloat16, or by folded layers, counts
            only where the model as written confirms it in float32.

    What counts as broken: the model leaves y, or the likeliest class of soft labels, or, where a call gives no y, the
    class that it sees in x.

    The attack returns, for each sample, the last point that fooled the model in the first run that did; else x if the
    model is wrong there; else the point of the highest loss.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Norm = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        rho: float = 0.75,
        eot_iter: int = 1,
        loss: LossName | Value = "ce",
        n_target_classes: int = 9,
        early_stop: bool = False,
        seed: int = 0,
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: bool = False,
        outputs: OutputsName = "logits",
        batchnorm: BatchNormMode = "eval",
        **running: Unpack[Running],
    ) -> None:
        settings = APGDSettings(
            norm=norm, eps=eps, steps=steps, n_restarts=n_restarts, rho=rho, eot_iter=eot_iter, loss=loss,
            n_target_classes=n_target_classes, early_stop=early_stop, seed=seed, bounds=bounds, targeted=targeted,
            outputs=outputs, batchnorm=batchnorm, **running,
        )  # fmt: skip
        super().__init__(model, settings, steps=settings.steps, seed=settings.seed)
        self.n_restarts, self.eot_iter, self.rho = settings.n_restarts, settings.eot_iter, settings.rho
        self.targets = settings.n_target_classes if loss == "dlr-targeted" else 1
        self.early_stop = settings.early_stop
        self.radii = SHRINKING if norm == "L1" else FIXED
        if outputs == "features":
            engine.check_offers(self._module, "features_and_logits")

    @property
    def _shown(self) -> engine.Outputs:
        """See `GradientAttack`: whether a sample is broken, the logits say."""
        return engine.features_and_logits if self.outputs == "features" else engine.logits

    def _run(self, piece: Piece) -> Tensor:
        x, found = piece.x, Outcome.before(piece.x)
        clean = self._clean(piece)
        y = self._class_to_leave(piece.y, clean)
        wrong = self._fooled(clean, y)
        aims = [replace(self._aimed(piece, clean, rank), y=y) for rank in range(self.targets)]
        rows = torch.arange(len(x), device=x.device)
        for run in range(self.n_restarts * self.targets):
            aimed, start = aims[run % self.targets], self._start(piece, run)
            if self._drops:
                rows = (~(found.broken | wrong)).nonzero().squeeze(1)
                if not len(rows):
                    break
                aimed, start = aimed.take(rows), take(start, rows)
            found.note(self._shrink(aimed, start), rows)
        return torch.where(rows_of(wrong & ~found.broken, x), x, found.points())

    @property
    def _drops(self) -> bool:
        """Whether samples that are broken are left out."""
        return self.early_stop and not self._as_one

    def _class_to_leave(self, y: Tensor | None, clean: Tensor) -> Tensor:
        """Or to reach, if that is what labels are: [N], of labels, soft labels or none, and the clean logits."""
        if y is not None:
            return y.argmax(1) if y.is_floating_point() else y
        if self.targeted:
            raise InputError("y is None; with targeted=True, APGD needs the classes to reach, [N]")
        return clean.argmax(1)

    def _start(self, piece: Piece, run: int) -> Tensor:
        """Where a run begins, like piece.x, in the first of the balls."""
        ball = self._ball(piece, self.radii[0][0])
        if piece.start is not None and run < self.targets:
            return ops.project_(piece.start.clone(), piece.x, **ball)
        seed = (piece.seed + run) & (2**63 - 1)
        return ops.random_start(piece.x, seed=seed, first_sample=piece.first_sample, **ball)

    def _shrink(self, piece: Piece, x_adv: Tensor) -> Outcome:
        """One run: through the radii, of which only the last breaks a sample."""
        left = self.steps
        for stage, (radius, share) in enumerate(self.radii[:-1]):
            steps = math.ceil(share * self.steps)
            climb = functools.partial(self._climb, radius=radius, steps=steps, resumed=stage > 0)
            x_adv = self._climbed(climb, piece, x_adv, radius, steps)[0]
            ops.project_(x_adv, piece.x, **self._ball(piece, self.radii[stage + 1][0]))
            left -= steps
        if self._drops:
            return self._climb_dropping(piece, x_adv, left)
        climb = functools.partial(self._climb, radius=1.0, steps=left, resumed=len(self.radii) > 1)
        return self._confirmed(piece, Outcome(*self._climbed(climb, piece, x_adv, 1.0, left)))

    def _climb(self, piece: Piece, x_adv: Tensor, *, radius: float, steps: int, resumed: bool) -> tuple[Tensor, ...]:
        """`steps` steps in a ball of `radius` times eps; the fields of an Outcome."""
        run = self._begin(piece, x_adv, radius, steps, resumed)
        for iteration in range(1, steps + 1):
            run.advance(iteration)
        return tuple(vars(Outcome.of(run.state)).values())

    def _climb_dropping(self, piece: Piece, x_adv: Tensor, steps: int) -> Outcome:
        """The same in the ball of radius eps, but going on without the samples that are broken."""
        run = self._begin(piece, x_adv, 1.0, steps, resumed=len(self.radii) > 1)
        found, rows = Outcome.before(piece.x), torch.arange(len(x_adv), device=x_adv.device)
        for iteration in range(1, steps + 1):
            if run.state.broken.sum() >= WORTH_DROPPING * len(rows):
                found.note(self._confirmed(run.piece, Outcome.of(run.state)), rows)
                kept = (~run.state.broken).nonzero().squeeze(1)
                if not len(kept):
                    return found
                run.keep(kept)
                rows = rows[kept]
            run.advance(iteration)
        found.note(self._confirmed(run.piece, Outcome.of(run.state)), rows)
        return found

    def _begin(self, piece: Piece, x_adv: Tensor, radius: float, steps: int, resumed: bool) -> Run:
        ball = self._ball(piece, radius)
        walk: Walk
        if self.norm == "L1":
            walk = SparseWalk(piece.x, ball, steps, x_adv if resumed else None)
        else:
            walk = MomentumWalk(piece.x, ball, steps, x_adv)
        return Run(self._evaluate, piece, x_adv, walk, self.rho)

    def _confirmed(self, piece: Piece, outcome: Outcome) -> Outcome:
        """A success in low precision, or of folded layers, counts once the model as written confirms it.

        The others are struck out in place.
        """
        if self.precision != "fp32" or self._joining.pairs:
            outcome.broken.logical_and_(self._fooled(self._as_written(outcome.x_best_adv), piece.y))
        return outcome

    def _evaluate(self, x_adv: Tensor, piece: Piece, iteration: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient and loss to ascend, and whether the model is fooled: sums over eot_iter serve as well as means."""
        grad, loss, logits = self._ascent(x_adv, piece, iteration)
        for _ in range(1, self.eot_iter):
            drawn = self._ascent(x_adv, piece, iteration)
            grad, loss, logits = grad + drawn[0], loss + drawn[1], logits + drawn[2]
        if self.targeted:
            grad, loss = -grad, -loss
        if grad.stride() != x_adv.stride():  # the update overwrites it, so no element may stand for two
            grad = torch.empty_like(x_adv).copy_(grad)
        return grad, loss.to(x_adv.dtype), self._fooled(logits, piece.y)

    def _fooled(self, logits: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None  # settled before the first run
        return (logits.argmax(1) == y) == self.targeted
