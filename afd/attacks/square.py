"""Square (Andriushchenko et al. 2020): random search along squares, which asks a model for logits and for no gradient.

What it finds where gradient attacks find nothing, they were kept from finding: a sign of masked gradients.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from afd import ops
from afd.attacks import diagnostics, engine, inputs
from afd.attacks.base import GradientAttack
from afd.attacks.inputs import Chunk, rows_of, take
from afd.attacks.losses import Value, wide
from afd.attacks.settings import AttackSettings, LossName, takes
from afd.errors import InputError, one_of

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which squares have half the area
BROKEN, STANDING, RESUMED = 0, 1, 2  # what `ops.square_step_` calls the states of a sample
WORTH_DROPPING = 8  # passes of a sample that must be saved for each that is gathered, and for a batch of a new size
LOOK_EVERY = 10  # queries; after each of the first ones, too


@dataclass(frozen=True, kw_only=True)
class SquareSettings(AttackSettings):
    """What `Square` can be told, beside `AttackSettings`; it is not targeted.

    Attributes:
        loss: what is to grow: "margin" or "ce".
        queries: of each image and run, beside that of the image itself and of the first point, >= 0.
        p_init: share of an image that the first squares cover, in (0, 1].
        n_restarts: number of runs, >= 1, each with draws of its own (the first from the call's start, if it has one),
            on what the runs before have not broken.
        early_stop: stop working on a sample once the model is fooled. The result is the same, in less time; now and
            then the device is waited for.
        seed: of all draws; the same seed gives the same result.
    """

    loss: LossName | Value = "margin"
    queries: int = 5000
    p_init: float = 0.8
    n_restarts: int = 1
    early_stop: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss", self.loss, ("margin", "ce"))
        if self.targeted:
            raise InputError("targeted is True, and Square aims at no class; it must be False")
        if not 0 < self.p_init <= 1:
            raise InputError(f"p_init is {self.p_init}; it must be in (0, 1]")
        for name, least in {"queries": 0, "n_restarts": 1}.items():
            self._set(**{name: inputs.count(name, getattr(self, name), least)})
        self._set(early_stop=inputs.truth("early_stop", self.early_stop), seed=inputs.counter("seed", self.seed))

    def _attack(self) -> Callable[..., Square]:
        return Square


@dataclass(eq=False)
class SquareRun:
    """One run on the images of a chunk: what `ops.square_step_` reads and writes.

    Attributes:
        x_tried: what the model is asked about, a row for each sample that is worked on.
        rows: which sample of the chunk each of them is.
        x_best: points of the highest loss, or that fooled the model, one for each sample; likewise what follows.
        loss_best: the losses there.
        state: BROKEN where the model is fooled there, else STANDING or RESUMED.
        highest: logit of all that was tried, of the rows of x_tried; NaN once one was.
        confirmed: whether it is so as it is written, in float32.
    """

    x_tried: Tensor
    rows: Tensor
    x_best: Tensor
    loss_best: Tensor
    state: Tensor
    highest: Tensor
    confirmed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.confirmed = self.state == BROKEN  # the image itself is misclassified

    def keep(self, kept: Tensor) -> None:
        """Goes on with the rows that the indices `kept` name."""
        self.x_tried, self.rows, self.highest = take(self.x_tried, kept), self.rows[kept], self.highest[kept]


class Square(GradientAttack):
    """Random search: a point moves along a square of random place and signs wherever that makes the loss grow.

    In Linf the first point are vertical stripes, and a square moves to a corner of the ball; in L2 and L1 two squares
    are drawn, and what the second one has of the ball's radius goes to the first: `afd.ops.square_step_`. Squares
    shrink as the queries go on. Each image has draws of its own, by seed, sample and query, so that the result is the
    same for any split of the batch; it stays where it is once it is misclassified. In L1 it is as AutoAttack's (Croce &
    Hein 2021). Images that are no [C, H, W] count as one row of one channel.

    Where the model runs in bfloat16 or with folded layers, a success counts only once the model as written confirms it
    in float32; if it does not, the search goes on from there.

    Args:
        model: classifier, images -> logits [N, classes], treated as `afd.attacks.PGD` treats it.
        settings: by keyword; `SquareSettings` says what they are.

    Of soft labels, the likeliest class is the one to leave. The attack returns, for each sample, the point that fooled
    the model; x if the model is wrong there; else the point of the highest loss.

    Raises:
        InputTypeError, InputError: as of `PGD`; the norm is another than Linf, L2 and L1.
    """

    known: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")

    @takes(SquareSettings)
    def __init__(self, model: nn.Module, settings: SquareSettings) -> None:
        super().__init__(model, settings, steps=settings.queries, seed=settings.seed)
        one_of("norm", self.norm, self.known)
        self.p_init, self.n_restarts, self.early_stop = settings.p_init, settings.n_restarts, settings.early_stop
        self.loss_name = str(settings.loss)

    def _run(self, chunk: Chunk) -> Tensor:
        assert chunk.y is not None  # the loss asks for it
        clean = self._clean(chunk)
        y = chunk.y.argmax(1) if chunk.y.is_floating_point() else chunk.y
        standing, best, loss = clean.argmax(1) == y, chunk.x, chunk.x.new_full(y.shape, -math.inf)
        for restart in range(self.n_restarts):
            run = self._one_run(chunk, y, standing, restart)
            if self.n_restarts == 1:
                return run.x_best
            fooled = self._fooled(self._as_written(run.x_best), y)
            better = standing & (fooled | (run.loss_best > loss))
            best = torch.where(rows_of(better, best), run.x_best, best)
            loss, standing = torch.where(better, run.loss_best, loss), standing & ~fooled
        return best

    def _one_run(self, chunk: Chunk, y: Tensor, standing: Tensor, restart: int) -> SquareRun:
        """All queries for the samples that stand, or, where nothing is dropped, for all."""
        x, looks = chunk.x, self._looks(chunk)
        rows = standing.nonzero().squeeze(1) if looks and self.early_stop else torch.arange(len(x), device=x.device)
        start = chunk.start if restart == 0 else None
        tried = x if start is None else self._ball(chunk).project_(start.clone(), x)
        run = SquareRun(
            take(tried, rows), rows, x.clone(), x.new_full(y.shape, -math.inf), standing.to(torch.uint8),
            x.new_full(rows.shape, -math.inf),
        )  # fmt: skip
        propose = _Proposals(self, chunk, y, (chunk.seed + restart) & (2**63 - 1))
        if start is None:
            propose.first(run)
        with self.execution.autocast(x.device):  # once for all queries, so that weights are cast once
            for query in range(self.steps + 1):
                if not len(run.rows):
                    break
                logits = self._logits(run.x_tried)
                torch.maximum(run.highest, logits.amax(1), out=run.highest)
                propose(run, logits, query)
                if query < LOOK_EVERY or query % LOOK_EVERY == 0 or query == self.steps:
                    highest = x.new_zeros(y.shape).index_copy_(0, run.rows, run.highest)
                    diagnostics.note_nan(chunk, query, highest[:, None])
                    if looks:
                        self._look(run, y, self.steps - query)
        return run

    def _looks(self, chunk: Chunk) -> bool:
        """Whether values may be looked at now and then, and samples go their own ways."""
        return not (self._as_one or (chunk.x.is_cuda and torch.cuda.is_current_stream_capturing()))

    def _look(self, run: SquareRun, y: Tensor, to_come: int) -> None:
        """Has successes confirmed, and drops the samples that are broken once that pays in the queries to come."""
        if self.precision != "fp32" or self._joining.approximates:
            pending = ((run.state == BROKEN) & ~run.confirmed).nonzero().squeeze(1)
            if len(pending):
                fooled = self._fooled(self._as_written(take(run.x_best, pending)), y[pending])
                run.confirmed[pending] = fooled
                run.state[pending] = torch.where(fooled, BROKEN, RESUMED).to(run.state.dtype)
        if self.early_stop:
            left = (run.state[run.rows] != BROKEN).nonzero().squeeze(1)
            if (len(run.rows) - len(left)) * to_come >= WORTH_DROPPING * len(run.rows):
                run.keep(left)

    def _logits(self, x_tried: Tensor) -> Tensor:
        """In images' dtype, whatever precision the model runs in."""
        self._batchnorms.begin_forward()
        return wide(engine.logits(self._module, x_tried)[0]).to(x_tried.dtype)

    @staticmethod
    def _fooled(logits: Tensor, y: Tensor) -> Tensor:
        return engine.misclassified(logits, y)


