"""Several balls at once: PGD in each of an Linf, an L2 and an L1 ball, and the worst, all, or one of what they find."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from afd.attacks import inputs
from afd.attacks.ball import Ball, Norm
from afd.attacks.inputs import Chunk, rows_of
from afd.attacks.pgd import PGD, PGDSettings
from afd.attacks.settings import SIZES, STEP_OF, AttackSettings, step_size, takes
from afd.errors import InputError, fraction, one_of

Choice = Literal["worst", "average", "random", "fooling"]
RADIUS_IN: dict[Norm, str] = {"Linf": "eps", "L2": "eps_l2", "L1": "eps_l1"}
FAR = 2**62  # a place in the data that no image has: what is drawn there is no start


@dataclass(frozen=True, kw_only=True)
class UnionSettings(PGDSettings):
    """What `afd.attacks.Union` can be told: the radii of its balls, and how one is chosen; all else is `PGDSettings`'.

    A radius of None leaves its ball out. It is untargeted.

    Attributes:
        eps: radius of the Linf ball, in units of the image, >= 0; None for no such ball.
        eps_l2: radius of the L2 ball, likewise.
        eps_l1: radius of the L1 ball, likewise.
        alpha: step size in Linf; None is 2.5 * eps / max(steps, 1).
        alpha_l2: step size in L2, likewise.
        alpha_l1: step size in L1, likewise.
        choice: what is returned for an image: of the points that PGD ends at in each ball, "worst", that of the highest
            loss (MAX of Tramèr & Boneh 2019); "average", all of them, for methods whose loss is their mean (AVG of
            theirs); "fooling", one that fools the model where there is one, else the worst, so that accuracy is that
            in the union; or "random", the one point of a ball of its own, at the cost of one attack.
    """

    eps: float | Tensor | None = None  # type: ignore[assignment]
    eps_l2: float | Tensor | None = None
    eps_l1: float | Tensor | None = None
    alpha_l2: float | Tensor | None = None
    alpha_l1: float | Tensor | None = None
    choice: Choice = "worst"

    def __post_init__(self) -> None:
        if self.norm != "Linf":
            raise InputError(
                f"norm is {self.norm!r}; a union takes no norm, but the radius of each of its balls: eps (Linf), "
                "eps_l2, eps_l1"
            )
        if not list(self._radii()):
            raise InputError("eps, eps_l2 and eps_l1 are None; a union needs a radius for at least one of its balls")
        one_of("choice", self.choice, get_args(Choice))
        if self.targeted:
            raise InputError("targeted is True; a union of balls is attacked untargeted")
        super().__post_init__()
        for name in ("alpha_l2", "alpha_l1"):
            value = getattr(self, name)
            self._set(**{name: None if value is None else inputs.size(name, value)})
        for radius, alpha in STEP_OF.items():
            if getattr(self, radius) is None and getattr(self, alpha) is not None:
                raise InputError(f"{alpha} is {getattr(self, alpha)}, but {radius} is None: there is no such ball")

    @classmethod
    def written(cls, union: str, **settings: Any) -> Self:
        """With balls that are written as Linf=8/255,L2=0.5,L1=12.

        Raises:
            InputError: as `balls_in`, or a radius is no number, or negative.
        """
        radii: dict[str, Any] = {}
        for norm, word in balls_in(union).items():
            try:
                radii[RADIUS_IN[norm]] = fraction(word)
            except ValueError as error:
                raise InputError(f"union is {union!r}, where a radius is no number: {error}") from None
        return cls(**radii, **settings)

    def _radii(self) -> Iterator[str]:
        return (name for name in RADIUS_IN.values() if getattr(self, name) is not None)

    @property
    def balls(self) -> dict[Norm, float | Tensor]:
        """See `AttackSettings`: in the order Linf, L2, L1."""
        return {norm: getattr(self, name) for norm, name in RADIUS_IN.items() if getattr(self, name) is not None}

    @property
    def copies(self) -> int:  # type: ignore[override]
        """Attacked images for each image: with "average", one for each ball."""
        return len(self.balls) if self.choice == "average" else 1

    def resolved(self) -> Self:
        """See `AttackSettings`."""
        steps = {STEP_OF[name]: self._step_size(name) for name in self._radii()}
        return replace(self, **cast(Any, steps))

    def _step_size(self, radius: str) -> float | Tensor:
        return step_size(getattr(self, STEP_OF[radius]), getattr(self, radius), self.steps)

    def pgd(self, steps: int, seed: int = 0) -> UnionSettings:
        """PGD in the same balls, with the usual step sizes: an image counts as robust if it withstands all of them."""
        radii = {name: getattr(self, name) for name in RADIUS_IN.values()}
        return UnionSettings(**radii, bounds=self.bounds, steps=steps, seed=seed, choice="fooling")

    def _attack(self) -> Callable[..., Union]:
        return Union


class Union(PGD):
    """PGD in several balls around each image: Linf, L2 and L1, those that have a radius.

    Each ball has its random start of the same seed, as `PGD` in it alone has: its point is the same. What is returned
    of them, `choice` says; `which` tells of what ball it is. "random" gives each image one ball, in turn by their
    places in the data set (`first_sample` and row), the first drawn from the seed: as many in each ball as can be, the
    same for any split of a batch, and for several processes as for one. All images are then passed together, so that
    it costs what one attack does. "average" returns [N * balls, ...], the points of an image beside each other in the
    order of `norms`.

    For "worst" and "fooling" the model is passed once more at the point of each ball. Where a loss is one value for the
    whole batch, the worst is chosen for all alike. NaN is never the worst. What is fooled is counted as `APGD` counts
    it, by the model as written, in full precision.

    Args:
        model: classifier, images -> logits [N, classes]; treated as `PGD` treats it.
        settings: by keyword; `afd.attacks.UnionSettings` says what they are.

    Attributes:
        norms: of its balls, in the order Linf, L2, L1.
        which: the ball of each image that the last call returned, as a place among `norms`, [N] int64 (or [N * balls]);
            None before.

    Raises:
        InputTypeError, InputError: as of `PGD`; or there is no ball.
    """

    eps: Any  # or None
    records = False
    which: Tensor | None = None

    @takes(UnionSettings)
    def __init__(self, model: nn.Module, settings: UnionSettings) -> None:
        own = {*SIZES, "choice"}
        of_pgd = {name: value for name, value in {**settings}.items() if name not in own}
        super().__init__(model, **of_pgd)
        self.norms, self.choice, self.copies = tuple(settings.balls), settings.choice, settings.copies
        for name in SIZES:
            setattr(self, name, getattr(settings, name))

    @property
    def alpha(self) -> Any:
        """The step size in Linf, as of `PGD`; None where there is no such ball."""
        return None if self.eps is None else step_size(self._alpha, self.eps, self.steps)

    @alpha.setter
    def alpha(self, value: float | Tensor | None) -> None:
        self._alpha = value

    def _fill_once(self, x_adv: Tensor, call: inputs.Call) -> Tensor | None:
        self.which = torch.zeros(len(x_adv), dtype=torch.int64, device=x_adv.device)
        return super()._fill_once(x_adv, call)

    def _run(self, chunk: Chunk) -> Tensor:
        aimed = self._with_loss_target(chunk)
        if self.choice == "random":
            return self._one_each(chunk, aimed)
        found = [self._in_ball(norm, chunk, aimed) for norm in self.norms]
        points = [point for point, *_ in found]
        if self.choice == "average":
            self._note(chunk, torch.arange(len(points), device=chunk.x.device).repeat(len(chunk.x)))
            return torch.stack(points, 1).flatten(0, 1)
        which = self._worst(chunk, points, [losses for _, losses in found])
        self._note(chunk, which)
        return _picked(points, which)

    def _in_ball(self, norm: Norm, chunk: Chunk, aimed: Chunk) -> tuple[Tensor, ...]:
        """Where PGD ends in one ball, and the losses [n] there, if they are asked for."""
        start = None if chunk.start is None else chunk.start.clone()
        x_adv = self._first_point(replace(chunk, start=start), self._ball_in(norm, chunk))
        return self._all_steps(partial(self._steps_in, norm), aimed, x_adv, norm)

    def _steps_in(self, norm: Norm, chunk: Chunk, x_adv: Tensor) -> tuple[Tensor, ...]:
        ball, alpha = self._ball_in(norm, chunk), self._step_in(norm, chunk)
        for step in range(self.steps):
            ball.step_(x_adv, chunk.x, self._ascent(x_adv, chunk, step)[0], alpha)
        return (x_adv,) if self.choice == "average" else (x_adv, self._losses(x_adv, chunk))

    def _worst(self, chunk: Chunk, points: Sequence[Tensor], losses: Sequence[Tensor]) -> Tensor:
        """Of which ball an image's point is to be, [n]: nothing is read by the host."""
        which = torch.zeros(len(chunk.x), dtype=torch.int64, device=chunk.x.device)
        best, fooled = torch.full_like(losses[0], -math.inf), torch.zeros_like(which, dtype=torch.bool)
        y = self._class_to_leave(chunk) if self.choice == "fooling" else None
        for place, (point, loss) in enumerate(zip(points, losses, strict=True)):
            fools = fooled if y is None else self._as_written(point).argmax(1) != y
            better = (fools & ~fooled) | ((fools == fooled) & (loss > best))
            which, best = torch.where(better, place, which), torch.where(better, loss, best)
            fooled = fooled | fools
        return which

    # --- One ball for each image --------------------------------------------------------------------------------------

    def _one_each(self, chunk: Chunk, aimed: Chunk) -> Tensor:
        """Where PGD ends with each image in a ball of its own."""
        which = self._drawn(chunk)
        self._note(chunk, which)
        starts = []
        for norm in self.norms:
            start = None if chunk.start is None else chunk.start.clone()
            starts.append(self._first_point(replace(chunk, start=start), self._ball_in(norm, chunk)))
        return self._all_steps(self._steps_each, replace(aimed, which=which), _picked(starts, which))[0]

    def _steps_each(self, chunk: Chunk, x_adv: Tensor) -> tuple[Tensor]:
        assert chunk.which is not None
        balls = [(self._ball_in(norm, chunk), self._step_in(norm, chunk)) for norm in self.norms]
        for step in range(self.steps):
            grad, _, _ = self._ascent(x_adv, chunk, step)
            x_adv = _picked([ball.step(x_adv, chunk.x, grad, alpha) for ball, alpha in balls], chunk.which)
        return (x_adv,)

    def _drawn(self, chunk: Chunk) -> Tensor:
        """The ball of each image, [n]: in turn, from one that the seed draws."""
        balls = len(self.norms)
        one = torch.zeros(1, 1, device=chunk.x.device)
        drawn = Ball("Linf", 1.0, (-1.0, 1.0)).start(one, seed=chunk.seed, first_sample=FAR)
        first = ((drawn[0, 0] + 1) * (balls / 2)).long().clamp(0, balls - 1)
        places = chunk.first_sample
        if not isinstance(places, Tensor):
            places = torch.arange(len(chunk.x), device=chunk.x.device) + places % balls
        return (places.to(first) + first) % balls

    # --- What belongs to a norm ---------------------------------------------------------------------------------------

    def _ball_in(self, norm: Norm, chunk: Chunk) -> Ball:
        return Ball(norm, chunk.of(getattr(self, RADIUS_IN[norm])), self.bounds)

    def _step_in(self, norm: Norm, chunk: Chunk) -> float | Tensor:
        radius = RADIUS_IN[norm]
        return chunk.of(step_size(getattr(self, STEP_OF[radius]), getattr(self, radius), self.steps))

    def _note(self, chunk: Chunk, which: Tensor) -> None:
        assert isinstance(chunk.rows, slice)
        assert self.which is not None
        self.which[chunk.rows.start * self.copies : chunk.rows.stop * self.copies] = which


