"""Projected gradient descent (Madry et al. 2018), and what is made of its loop: FGSM and MIM."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from afd.attacks import inputs
from afd.attacks.ball import Ball
from afd.attacks.base import GradientAttack
from afd.attacks.inputs import Chunk, rows_of
from afd.attacks.settings import AttackSettings, step_size, takes
from afd.errors import InputError, one_of

Init = Literal["uniform", "gaussian", "coin-flip"]
GAUSSIAN_SCALE = 0.001  # of TRADES (Zhang et al. 2019) and MART (Wang et al. 2020)


@dataclass(frozen=True, kw_only=True)
class PGDSettings(AttackSettings):
    """What `afd.attacks.PGD` can be told, beside `AttackSettings`.

    Attributes:
        alpha: step size, in units of the image; None is 2.5 * eps / max(steps, 1). Of the same kinds as eps.
        steps: number of steps, >= 0.
        random_start: start at a random point instead of at x. A call may be given its start.
        init: the random point: "uniform" in the ball; "gaussian", x + start_scale * N(0, 1), not projected before the
            first step (the released code of TRADES and MART); or "coin-flip", each element of x moved by start_scale up
            or down, projected (GAT). Drawn from seed, sample and element, so that it is equal for any split of the
            batch.
        start_scale: of a start that is not uniform, in units of the image, >= 0; None is 0.001 for "gaussian", eps for
            "coin-flip".
        seed: of the random start; the same seed gives the same result.
    """

    alpha: float | Tensor | None = None
    steps: int = 10
    random_start: bool = True
    init: Init = "uniform"
    start_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_steps(self)
        random_start = inputs.truth("random_start", self.random_start)
        scale = _start_scale(self.init, self.start_scale, random_start)
        self._set(random_start=random_start, start_scale=scale, seed=inputs.counter("seed", self.seed))

    def resolved(self) -> Self:
        """See `AttackSettings`."""
        return replace(self, alpha=step_size(self.alpha, self.eps, self.steps))

    def _attack(self) -> Callable[..., PGD]:
        return PGD


class PGD(GradientAttack):
    """`steps` steps of steepest ascent inside the ball of radius eps around each image.

    The model runs in evaluation mode (its BatchNorm layers as `batchnorm` says) with its parameters frozen and is left
    exactly as it was found. Images live in `bounds`; any normalisation belongs inside the model.

    Args:
        model: classifier, images -> logits [N, classes].
        settings: by keyword; `afd.attacks.PGDSettings` says what they are. A step size that is not given is 2/255 here.

    On CUDA all steps are recorded in one graph and replayed (`afd.attacks.replay`). `torch.compile(model)` may be
    attacked like any other model.

    Raises:
        InputTypeError: the model is no module, or a setting of another type.
        InputError: a setting out of its range.
    """

    records = True

    @takes(PGDSettings, alpha=2 / 255)
    def __init__(self, model: nn.Module, settings: PGDSettings) -> None:
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

    def _run(self, chunk: Chunk) -> Tensor:
        x_adv = self._first_point(chunk, self._ball(chunk))
        (x_adv,) = self._all_steps(self._steps_fn, self._with_loss_target(chunk), x_adv)
        return x_adv

    def _first_point(self, chunk: Chunk, ball: Ball) -> Tensor:
        """Where the steps in a ball begin, like chunk.x: in the memory of chunk.start, if there is one."""
        if chunk.start is not None:
            x_adv = chunk.start
        elif self.random_start:
            x_adv = random_point(self.init, self.start_scale, chunk, ball)
        else:
            x_adv = chunk.x.clone()
        if not self.steps and (chunk.start is not None or self.init != "uniform"):  # no step will project it
            ball.project_(x_adv, chunk.x)
        return x_adv

    def _steps_fn(self, chunk: Chunk, x_adv: Tensor) -> tuple[Tensor]:
        ball, alpha = self._ball(chunk), chunk.of(self.alpha, -1.0 if self.targeted else 1.0)
        direction = self._directions(x_adv)
        for step in range(self.steps):
            grad, losses, _ = self._ascent(x_adv, chunk, step)
            self._record(step, chunk, x_adv, losses)
            ball.step_(x_adv, chunk.x, direction(grad), alpha)
        if self.record_trajectory:
            self._record(self.steps, chunk, x_adv, self._losses(x_adv, chunk))
        return (x_adv,)

    def _directions(self, _x_adv: Tensor) -> Callable[[Tensor], Tensor]:
        """What is told the gradient at each point, and says along what the next step ascends."""
        return lambda grad: grad


def _set_steps(settings: PGDSettings | MIMSettings) -> None:
    alpha = None if settings.alpha is None else inputs.size("alpha", settings.alpha)
    settings._set(steps=inputs.count("steps", settings.steps, 0), alpha=alpha)


# --- Random starts --------------------------------------------------------------------------------------------------


def _start_scale(init: str, scale: float | None, random_start: bool) -> float | None:
    """The scale; raises InputError or InputTypeError unless such a start can be made."""
    one_of("init", init, get_args(Init))
    if init != "uniform" and not random_start:
        raise InputError(f"init is {init!r} and random_start is False; without a random start, init is 'uniform'")
    if scale is None:
        return None
    if init == "uniform":
        raise InputError(f"start_scale is {scale}; init 'uniform' takes none, it fills the ball of radius eps")
    return inputs.number("start_scale", scale, 0.0)


def random_point(init: str, scale: float | None, chunk: Chunk, ball: Ball) -> Tensor:
    """A random start around each image, drawn by sample and element, so that it is equal for any split of a batch.

    Args:
        init: "uniform" in the ball, clamped to the bounds; "gaussian", x + scale * N(0, 1) as it comes; or "coin-flip",
            x ± scale, projected onto ball and bounds.
        scale: of the last two; None is 0.001, and the radius.
        chunk: the images, the seed, and their place in the batch.
        ball: around them.

    Returns:
        [n, ...] like chunk.x.
    """
    x = chunk.x
    draw: dict[str, Any] = {"seed": chunk.seed, "first_sample": chunk.first_sample}
    if init == "uniform":
        return ball.start(x, **draw)
    unit = Ball("Linf", 1.0, (-1.0, 1.0)).start(torch.zeros_like(x), **draw)  # never 0, nor ±1
    if init == "gaussian":
        # in float64: rounded to float32, it does not show how many elements a loop takes at a time
        normal: Tensor = torch.special.erfinv(unit.double()).mul_(math.sqrt(2.0)).to(x.dtype)
        return x + (GAUSSIAN_SCALE if scale is None else scale) * normal
    length = ball.eps if scale is None else scale
    moved = x + unit.sign() * (rows_of(length, x) if isinstance(length, Tensor) else length)
    return ball.project_(moved, x)


# --- One step, and steps with momentum ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FGSMSettings(AttackSettings):
    """What `afd.attacks.FGSM` can be told: `AttackSettings`, eps being the length of the step."""

    def _attack(self) -> Callable[..., FGSM]:
        return FGSM


class FGSM(PGD):
    """The fast gradient sign method (Goodfellow et al. 2015): one step of length eps from x.

    In Linf that is clamp(x + eps * sign(∇ loss)), in L2 and L1 as `ops.pgd_step` steps. The model is treated as `PGD`
    treats it.

    Args:
        model: classifier, images -> logits [N, classes].
        settings: by keyword; `afd.attacks.FGSMSettings` says what they are.

    Raises:
        InputTypeError, InputError: as of `PGD`.
    """

    @takes(FGSMSettings)
    def __init__(self, model: nn.Module, settings: FGSMSettings) -> None:
        super().__init__(model, **settings, alpha=settings.eps, steps=1, random_start=False)


@dataclass(frozen=True, kw_only=True)
class MIMSettings(AttackSettings):
    """What `afd.attacks.MIM` can be told, beside `AttackSettings`.

    Attributes:
        alpha: step size, as in `PGDSettings`.
        steps: number of steps, >= 0.
        decay: μ, of the gathered gradient, >= 0.
    """

    alpha: float | Tensor | None = None
    steps: int = 10
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_steps(self)
        self._set(decay=inputs.number("decay", self.decay, 0.0))

    def resolved(self) -> Self:
        """See `AttackSettings`."""
        return replace(self, alpha=step_size(self.alpha, self.eps, self.steps))

    def _attack(self) -> Callable[..., MIM]:
        return MIM


class MIM(PGD):
    """The momentum iterative method (Dong et al. 2018): steps along g ← decay * g + ∇ / mean|∇|, from x.

    The paper divides by the sum of |∇| instead of its mean; the direction of g is the same. Each gradient is divided
    by its largest magnitude first, so that tiny and huge ones count alike; one that is zero adds nothing. NaN counts as
    0 and infinity as the largest number. The model is treated as `PGD` treats it.

    Args:
        model: classifier, images -> logits [N, classes].
        settings: by keyword; `afd.attacks.MIMSettings` says what they are. A step size that is not given is 2/255 here.

    Raises:
        InputTypeError, InputError: as of `PGD`.
    """

    @takes(MIMSettings, alpha=2 / 255)
    def __init__(self, model: nn.Module, settings: MIMSettings) -> None:
        of_pgd = dict(settings)
        self.decay: float = of_pgd.pop("decay")
        super().__init__(model, **of_pgd, random_start=False)

    def _directions(self, x_adv: Tensor) -> Callable[[Tensor], Tensor]:
        gathered = torch.zeros_like(x_adv)
        return lambda grad: gathered.mul_(self.decay).add_(_of_mean_one(grad))


def _of_mean_one(grad: Tensor) -> Tensor:
    """Each sample's gradient scaled to a mean magnitude of 1; zero stays zero, and NaN spoils nothing else."""
    grad = grad.nan_to_num()
    images = tuple(range(1, grad.dim()))
    largest = grad.abs().amax(images, keepdim=True)
    scaled = grad / largest.where(largest > 0, torch.ones_like(largest))
    mean = scaled.abs().mean(images, keepdim=True)
    return scaled / mean.where(mean > 0, torch.ones_like(mean))
