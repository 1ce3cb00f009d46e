"""FAB (Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020).

It looks for the nearest point that another class has, and not for the highest loss in a ball: each step goes to where
the model, taken to be linear, changes its mind. `FAB` makes runs at classes and from starts, and a `FABRun` is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from afd import ops
from afd.attacks import diagnostics, engine, inputs
from afd.attacks.apgd import WORTH_DROPPING
from afd.attacks.ball import Ball
from afd.attacks.base import GradientAttack
from afd.attacks.inputs import Chunk, rows_of, take
from afd.attacks.losses import Loss, Value, a_likely_class, logit_difference
from afd.attacks.settings import AttackSettings, LossName, takes
from afd.errors import InputError, one_of

NEAR = 1e-8  # that two planes count as away at least, so that their shares are numbers


@dataclass(frozen=True, kw_only=True)
class FABSettings(AttackSettings):
    """What `FAB` can be told, beside `AttackSettings`; y is never the class to reach.

    Attributes:
        loss: "margin", the only one: where it is 0 is the boundary that FAB looks for.
        steps: number of steps of each run, >= 0.
        n_restarts: number of runs, >= 1: the first from x (or the call's start), the others from random points.
        n_target_classes: FAB-T: the likeliest other classes that are aimed at, one after the other, with all restarts
            each. None for the untargeted attack: the nearest boundary to any class, for a backward of each class.
        alpha_max: largest share of the way that a step goes from x rather than from the last point, in [0, 1].
        eta: how far beyond the boundary a step goes, as a multiple of the way there, >= 1.
        beta: share of the distance from x that is kept after a point that fools the model, in [0, 1].
        early_stop: stop working on a sample once a point within eps fools the model. The same samples are broken, in
            less time; only the points found for them differ, for nobody looks for nearer ones. Each step waits for the
            device.
        seed: of the random starts; the same seed gives the same result.
    """

    loss: LossName | Value = "margin"
    steps: int = 100
    n_restarts: int = 1
    n_target_classes: int | None = None
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    early_stop: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("norm", self.norm, FAB.known)
        one_of("loss", self.loss, ("margin",))
        if self.targeted:
            raise InputError("targeted is True, and FAB takes no class to reach; it must be False")
        for name, least in {"steps": 0, "n_restarts": 1, "n_target_classes": 1}.items():
            if getattr(self, name) is not None or name != "n_target_classes":
                self._set(**{name: inputs.count(name, getattr(self, name), least)})
        for name, lowest in {"alpha_max": 0.0, "eta": 1.0, "beta": 0.0}.items():
            self._set(**{name: inputs.number(name, getattr(self, name), lowest)})
        for name in ("alpha_max", "beta"):
            if getattr(self, name) > 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        self._set(early_stop=inputs.truth("early_stop", self.early_stop), seed=inputs.counter("seed", self.seed))

    def _attack(self) -> Callable[..., FAB]:
        return FAB


@dataclass(frozen=True)
class Nearest:
    """The nearest points within eps that fooled the model.

    Attributes:
        x: the points, or the images where there is none, [N, ...].
        distance: how far they are, infinite where there is none, [N].
    """

    x: Tensor
    distance: Tensor

    @classmethod
    def before(cls, x: Tensor) -> Nearest:
        """Nothing yet around images x."""
        return cls(x.clone(), x.new_full(x.shape[:1], torch.inf))

    def note(self, x: Tensor, distance: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Adds points of these rows that are nearer."""
        nearer = distance < self.distance[rows]
        self.x[rows] = torch.where(rows_of(nearer, x), x, self.x[rows])
        self.distance[rows] = torch.minimum(distance, self.distance[rows])


class FABRun:
    """One run from a start.

    Args:
        chunk: what is attacked.
        start: like chunk.x.
        ball: whose radius points count within.

    Attributes:
        x_adv: where it is, like chunk.x; `length` from it, [n].
        nearest: what it has found.
    """

    def __init__(self, chunk: Chunk, start: Tensor, ball: Ball) -> None:
        self.chunk, self.ball, self.nearest = chunk, ball, Nearest.before(chunk.x)
        x = chunk.x
        # the points and the images beside each other, for one launch projects both
        self._points = torch.empty_strided((2 * len(x), *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)
        self.x_adv.copy_(start)
        self._points[len(x) :].copy_(x)
        self.length = torch.zeros_like(self.nearest.distance)

    @property
    def x_adv(self) -> Tensor:
        """Where it is."""
        return self._points[: len(self.chunk.x)]

    @property
    def within(self) -> Tensor:
        """Whether x_adv is within eps, [n]."""
        return self.length <= self.ball.radii(self.chunk.x)

    def move(self, value: Tensor, normal: Tensor, alpha_max: float, eta: float) -> None:
        """Steps to the plane on which a linear function with a value [n] and gradient at x_adv is 0.

        From x_adv and from x, each in the share in which the other is nearer to the plane. What is not finite of a
        function moves nothing, like a gradient of zero: that only takes x_adv nearer to x, by alpha_max at most.
        """
        x_adv, x, samples = self.x_adv, self._points[len(self.chunk.x) :], len(self.chunk.x)
        if normal.stride() != x_adv.stride():
            normal = torch.empty_like(x_adv).copy_(normal)
        projected, distance = ops.project_plane(
            self._points, normal, value, at=x_adv, bounds=self.ball.bounds, norm=self.ball.norm
        )
        there = rows_of(distance.isfinite(), projected)
        torch.where(there, projected, self._points, out=projected)
        own, others = distance.nan_to_num(0.0).clamp(min=NEAR).split(samples)
        share = rows_of((own / (own + others)).clamp(max=alpha_max), x)
        x_adv.lerp_(x, share)
        nearer = projected[:samples].lerp_(projected[samples:], share)
        x_adv.lerp_(nearer, eta).clamp_(*self.ball.bounds)
        self.length = _length(x_adv - x, self.ball.order)

    def judge(self, fooled: Tensor, beta: float, *, first: bool = False) -> None:
        """Keeps the points that fooled the model, [n] bool, if they are the nearest (or the first) within eps.

        And goes back from all that fooled it towards x.
        """
        counts = fooled & self.within
        if first:
            counts &= self.nearest.distance.isinf()
        length = torch.where(counts, self.length, torch.inf)
        self.nearest.note(self.x_adv, length)
        self.x_adv.lerp_(self.chunk.x, rows_of(fooled.to(self.x_adv.dtype) * (1 - beta), self.x_adv))

    def keep(self, kept: Tensor) -> None:
        """Goes on with the samples that the indices `kept` name."""
        self._points = take(self._points, torch.cat([kept, kept + len(self.chunk.x)]))
        self.chunk, self.ball = self.chunk.take(kept), self.ball.take(kept)
        self.nearest = Nearest(take(self.nearest.x, kept), self.nearest.distance[kept])
        self.length = self.length[kept]


class FAB(GradientAttack):
    """The nearest adversarial point: steps to the boundary of a model that is taken to be linear, biased towards x.

    A step projects the last point and x onto the boundary within the bounds (`ops.project_plane`), mixes what it finds,
    more of the nearer one, and goes a little beyond; after a point that fools the model it goes back towards x. It
    follows AutoAttack's implementation, with these differences: random starts are uniform in their ball, of half the
    smaller of eps and the distance that was found (AutoAttack takes draws that lie at its surface); points of any run
    count together; what is not finite moves nothing, where AutoAttack's points become NaN. A gradient of zero leads
    nowhere but a little back to x, as it does there.

    Args:
        model: classifier, images -> logits [N, classes], of at least 2 classes, treated as `afd.attacks.PGD` treats it.
        settings: by keyword; `FABSettings` says what they are. Points are judged in full precision by the model as
            written; with early_stop, those further than eps away are as the passes run.

    The attack returns, for each sample, x if the model is wrong there; else the nearest point within eps of those that
    fooled the model (with early_stop the first ones); else x.

    Raises:
        InputTypeError, InputError: as of `PGD`; the norm is another than Linf, L2 and L1.
    """

    known: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")

    @takes(FABSettings)
    def __init__(self, model: nn.Module, settings: FABSettings) -> None:
        super().__init__(model, settings, steps=settings.steps, seed=settings.seed)
        self.n_restarts, self.early_stop = settings.n_restarts, settings.early_stop
        self.n_target_classes = settings.n_target_classes
        self.alpha_max, self.eta, self.beta = settings.alpha_max, settings.eta, settings.beta
        if self.n_target_classes is not None:
            self.loss = Loss(logit_difference, a_likely_class)

    def _run(self, chunk: Chunk) -> Tensor:
        assert chunk.y is not None  # the loss asks for it
        x, y, clean = chunk.x, chunk.y, self._clean(chunk)
        ranks = reversed(range(self.n_target_classes or 1))  # the last one first, which there may not be
        aimed = [self._with_loss_target(chunk, clean, rank) for rank in ranks]
        aimed.reverse()
        wrong, nearest = clean.argmax(1) != y, Nearest.before(x)
        for number in range(self.n_restarts * len(aimed)):
            one, start = aimed[number // self.n_restarts], self._start(chunk, number, nearest.distance)
            if self._drops:
                rows = (nearest.distance.isinf() & ~wrong).nonzero().squeeze(1)
                if not len(rows):
                    break
                one = one.take(rows)
                self._steps_dropping(FABRun(one, take(start, rows), self._ball(one)), nearest, rows)
            else:
                nearest.note(*self._all_steps(self._steps_fn, one, start))
        return torch.where(rows_of(wrong, x), x, nearest.x)

    @property
    def _drops(self) -> bool:
        """Whether samples that are broken are left out."""
        return self.early_stop and not self._as_one

    def _start(self, chunk: Chunk, number: int, distance: Tensor) -> Tensor:
        """Where a run begins, like chunk.x; `distance`: of the nearest points so far, [n]."""
        if not number % self.n_restarts:
            return chunk.x if chunk.start is None else chunk.start
        ball = self._ball(chunk)
        ball = replace(ball, eps=0.5 * torch.minimum(ball.radii(chunk.x), distance))
        return ball.start(chunk.x, seed=(chunk.seed + number) & (2**63 - 1), first_sample=chunk.first_sample)

    def _steps_fn(self, chunk: Chunk, x_adv: Tensor) -> tuple[Tensor, ...]:
        """All steps; the points that `Nearest` has, and their distances."""
        run = FABRun(chunk, x_adv, self._ball(chunk))
        for step in range(self.steps):
            run.move(*self._plane(run, step), self.alpha_max, self.eta)
            run.judge(self._fooled(self._as_written(run.x_adv), run.chunk, step + 1), self.beta)
        return run.nearest.x, run.nearest.distance

    def _steps_dropping(self, run: FABRun, nearest: Nearest, rows: Tensor) -> None:
        """The same, but going on without the samples that are broken; notes the points of these rows."""
        for step in range(self.steps):
            run.move(*self._plane(run, step), self.alpha_max, self.eta)
            run.judge(self._confirmed(run, step + 1), self.beta, first=True)
            left = run.nearest.distance.isinf()
            if (~left).sum() >= WORTH_DROPPING * len(rows):
                nearest.note(run.nearest.x, run.nearest.distance, rows)
                kept = left.nonzero().squeeze(1)
                if not len(kept):
                    return
                run.keep(kept)
                rows = rows[kept]
        nearest.note(run.nearest.x, run.nearest.distance, rows)

    def _plane(self, run: FABRun, step: int) -> tuple[Tensor, Tensor]:
        """The loss at x_adv, [n], and its gradient: 0 is the boundary to the class aimed at, or to the nearest one."""
        x_adv, chunk = run.x_adv, run.chunk
        if self.n_target_classes is not None:
            grad, value, _ = self._ascent(x_adv, chunk, step)
            return value.to(x_adv.dtype), grad
        assert chunk.y is not None
        dual = {1.0: torch.inf, 2.0: 2.0, torch.inf: 1.0}[run.ball.order]
        nearest, value, normal = torch.full_like(run.length, torch.inf), run.length, x_adv
        self._batchnorms.begin_forward()
        with self.execution.autocast(x_adv.device):
            logits, differences = engine.difference_gradients(self._module, x_adv, chunk.y, chunk.check_classes)
            for grad, difference in differences:
                distance = difference.abs() / (_length(grad, dual) + 1e-12)
                nearer = (distance < nearest) | (normal is x_adv)  # the first one, whatever it is
                nearest, value = torch.where(nearer, distance, nearest), torch.where(nearer, difference, value)
                if normal is not x_adv:
                    torch.where(rows_of(nearer, grad), grad, normal, out=normal)
                else:  # to be written to, so no element may stand for two
                    normal = grad if grad.stride() == x_adv.stride() else torch.empty_like(x_adv).copy_(grad)
        if not chunk.first_outputs:
            chunk.first_outputs.append(logits)
        diagnostics.note(chunk, step, logits, value, normal)
        return value.to(x_adv.dtype), normal

    def _confirmed(self, run: FABRun, step: int) -> Tensor:
        """Whether the model is fooled, [n] bool, by its passes as they run, and within eps by the model as written."""
        with self.execution.autocast(run.x_adv.device):
            fooled = self._fooled(engine.logits(self._module, run.x_adv)[0], run.chunk, step)
        if self._approximates:
            rows = (fooled & run.within).nonzero().squeeze(1)
            if len(rows):
                fooled[rows] = self._fooled(self._as_written(take(run.x_adv, rows)), run.chunk.take(rows), step)
        return fooled

    def _fooled(self, logits: Tensor, chunk: Chunk, step: int) -> Tensor:
        assert chunk.y is not None
        diagnostics.note_nan(chunk, step, logits)
        return engine.misclassified(logits, chunk.y)


def _length(u: Tensor, order: float) -> Tensor:
    """‖u‖ of each row, [n]."""
    length: Tensor = torch.linalg.vector_norm(u, order, dim=tuple(range(1, u.dim())))
    return length