def _picked(points: Sequence[Tensor], which: Tensor) -> Tensor:
    """Of several points for each image, all like images [n, ...], the one that a place among them names."""
    found = points[0]
    for place, point in enumerate(points[1:], 1):
        found = torch.where(rows_of(which == place, found), point, found)
    return found


# --- In words -------------------------------------------------------------------------------------------------------


def balls_in(union: str) -> dict[Norm, str]:
    """The radius in each norm of a union that is written as Linf=8/255,L2=0.5,L1=12, as it is written.

    Raises:
        InputError: it is written in another way, or names a norm twice, or one that a union has no ball in.
    """
    found: dict[Norm, str] = {}
    for word in union.split(","):
        norm, equals, radius = (one.strip() for one in word.partition("="))
        if not (norm and equals and radius):
            raise InputError(f"union is {union!r}; a union is written NORM=RADIUS,..., such as Linf=8/255,L2=0.5,L1=12")
        one_of("a norm of union", norm, RADIUS_IN)
        if norm in found:
            raise InputError(f"union is {union!r}, which names {norm} twice; it has one ball in each norm")
        found[cast(Norm, norm)] = radius
    return {norm: found[norm] for norm in RADIUS_IN if norm in found}


def words_of(settings: AttackSettings) -> str:
    """The balls of an attack, with radii that are numbers, as `balls_in` reads them."""
    return ",".join(f"{norm}={float(radius)!r}" for norm, radius in settings.balls.items())


def told(balls: Mapping[Norm, float | Tensor]) -> str:
    """Balls as a table names them: eps 0.2, or eps 0.2 in Linf, 1 in L2."""
    words = [f"{float(eps):g}" + ("" if list(balls) == ["Linf"] else f" in {norm}") for norm, eps in balls.items()]
    return f"eps {', '.join(words)}"
