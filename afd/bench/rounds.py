"""One AFD training round beside one of the released code: ``afd bench round``.

Both attack the same batch with Auto-PGD of as many steps, then play AFD-WGAN with SGD. Learning rates are so small that
the networks stay what they are, and labels are what the network says, so that every image is attacked in every round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from afd.attacks import APGD
from afd.bench.document import Candidate, Figure
from afd.bench.document import Case as Measured
from afd.bench.peers import PEERS, adapted
from afd.bench.program import Benchmark, Say, listed, reached
from afd.bench.released import ReleasedRound
from afd.bench.request import Request
from afd.bench.show import Column
from afd.bench.timing import Timing, interleaved
from afd.errors import at_least
from afd.methods import AFD, Execution
from afd.nn import FeatureClassifier, build_model

LR = 1e-12
RELEASED = "released"
PRECISIONS, SCHEDULES = ("fp32", "auto"), ("simultaneous", "alternating")
WHOLE, OUTSIDE = "whole", "outside the attack"
SETTLING = 40  # training passes after which BatchNorm's running statistics are the batch's


@dataclass(frozen=True)
class Case:
    """A network, its batch (moved at random, for what comes after an attack), and the attack's settings."""

    name: str
    model: FeatureClassifier
    x: Tensor
    x_adv: Tensor
    y: Tensor
    eps: float
    steps: int


@dataclass(frozen=True)
class Bars:
    """How many times as fast as the released round a round must be, by precision."""

    fp32: float
    auto: float


CASES: dict[str, tuple[str, tuple[int, int, int], int, float, Bars]] = {
    "small": ("convnet", (1, 28, 28), 16, 0.3, Bars(1.7, 2.5)),
    "resnet18": ("resnet18", (3, 32, 32), 64, 8 / 255, Bars(1.15, 2.4)),
}
OUTSIDE_BAR = 2.0  # the released time outside the attack over ours


def case(name: str, batch: int, steps: int, device: torch.device) -> Case:
    """One of `CASES` with random weights and images (speed does not depend on them)."""
    kind, shape, width, eps, _ = CASES[name]
    torch.manual_seed(0)
    model = build_model(kind, shape, 10, width).to(device)
    x = torch.rand(batch, *shape, device=device)
    with torch.no_grad():
        if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            for _ in range(SETTLING):
                model.train()(x[:32])
        y = model.eval()(x).argmax(1)
    x_adv = (x + eps * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
    return Case(name, model, x, x_adv, y, eps, steps)


Round = tuple[Callable[[], object], Callable[[], object]]
"""The whole round, and what of it comes after the attack."""


def released(case: Case) -> Round:
    """The released code's."""
    model = copy.deepcopy(case.model)
    request = Request("apgd", "Linf", case.eps, alpha=case.eps, steps=case.steps)
    round_, attack = ReleasedRound(model, LR), adapted("pyautoattack", model, request)

    def whole() -> None:
        round_.step(case.x, case.y, round_.attacked(attack, case.x, case.y))

    return whole, partial(round_.step, case.x, case.y, case.x_adv)


def ours(case: Case, precision: str, schedule: str) -> Round:
    """afd's."""
    execution = Execution(precision)
    model = execution.prepare(copy.deepcopy(case.model))
    rates: dict[str, Any] = {"lr": LR, "lr_discriminator": LR, "lr_features": LR}
    round_ = AFD(schedule=schedule, **rates).build(model, execution)
    attack = APGD(model, eps=case.eps, steps=case.steps, precision=precision)

    def whole() -> None:
        model.train()
        round_.step(case.x, case.y, attack(case.x, case.y))

    def outside() -> None:
        model.train()
        round_.step(case.x, case.y, case.x_adv)

    return whole, outside


def measure(
    case: Case, rounds: int, schedules: Sequence[str], precisions: Sequence[str], device: torch.device
) -> dict[str, dict[str, Timing]]:
    """Times of whole rounds and of what comes after the attack, by candidate."""
    candidates = {RELEASED: released(case)}
    for schedule in schedules:
        for precision in precisions:
            candidates[f"afd {schedule} {precision}"] = ours(case, precision, schedule)
    return {
        part: interleaved({name: pair[i] for name, pair in candidates.items()}, rounds, warmup=1, device=device)
        for i, part in enumerate((WHOLE, OUTSIDE))
    }


@dataclass(frozen=True, kw_only=True)
class RoundBench(Benchmark):
    """One training round of AFD beside one of the released code."""

    name = "round"
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
    def subject(self) -> str:
        """The network."""
        return self.case

    @property
    def settings(self) -> Mapping[str, Figure]:
        """Network, images and attack."""
        return {"case": self.case, "batch": self.batch, "steps": self.steps, "eps": CASES[self.case][3]}

    @property
    def packages(self) -> Iterable[str]:
        """The released flow's attack."""
        return [PEERS["pyautoattack"].package]

    def measure(self, device: torch.device, say: Say) -> Mapping[str, Measured]:
        """Two cases: whole rounds, and what of them comes after the attack."""
        del say
        at_least("batch", self.batch, 1)
        at_least("steps", self.steps, 1)
        schedules = listed("schedules", self.schedules, SCHEDULES)
        precisions = listed("precisions", self.precisions, PRECISIONS)
        chosen = case(self.case, self.batch, self.steps, device)
        times = measure(chosen, self.rounds, schedules, precisions, device)
        return {
            part: Measured({}, {name: Candidate(time, _figures(name, part, times)) for name, time in taken.items()})
            for part, taken in times.items()
        }

    def remarks(self, cases: Mapping[str, Measured]) -> Iterable[str]:
        """Which bars each candidate reaches."""
        bars = CASES[self.case][-1]
        for name in [other for other in cases[WHOLE].candidates if other != RELEASED]:
            bar = getattr(bars, name.split()[-1])
            theirs, own = (
                [cases[part].candidates[who].median for part in (WHOLE, OUTSIDE)] for who in (RELEASED, name)
            )
            whole, outside = (slow / fast for slow, fast in zip(theirs, own, strict=True))
            met = {f"{bar:g}x the released round": whole >= bar, f"{OUTSIDE_BAR:g}x outside": outside >= OUTSIDE_BAR}
            yield f"{name}: {reached(met)}"


def _figures(name: str, part: str, times: Mapping[str, Mapping[str, Timing]]) -> dict[str, Figure]:
    taken = times[part]
    share = times[OUTSIDE][name].p50 / times[WHOLE][name].p50
    return {"speedup": taken[RELEASED].p50 / taken[name].p50, "share": share if part == WHOLE else None}
