"""What changes over a run: the learning rates, the attack's radius, and an average of the weights.

A schedule of the learning rates is a function from progress, in [0, 1), to a factor of every rate. All optimizers
follow one, so that the ratios of the players' rates stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from afd.attacks.base import GradientAttack
from afd.attacks.settings import SIZES
from afd.errors import InputError, InputTypeError, number, one_of
from afd.execution import as_torch_starts
from afd.methods import Method, Step
from afd.methods.attacking import GivenAttack
from afd.methods.base import live_number

Schedule = Callable[[float], float]


def step(milestones: Sequence[float] = (0.5, 5 / 6), factor: float = 0.1) -> Schedule:
    """Multiplies by `factor` at each milestone, a share of the run (the paper's CIFAR: epochs 150 and 250 of 300).

    Raises:
        InputError: a milestone outside (0, 1].
    """
    if any(not 0 < share <= 1 for share in milestones):
        raise InputError(f"milestones are {tuple(milestones)}; each must be a share of the epochs, in (0, 1]")
    return lambda progress: factor ** sum(progress >= share for share in milestones)


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def one_cycle(progress: float, rise: float = 0.3, first: float = 1 / 25, last: float = 1e-4) -> float:
    """From `first` to 1 in the `rise`, then down to `last`, both along half a cosine (Smith & Topin 2018).

    The momentum stays: all players share it.
    """
    if progress < rise:
        return 1 - (1 - first) * cosine(progress / rise)
    return last + (1 - last) * cosine((progress - rise) / (1 - rise))


SCHEDULES: dict[str, Schedule] = {"step": step(), "cosine": cosine, "one-cycle": one_cycle}


def schedule_named(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or the user's own as it is.

    Raises:
        InputError: unknown name.
    """
    if callable(schedule):
        return schedule
    one_of("schedule", schedule, SCHEDULES)
    return SCHEDULES[schedule]


class Rates:
    """The learning rates of several optimizers in each step of a run.

    Set rather than stepped: there is no state that could be lost, and a player that sits out a step misses nothing.

    Args:
        optimizers: by name; their rates now are those of the factor 1.
        schedule: of progress.
        steps: in the whole run.
        warmup: steps in which the factor grows linearly to the schedule's (Goyal et al. 2017).

    Attributes:
        scale: of all factors.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], schedule: Schedule, steps: int, warmup: int = 0) -> None:
        self.optimizers, self.schedule, self.steps, self.warmup = optimizers, schedule, steps, warmup
        self.scale = 1.0
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", float(group["lr"]))

    def factor(self, done: int) -> float:
        """What the schedule says for the step after `done` ones; (done + 1) / warmup of that in the warm-up.

        Raises:
            InputTypeError, InputError: that is no finite number.
        """
        progress = done / self.steps
        factor = self.schedule(progress)
        if not isinstance(factor, (Real, Tensor)):
            raise InputTypeError(f"schedule({progress:g}) is {factor!r}; it must be a number, a factor of the rates")
        if not math.isfinite(factor):
            raise InputError(f"schedule({progress:g}) is {float(factor)}; it must be a finite factor of the rates")
        return self.scale * float(factor) * (min(1.0, (done + 1) / self.warmup) if self.warmup else 1.0)

    def set(self, done: int) -> None:
        """Sets all rates for the step after `done` ones."""
        factor = self.factor(done)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                rate = group["initial_lr"] * factor
                if isinstance(group["lr"], Tensor):  # which a recorded step reads, so it stays where it is
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def of_step(self, number: int) -> dict[str, float]:
        """Each optimizer's rate in a step, counted from 1."""
        factor = self.factor(max(number, 1) - 1)
        return {name: o.param_groups[0]["initial_lr"] * factor for name, o in self.optimizers.items()}


# --- The attack's radius --------------------------------------------------------------------------------------------


class EpsWarmup:
    """Scales the radius (or radii) and step sizes of a step's attack by (step + 1) / steps in the first steps.

    The numbers lie on the device, so that a recorded step follows them.

    Args:
        method: whose attack grows.
        step: of the method; it goes on with these numbers.
        steps: until the attack has its full radius; 0 leaves it alone.

    Raises:
        InputError: the attack has no `eps`.
    """

    def __init__(self, method: Method, step: Step, steps: int) -> None:
        self.steps, self.grown = steps, False
        self._fill: list[Callable[[float], object]] = []
        step.adopt(method)
        if not steps:
            return
        if method.attack is None:
            core = getattr(method, "core", method)
            if hasattr(core, "eps"):  # it attacks by itself
                self._grow(step, core, "")
        elif isinstance(method.attack, GivenAttack):
            self._follow(step.attacks.of(method.attack))
        else:
            self._grow(step, method.attack.resolved(), "attack.")

    def _grow(self, step: Step, full: Any, within: str) -> None:
        """Has the sizes of settings grow, as far as they have any."""
        for name in (name for name in SIZES if getattr(full, name, None) is not None):
            value = getattr(full, name)
            self._fill.append(partial(_fill, step.live(f"{within}{name}", value), value))

    def _follow(self, attack: Any) -> None:
        """An attack that somebody has built has its numbers set."""
        if not hasattr(attack, "eps"):
            raise InputError(f"attack is a {type(attack).__name__}, which has no eps that a warm-up could scale")
        for name in (name for name in SIZES if getattr(attack, name, None) is not None):
            value = getattr(attack, name)
            if not isinstance(attack, GradientAttack):  # takes numbers, as far as anybody knows
                self._fill.append(partial(_set, attack, name, value))
                continue
            held = live_number(value, attack.model)
            setattr(attack, name, held)
            self._fill.append(partial(_fill, held, value))

    def share(self, done: int) -> float:
        """What share of its own radius the attack has in the step after `done` ones."""
        return min(1.0, (done + 1) / self.steps) if self.steps else 1.0

    def at(self, done: int) -> None:
        """Puts the attack's numbers where they are in the step after `done` ones."""
        share = self.share(done)
        if not (self.grown and share == 1):
            for fill in self._fill:
                fill(share)
        self.grown = share == 1


def _scaled(full: Any, share: float) -> Any:
    return full if share == 1 else share * full


def _fill(held: Tensor, full: float | Tensor, share: float) -> None:
    value = _scaled(full, share)
    held.copy_(value) if isinstance(value, Tensor) else held.fill_(value)


def _set(attack: Any, name: str, full: Any, share: float) -> None:
    setattr(attack, name, _scaled(full, share))


# --- The average of the weights -------------------------------------------------------------------------------------


WIDE = 4  # bytes of a number that averages are kept in
BUFFERS = ("averaged", "copied", "recomputed")
FRESH = "deepcopy protocol"  # of torch's error on a tensor that autograd computed


class Average(AveragedModel):
    """A copy of a model that follows it: average ← decay * average + (1 - decay) * weights.

    With a warm-up, the decay of the update after t ones is min(decay, (1 + t) / (10 + t)), as in Rebuffi et al. (2021):
    an average that remembers for longer than it has lived is the model of the beginning.

    Floating-point parameters and buffers are averaged, each tensor once however many modules share it. Other buffers,
    such as counts and tables of positions, are not numbers between which anything lies: they are the model's own. The
    average of bfloat16 and float16 tensors is kept in float32 besides (`wide`): a step of 1 - decay is less than the
    distance between two of their values, so that an average in their own dtype would stay where it began.

    Between infinity and itself nothing lies either, which a mask of -inf is made of: what is not finite, here or there,
    is copied. Trainable parameters and BatchNorm's statistics are not looked at for it in every step.

    Args:
        model: that is followed.
        decay: in [0, 1).
        warmup: whether the decay grows to that.
        copy_buffers: whether all buffers are the model's own, as torch's `AveragedModel` has them by default.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False, copy_buffers: bool = False) -> None:
        # its counter stays on the CPU, where asking for it waits for no device
        with as_torch_starts(), _leaves(model):
            super().__init__(model)
        self.decay, self.warmup = decay, warmup
        named = dict(_named_tensors(self.module))
        for tensor in named.values():
            if torch._debug_has_internal_overlap(tensor):  # an expanded one cannot be written to
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        narrow = (name for name, one in named.items() if one.is_floating_point() and one.element_size() < WIDE)
        self.wide = {name: named[name].detach().float() for name in narrow}
        self.careful = _seldom_finite(self.module)
        self.copied = {name for name, _ in self.module.named_buffers()} if copy_buffers else set()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the model's weights in; the first ones are the average, unless the decay grows from a tenth."""
        updates = int(self.n_averaged)
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay
        followed = dict(_named_tensors(model))
        begins = self.copied if updates or self.warmup else followed.keys()
        numbers: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        looked_at: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, own in _named_tensors(self.module):
            kept, new = self.wide.get(name, own), followed[name].detach()
            if name in begins or not (own.is_floating_point() or own.is_complex()):
                kept.copy_(new)
                continue
            averages, weights = numbers.setdefault((kept.device, kept.dtype), ([], []))
            averages.append(kept.detach())
            weights.append(new.to(kept))
            if name in self.careful:
                looked_at.append((kept, weights[-1], kept.isfinite() & weights[-1].isfinite()))
        for averages, weights in numbers.values():
            torch._foreach_lerp_(averages, weights, 1 - decay)
        for kept, new, finite in looked_at:
            kept.copy_(torch.where(finite, kept, new))
        for name, own in _named_tensors(self.module):
            if name in self.wide:
                own.copy_(self.wide[name])
        self.n_averaged += 1

    @torch.no_grad()
    def take_buffers(self) -> None:
        """Goes on from the copy's buffers as somebody else has set them."""
        for name, buffer in self.module.named_buffers():
            if name in self.wide:
                self.wide[name].copy_(buffer)


def averaged(model: nn.Module, decay: float, *, warmup: bool = False, buffers: str = "averaged") -> Average:
    """A copy of `model` that follows it.

    Args:
        model: that is followed.
        decay: in [0, 1).
        warmup: as of `Average`.
        buffers: one of `BUFFERS`; those that are to be recomputed are copied until then.

    Raises:
        InputTypeError: decay is no number.
        InputError: decay is not in [0, 1), buffers is none of these, or the model cannot be copied.
    """
    one_of("ema_buffers", buffers, BUFFERS)
    number("ema", decay, -math.inf)
    if not 0 <= decay < 1:
        raise InputError(f"ema is {decay}; it must be in [0, 1)")
    try:
        return Average(model, decay, warmup=warmup, copy_buffers=buffers != "averaged")
    except (RuntimeError, TypeError) as error:  # of the deepcopy
        why = "a tensor that it holds was computed by autograd" if FRESH in str(error) else " ".join(str(error).split())
        raise InputError(
            f"ema averages a copy of the model, which cannot be copied: {why}; detach or drop it"
        ) from error


@contextmanager
def _leaves(model: nn.Module) -> Iterator[None]:
    """Inside, what hooks have computed of parameters does not hang on them, so that it can be copied.

    The older `weight_norm` and `spectral_norm`, and pruning, keep a layer's weight as such an attribute, and compute it
    anew before every pass.
    """
    held = [
        (vars(module), name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for place, name, value in held:
        place[name] = value.detach()
    try:
        yield
    finally:
        for place, name, value in held:
            place[name] = value


def _seldom_finite(model: nn.Module) -> set[str]:
    """Names of tensors that may hold infinities: buffers but for BatchNorm's, and parameters that do so now."""
    statistics = {
        id(buffer) for module in model.modules() if isinstance(module, _NormBase) for buffer in module.buffers(False)
    }
    found = {name for name, buffer in model.named_buffers() if id(buffer) not in statistics}
    names, parameters = [], []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            names.append(name)
            values = parameter.detach()
            parameters.append((values if values.is_complex() else values.float()).isfinite().all().cpu())
    return found | {name for name, finite in zip(names, parameters, strict=True) if not finite}


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    return chain(model.named_parameters(), model.named_buffers())
