"""A training step of AFD beside one of the released code: ``afd bench step``.

Both attack the same batch with Auto-PGD of as many steps, then play AFD-WGAN with SGD. On CUDA afd's step is also
timed as ``afd train --graph`` takes it: attack, passes and optimizers recorded as one CUDA graph.

Learning rates are so small that the networks stay what they are, and labels are what the network says, so that every
image is attacked in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from afd.attacks import APGDSettings
from afd.attacks.engine import evaluating
from afd.bench import base
from afd.bench.base import Benchmark, Say
from afd.bench.baselines import BASELINES, ReleasedStep, Request, adapted
from afd.bench.metering import interleaved
from afd.bench.report import Column
from afd.bench.results import Candidate, Case, Figure
from afd.errors import AfdError
from afd.methods import AFD, Execution, Step
from afd.nn import FeatureClassifier, build_model
from afd.training.recording import GraphedStep

NETWORKS: dict[str, tuple[str, tuple[int, int, int], int, float]] = {  # network, image, width and radius
    "small": ("convnet", (1, 28, 28), 16, 0.3),
    "resnet18": ("resnet18", (3, 32, 32), 64, 8 / 255),
}
RELEASED, WHOLE, OUTSIDE = "released", "whole", "outside the attack"
PRECISIONS, SCHEDULES = ("fp32", "auto"), ("simultaneous", "alternating")
WARMUP = {"cpu": 1, "cuda": 3}  # calls: a graph is recorded in the second, and its memory settles in the third
LR, SEED = 1e-12, 1  # of all players, and of the attack's starts
SETTLING = 40  # training passes after which BatchNorm's running statistics are the batch's

Parts = tuple[Callable[[], object], Callable[[], object]]
"""The whole step, and what of it comes after the attack."""


class RecordingError(AfdError):
    """A step cannot be recorded as one CUDA graph, so there is no replay to be timed."""


@dataclass(frozen=True, kw_only=True)
class StepBench(Benchmark):
    """One training step of AFD beside one of the released code."""

    name, labels, shared = "step", ("case",), ("case", "batch", "steps")
    counts, lists = ("batch", "steps"), {"schedules": SCHEDULES, "precisions": PRECISIONS}
    columns = (Column("times as fast as released", "speedup"), Column("outside the attack", "share", "{:.0%}"))

    case: Literal["small", "resnet18"] = "small"
    """Network and images: a small net on 1x28x28, or ResNet-18 on 3x32x32."""
    batch: int = 128
    """Images a batch."""
    steps: int = 10
    """Of the attack."""
    schedules: str = "simultaneous"
    """simultaneous, alternating; comma-separated."""
    precisions: str = ",".join(PRECISIONS)
    """fp32, auto; comma-separated."""

    @property
    def settings(self) -> Mapping[str, Figure]:
        """Network, images and attack."""
        return {**super().settings, "eps": NETWORKS[self.case][3]}

    @property
    def packages(self) -> Iterable[str]:
        """The released flow's attack."""
        return [BASELINES["pyautoattack"].package]

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """Two cases: whole steps, and what of them comes after the attack; then the first with the second's share.

        Raises:
            RecordingError: a step could not be recorded; after all others have been timed.
        """
        base.begin(f"building {self.case}")
        setting = Setting.of(self.case, self.batch, self.steps, device)
        asked = self.listed("schedules"), self.listed("precisions")
        found = candidates(setting, *asked, graphs=device.type == "cuda")
        refused = left_out(found, say)
        yield WHOLE, (whole := timed(WHOLE, found, self.repeats, device))
        yield OUTSIDE, (outside := timed(OUTSIDE, found, self.repeats, device))
        shares = {name: {"share": outside.medians[name] / median} for name, median in whole.medians.items()}
        yield WHOLE, Case({}, {name: Candidate(one.seconds, {**one.figures, **shares[name]})
                               for name, one in whole.candidates.items()})  # fmt: skip
        if refused:
            raise refused[0]


