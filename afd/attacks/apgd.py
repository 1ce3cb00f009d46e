"""Auto-PGD (Croce & Hein, "Reliable evaluation of adversarial robustness", ICML 2020).

`APGD` makes runs, from other starts and at other classes, and keeps the `Best` of what they have `Found`. An `APGDRun`
steps by the rule of its norm and follows its points with what `ops.apgd_update_` remembers, an `APGDState`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from afd import ops
from afd.attacks import engine, inputs
from afd.attacks.ball import Ball, ball_of_norm
from afd.attacks.base import GradientAttack
from afd.attacks.inputs import Chunk, rows_of, take
from afd.attacks.settings import AttackSettings, takes
from afd.errors import InputError

MOMENTUM = 0.75  # the weight a of the gradient step after the first iteration
FIRST_SPARSITY, SPARSER, SETTLED, SHORTER, SHORTEST = 0.2, 1.5, 0.95, 1.5, 10.0  # of steps in L1: `SparseRun`
WORTH_DROPPING = 1 / 8  # share of the samples that must be broken before the others are gathered


@dataclass(frozen=True)
class Found:
    """What one run has found so far: the fields of that name of `ops.apgd_update_`, [N, ...] and [N]."""

    x_best: Tensor
    x_best_adv: Tensor
    loss_best: Tensor
    broken: Tensor


@dataclass(frozen=True)
class Best:
    """What several runs have found so far: the first that fools the model counts, else the one of the highest loss.

    Attributes:
        x: their points, [N, ...].
        loss: the highest losses, [N].
        broken: whether the model was fooled, [N] bool.
    """

    x: Tensor
    loss: Tensor
    broken: Tensor

    @classmethod
    def before(cls, x: Tensor) -> Best:
        """Nothing yet around the images x."""
        loss = x.new_full(x.shape[:1], -math.inf)
        return cls(x.clone(), loss, torch.zeros_like(loss, dtype=torch.bool))

    def note(self, found: Found, rows: Tensor | slice) -> None:
        """Adds what a run found on these rows."""
        broken, best = self.broken[rows], self.loss[rows]
        first, higher = found.broken & ~broken, (found.loss_best > best) & ~broken
        point = torch.where(rows_of(higher, found.x_best), found.x_best, self.x[rows])
        self.x[rows] = torch.where(rows_of(first, point), found.x_best_adv, point)
        self.loss[rows] = torch.where(higher, found.loss_best, best)
        self.broken[rows] = broken | found.broken


@dataclass(frozen=True)
class APGDState(Found):
    """What `ops.apgd_update_` keeps of one run, in its words. The tensors change, the object does not."""

    grad_best: Tensor
    loss_last: Tensor
    loss_at_check: Tensor
    step: Tensor
    increases: Tensor
    reduced: Tensor
    moves: Tensor

    @classmethod
    def before_start(cls, x_adv: Tensor, step: Tensor) -> APGDState:
        """State that the first update, at the start point, makes that of a run whose best point is the start.

        A loss that is never more than NaN leaves the start as the best point.
        """
        lowest, zero = torch.full_like(step, -math.inf), torch.zeros_like(step)
        return cls(
            x_best=x_adv.clone(), x_best_adv=torch.zeros_like(x_adv), loss_best=lowest, broken=zero.bool(),
            grad_best=torch.zeros_like(x_adv), loss_last=-lowest, loss_at_check=lowest.clone(), step=step,
            increases=zero.int(), reduced=~zero.bool(), moves=zero.byte(),
        )  # fmt: skip

    def take(self, kept: Tensor) -> APGDState:
        """The samples that the indices `kept` name."""
        return APGDState(*(take(getattr(self, field.name), kept) for field in fields(self)))


@dataclass(eq=False)
class APGDRun:
    """One run from a start, which it overwrites; in L1, a `SparseRun`.

    It steps with momentum, in steps that `ops.apgd_update_` halves at ever closer checkpoints.

    Attributes:
        evaluate: (x_adv, chunk, iteration) -> gradient, losses, and whether the model is fooled.
        chunk: what is attacked.
        x_adv: the start, like chunk.x; then where the run is.
        ball: where it may go.
        steps: how many it will take.
        rho: as in `APGDSettings`.
        resumed: whether the start is a point that another run has left.
        intervals: for each step, the iterations since the last checkpoint of `ops.apgd_update_` if it is one, else 0.
    """

    evaluate: Callable[[Tensor, Chunk, int], tuple[Tensor, Tensor, Tensor]]
    chunk: Chunk
    x_adv: Tensor
    ball: Ball
    steps: int
    rho: float
    resumed: bool

    def __post_init__(self) -> None:
        self.state = APGDState.before_start(self.x_adv, self._begin())
        self._update(0, 0)

    def advance(self, iteration: int) -> None:
        """One of the iterations 1 ... steps."""
        self._step()
        self._update(iteration, self.intervals[iteration - 1])
        self._look_back(iteration)

    def keep(self, kept: Tensor) -> None:
        """Goes on with the samples that the indices `kept` name."""
        self.chunk, self.ball, self.state = self.chunk.take(kept), self.ball.take(kept), self.state.take(kept)
        vars(self).update({name: take(one, kept) for name, one in vars(self).items() if isinstance(one, Tensor)})

    def _update(self, iteration: int, interval: int) -> None:
        vars(self).pop("grad", None)  # the last one is not held while the next is computed
        self.grad, loss, fooled = self.evaluate(self.x_adv, self.chunk, iteration)
        ops.apgd_update_(self.x_adv, self.grad, loss, fooled, **vars(self.state), interval=interval, rho=self.rho)

    @property
    def eps(self) -> Tensor:
        """The radius of each sample, [N]."""
        return self.ball.radii(self.chunk.x)

    def _begin(self) -> Tensor:
        """What steps remember, at the start; returns their sizes to begin with, [N]."""
        self.x_adv_old, self.a, self.intervals = self.x_adv.clone(), 1.0, checkpoint_intervals(self.steps)
        return 2 * self.eps

    def _step(self) -> None:
        """Takes x_adv one step along the gradient."""
        self.ball.momentum_step_(self.x_adv, self.x_adv_old, self.chunk.x, self.grad, self.state.step, self.a)
        self.a = MOMENTUM

    def _look_back(self, iteration: int) -> None:
        """What else happens after the update of iteration 1 ... steps: here nothing."""


class SparseRun(APGDRun):
    """In L1 (Croce & Hein, "Mind the box", ICML 2021): steps on ever fewer elements, without momentum.

    Every 4% of the steps the number k of elements that the best point moves is counted. The next steps move k / 1.5;
    where k fell by 5% or more, they go back to the best point and to the first step size, eps; elsewhere the step
    shrinks by 1.5, down to eps / 10.
    """

    def _begin(self) -> Tensor:
        self.intervals = [0] * self.steps  # the update halves no steps
        if self.resumed:
            self._count(self.x_adv)
        else:
            self.moved = torch.full_like(self.eps, self.chunk.x[0].numel())
            self.sparsity = torch.full_like(self.eps, FIRST_SPARSITY)
        return self.eps.clone()

    def _step(self) -> None:
        self.ball.step_(self.x_adv, self.chunk.x, self.grad, self.state.step, sparsity=self.sparsity)

    def _look_back(self, iteration: int) -> None:
        if iteration % max(int(0.04 * self.steps), 1):
            return
        before, state = self.moved, self.state
        self._count(state.x_best)
        sparser = self.moved < SETTLED * before
        shorter = torch.maximum(state.step / SHORTER, self.eps / SHORTEST)
        state.step.copy_(torch.where(sparser, self.eps, shorter))
        rows = rows_of(sparser, self.x_adv)
        self.x_adv.copy_(torch.where(rows, state.x_best, self.x_adv))
        self.grad.copy_(torch.where(rows, state.grad_best, self.grad))

    def _count(self, point: Tensor) -> None:
        self.moved = (point != self.chunk.x).flatten(1).sum(1).to(self.eps.dtype)
        self.sparsity = self.moved / (self.chunk.x[0].numel() * SPARSER)


def checkpoint_intervals(steps: int) -> list[int]:
    """For each iteration 1 ... steps, 0, or at a checkpoint the number of iterations since the one before.

    The first interval is 0.22 of the steps; each is 0.03 of them shorter than the last, but at least 0.06 of them.
    """
    interval, decrease, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    intervals, checkpoint = [0] * steps, interval
    while checkpoint <= steps:
        intervals[checkpoint - 1] = interval
        interval = max(interval - decrease, least)
        checkpoint += interval
    return intervals


@dataclass(frozen=True, kw_only=True)
class APGDSettings(AttackSettings):
    """What `afd.attacks.APGD` can be told, beside `AttackSettings`.

    With loss "dlr-targeted" (APGD-T) each restart runs once for every target class.

    Attributes:
        steps: number of steps, >= 0.
        n_restarts: number of runs, >= 1, each from its own random start (the first from the call's, if it has one).
        rho: share of steps in which the loss must rise, or the step is halved; in [0, 1]; no matter in L1.
        eot_iter: evaluations of the model that are averaged at each point, >= 1; for models that draw at random.
        n_target_classes: the likeliest other classes that "dlr-targeted" aims at, one after the other.
        early_stop: stop working on a sample once the model is fooled, or at once if it is wrong at x. The same samples
            are broken, in less time; only the points found for them differ, which are earlier ones of the same runs.
            Each step waits for the device.
        seed: of the random starts; the same seed gives the same result.
    """

    steps: int = 100
    n_restarts: int = 1
    rho: float = 0.75
    eot_iter: int = 1
    n_target_classes: int = 9
    early_stop: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"steps": 0, "n_restarts": 1, "eot_iter": 1, "n_target_classes": 1}.items():
            self._set(**{name: inputs.count(name, getattr(self, name), least)})
        rho, early_stop = inputs.number("rho", self.rho, 0.0), inputs.truth("early_stop", self.early_stop)
        if rho > 1:
            raise InputError(f"rho is {rho}; it must be in [0, 1]")
        self._set(rho=rho, early_stop=early_stop, seed=inputs.counter("seed", self.seed))

    def _attack(self) -> Callable[..., APGD]:
        return APGD


class APGD(GradientAttack):
    """PGD with momentum, whose step starts at 2 eps and is halved, sample by sample, when progress stalls.

    In L1 it takes sparse steps instead, in balls that shrink from 3 eps over 2 eps to eps (`SparseRun`). The model is
    treated as `PGD` treats it. It follows AutoAttack's implementation, with these differences: a start is uniform in
    the ball (AutoAttack scales it to touch the ball; in L1 it projects a normal draw, which breaks fewer samples); the
    first of the increases that are counted compares with the loss at the start, as in the paper, and not with 0; with
    eot_iter > 1, losses and logits are averaged like the gradients; a sample that no restart breaks gives the point of
    the highest loss, not x.

    Args:
        model: classifier, images -> logits [N, classes]; with outputs "features" it also has features_and_logits, as
            `afd.nn.Split` says.
        settings: by keyword; `afd.attacks.APGDSettings` says what they are. A scalar loss is that of each sample; a
            success found in bfloat16, or by folded layers, counts only where the model as written confirms it in
            float32.

    What counts as broken: the model leaves y, or the likeliest class of soft labels, or, where a call gives no y, the
    class that it sees in x.

    The attack returns, for each sample, the last point that fooled the model in the first run that did; else x if the
    model is wrong there; else the point of the highest loss.

    Raises:
        InputError: a setting out of its range.
    """

    records = True

    @takes(APGDSettings)
    def __init__(self, model: nn.Module, settings: APGDSettings) -> None:
        super().__init__(model, settings, steps=settings.steps, seed=settings.seed)
        self.n_restarts, self.eot_iter, self.rho = settings.n_restarts, settings.eot_iter, settings.rho
        self.targets = settings.n_target_classes if settings.loss == "dlr-targeted" else 1
        self.early_stop = settings.early_stop
        self.stages = ball_of_norm(settings.norm).stages
        if self.outputs == "features":
            engine.check_offers(self._module, "features_and_logits")

    @property
    def _shown(self) -> engine.Outputs:
        """See `GradientAttack`: whether a sample is broken, the logits say."""
        return engine.features_and_logits if self.outputs == "features" else engine.logits

    def _run(self, chunk: Chunk) -> Tensor:
        x, best = chunk.x, Best.before(chunk.x)
        clean = self._clean(chunk)
        y = self._class_to_leave(chunk, clean)
        wrong = self._fooled(clean, y)
        ranks = reversed(range(self.targets))  # the last one first, which there may not be
        aimed = [replace(self._with_loss_target(chunk, clean, rank), y=y) for rank in ranks]
        aimed.reverse()
        rows: Tensor | slice = slice(None)
        for run in range(self.n_restarts * self.targets):
            one, start = aimed[run % self.targets], self._start(chunk, run)
            if self._drops:
                rows = (~(best.broken | wrong)).nonzero().squeeze(1)
                if not len(rows):
                    break
                if len(rows) < len(x):
                    one, start = one.take(rows), take(start, rows)
            self._one_run(one, start, run, best, rows)
        return torch.where(rows_of(wrong & ~best.broken, x), x, best.x)

    @property
    def _drops(self) -> bool:
        """Whether samples that are broken are left out."""
        return self.early_stop and not self._as_one

    def _start(self, chunk: Chunk, run: int) -> Tensor:
        """Where a run begins, like chunk.x, in the first of the balls."""
        ball = self._ball(chunk, self.stages[0][0])
        if chunk.start is not None and run < self.targets:
            return ball.project_(chunk.start.clone(), chunk.x)
        return ball.start(chunk.x, seed=(chunk.seed + run) & (2**63 - 1), first_sample=chunk.first_sample)

    def _one_run(self, chunk: Chunk, x_adv: Tensor, run: int, best: Best, rows: Tensor | slice) -> None:
        """Run number `run` on these rows: through the stages, of which only the last breaks a sample."""
        self._record_run(run, 0)
        left = self.steps
        for stage, (radius, share) in enumerate(self.stages[:-1]):
            steps = math.ceil(share * self.steps)
            steps_fn = functools.partial(self._steps_fn, radius=radius, steps=steps, resumed=stage > 0)
            x_adv = self._all_steps(steps_fn, chunk, x_adv, radius, steps)[0]
            self._record_run(run, stage + 1)
            self._ball(chunk, self.stages[stage + 1][0]).project_(x_adv, chunk.x)
            left -= steps
        if isinstance(rows, Tensor):
            return self._steps_dropping(chunk, x_adv, left, best, rows)
        steps_fn = functools.partial(self._steps_fn, radius=1.0, steps=left, resumed=len(self.stages) > 1)
        return best.note(self._confirmed(chunk, Found(*self._all_steps(steps_fn, chunk, x_adv, 1.0, left))), rows)

    def _steps_fn(self, chunk: Chunk, x_adv: Tensor, *, radius: float, steps: int, resumed: bool) -> tuple[Tensor, ...]:
        """`steps` steps in a ball of `radius` times eps; the fields of what they find."""
        run = self._begin(chunk, x_adv, radius, steps, resumed)
        for iteration in range(1, steps + 1):
            run.advance(iteration)
        return tuple(getattr(run.state, field.name) for field in fields(Found))

    def _steps_dropping(self, chunk: Chunk, x_adv: Tensor, steps: int, best: Best, rows: Tensor) -> None:
        """The same in the ball of radius eps, but going on without the samples that are broken."""
        run = self._begin(chunk, x_adv, 1.0, steps, resumed=len(self.stages) > 1)
        for iteration in range(1, steps + 1):
            if run.state.broken.sum() >= WORTH_DROPPING * len(rows):
                best.note(self._confirmed(run.chunk, run.state), rows)
                kept = (~run.state.broken).nonzero().squeeze(1)
                if not len(kept):
                    return
                run.keep(kept)
                rows = rows[kept]
            run.advance(iteration)
        best.note(self._confirmed(run.chunk, run.state), rows)

    def _begin(self, chunk: Chunk, x_adv: Tensor, radius: float, steps: int, resumed: bool) -> APGDRun:
        ball = self._ball(chunk, radius)
        kind = SparseRun if ball.sparse else APGDRun
        return kind(self._evaluate, chunk, x_adv, ball, steps, self.rho, resumed)

    def _confirmed(self, chunk: Chunk, found: Found) -> Found:
        """A success in low precision, or of folded layers, counts once the model as written confirms it.

        The others are struck out in place.
        """
        if self._approximates:
            found.broken.logical_and_(self._fooled(self._as_written(found.x_best_adv), chunk.y))
        return found

    def _evaluate(self, x_adv: Tensor, chunk: Chunk, iteration: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient and loss to ascend, and whether the model is fooled: sums over eot_iter serve as well as means."""
        grad, loss, logits = self._ascent(x_adv, chunk, iteration)
        for _ in range(1, self.eot_iter):
            drawn = self._ascent(x_adv, chunk, iteration)
            grad, loss, logits = grad + drawn[0], loss + drawn[1], logits + drawn[2]
        if self._recorder is not None:
            self._record(iteration, chunk, x_adv, loss / self.eot_iter)
        if self.targeted:
            grad, loss = -grad, -loss
        if grad.stride() != x_adv.stride():  # the update overwrites it, so no element may stand for two
            grad = torch.empty_like(x_adv).copy_(grad)
        return grad, loss.to(x_adv.dtype), self._fooled(logits, chunk.y)

    def _fooled(self, logits: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None  # settled before the first run
        return (logits.argmax(1) == y) == self.targeted