class _Proposals:
    """Writes what is tried at each query of one run, once what was tried last is judged."""

    def __init__(self, attack: Square, chunk: Chunk, y: Tensor, seed: int | Tensor) -> None:
        self.x, self.y, self.norm = chunk.x, y, attack.norm
        self.height, self.width = tuple(chunk.x.shape[2:]) if chunk.x.dim() == 4 else (1, chunk.x[0].numel())
        self.p_init, self.queries = attack.p_init, attack.steps
        first = chunk.first_sample.to(self.x.device) if isinstance(chunk.first_sample, Tensor) else chunk.first_sample
        self.settings: dict[str, Any] = {
            "eps": chunk.of(attack.eps), "seed": seed, "first_sample": first, "bounds": attack.bounds,
            "norm": attack.norm, "loss": attack.loss_name,
        }  # fmt: skip
        self._last_side, self._patterns = 0, dict[int, Tensor]()

    def first(self, run: SquareRun) -> None:
        """Where the search begins: stripes in Linf, else tiles with a pattern each."""
        self._step(run, None, 0, max(min(self.height, self.width) // 5, 1))

    def __call__(self, run: SquareRun, logits: Tensor, query: int) -> None:
        """Those of a query, counted from 0; behind the last one there are none."""
        self._step(run, logits, query, self.side(query) if query < self.queries else 0)

    def side(self, query: int) -> int:
        """Of the squares of a query."""
        share = self.p_init / 2 ** bisect.bisect_left(HALVINGS, query)
        side = max(round(math.sqrt(share * self.height * self.width)), 1)
        if self.norm != "Linf":
            side = max(side, 3) // 2 * 2 + 1  # odd, as the paper has it
        return min(side, self.height, self.width)

    def _step(self, run: SquareRun, logits: Tensor | None, query: int, side: int) -> None:
        ops.square_step_(
            run.x_tried, run.x_best, self.x, logits, self.y, loss_best=run.loss_best, state=run.state, rows=run.rows,
            query=query, side=side, last_side=self._last_side, pattern=self._pattern(side), **self.settings,
        )  # fmt: skip
        self._last_side = side if logits is not None else 0

    def _pattern(self, side: int) -> Tensor | None:
        """That of squares in L2 and L1, made once for each side."""
        if self.norm == "Linf" or not side:
            return None
        if side not in self._patterns:
            self._patterns[side] = ops.square_pattern(side, self.norm).to(self.x)
        return self._patterns[side]