@dataclass(frozen=True)
class Setting:
    """A network, its batch (moved at random, for what comes after an attack), and the attack's settings."""

    model: FeatureClassifier
    x: Tensor
    x_adv: Tensor
    y: Tensor
    eps: float
    steps: int

    @classmethod
    def of(cls, name: str, batch: int, steps: int, device: torch.device) -> Setting:
        """One of `NETWORKS` with random weights and images (speed does not depend on them)."""
        kind, shape, width, eps = NETWORKS[name]
        torch.manual_seed(0)
        model = build_model(kind, shape, 10, width).to(device)
        x = torch.rand(batch, *shape, device=device)
        with torch.no_grad():
            if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
                for _ in range(SETTLING):
                    model.train()(x[:32])
            y = model.eval()(x).argmax(1)
        x_adv = (x + eps * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
        return cls(model, x, x_adv, y, eps, steps)


def candidates(setting: Setting, schedules: Sequence[str], precisions: Sequence[str], graphs: bool) -> dict[str, Parts]:
    """All ways to take the step by name, afd's also as one graph if that is asked for."""
    found = {RELEASED: released(setting)}
    for schedule, precision in product(schedules, precisions):
        name = f"afd {schedule} {precision}"
        found[name] = ours(setting, precision, schedule)
        if graphs:
            found[f"{name} graph"] = recorded(setting, precision, schedule)
    return found


def released(setting: Setting) -> Parts:
    """The released code's, whose attack finds x' in evaluation mode with frozen parameters."""
    model = copy.deepcopy(setting.model)
    request = Request("apgd", "Linf", setting.eps, alpha=setting.eps, steps=setting.steps)
    step, attack = ReleasedStep(model, LR), adapted("pyautoattack", model, request)

    def whole() -> None:
        with evaluating(model):
            x_adv = attack(setting.x, setting.y).detach()
        step(setting.x, setting.y, x_adv)

    return whole, partial(step, setting.x, setting.y, setting.x_adv)


def ours(setting: Setting, precision: str, schedule: str) -> Parts:
    """afd's."""
    model, step = built(setting, precision, schedule)

    def taken(**given: Any) -> None:
        model.train()
        step(setting.x, setting.y, **given)

    return partial(taken, seed=SEED), partial(taken, x_adv=setting.x_adv)


def recorded(setting: Setting, precision: str, schedule: str) -> Parts:
    """afd's as one CUDA graph, as the trainer replays it: the first call is eager, the second records.

    A call raises RecordingError where it would otherwise go on without its graph.
    """
    model, step = built(setting, precision, schedule)
    model.train()
    graphed = GraphedStep(model, step, setting.x.device)

    def taken(part: str, x_adv: Tensor | None) -> None:
        graphed(setting.x, setting.y, seed=SEED, x_adv=x_adv)
        if graphed.cache.refused:
            name = f"the {schedule} step in {precision} ({part})"
            raise RecordingError(f"{name} cannot be recorded as one CUDA graph; the warning above says why")

    return partial(taken, WHOLE, None), partial(taken, OUTSIDE, setting.x_adv)


def built(setting: Setting, precision: str, schedule: str) -> tuple[FeatureClassifier, Step]:
    """A copy of the network, and the step that attacks and trains it."""
    execution = Execution(precision)
    model = execution.prepare(copy.deepcopy(setting.model))
    settings: dict[str, Any] = {"lr": LR, "lr_discriminator": LR, "lr_features": LR, "schedule": schedule}
    step = AFD(attack=APGDSettings(eps=setting.eps, steps=setting.steps), **settings).build(model, execution)
    step.looks = 0  # as a trainer's
    return model, step


def left_out(found: dict[str, Parts], say: Say) -> list[RecordingError]:
    """Takes out, with a word, the graphs that cannot be recorded: the others are worth timing all the same."""
    refused = []
    for name in [name for name in found if name.endswith("graph")]:
        try:
            for part in found[name]:
                part(), part()  # the second records
        except RecordingError as error:
            say(f"left out: {error}")
            refused.append(error)
            del found[name]
    return refused


def timed(part: str, found: Mapping[str, Parts], repeats: int, device: torch.device) -> Case:
    """Whole steps, or what comes after the attack, by everybody in turn."""
    base.begin(part)
    calls = {name: parts[part == OUTSIDE] for name, parts in found.items()}
    times = interleaved(calls, repeats, WARMUP[device.type], device)
    return Case({}, {name: Candidate(taken, {"speedup": times[RELEASED].p50 / taken.p50, "share": None})
                     for name, taken in times.items()})  # fmt: skip
