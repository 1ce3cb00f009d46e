"""The ways to play one training round that ``afd bench round`` times: the released code's, and afd's own.

Learning rates are so small that the networks stay what they are, and labels are what the network says, so that every
image is attacked in every round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from afd.attacks.settings import APGDSettings
from afd.bench.peers import adapted
from afd.bench.released import ReleasedRound
from afd.bench.request import Request
from afd.errors import AfdError
from afd.methods import AFD, Execution, Step
from afd.nn import FeatureClassifier, build_model
from afd.training.recording import Recordings

LR = 1e-12
SEED = 1  # of the attack's starts
WHOLE, OUTSIDE = "whole", "outside the attack"
SETTLING = 40  # training passes after which BatchNorm's running statistics are the batch's


class RecordingError(AfdError):
    """A round cannot be recorded as one CUDA graph, so there is no replay to be timed."""


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


Played = tuple[Callable[[], object], Callable[[], object]]
"""The whole round, and what of it comes after the attack."""


def released(case: Case) -> Played:
    """The released code's."""
    model = copy.deepcopy(case.model)
    request = Request("apgd", "Linf", case.eps, alpha=case.eps, steps=case.steps)
    round_, attack = ReleasedRound(model, LR), adapted("pyautoattack", model, request)

    def whole() -> None:
        round_.step(case.x, case.y, round_.attacked(attack, case.x, case.y))

    return whole, partial(round_.step, case.x, case.y, case.x_adv)


def ours(case: Case, precision: str, schedule: str) -> Played:
    """afd's."""
    model, step = built(case, precision, schedule)

    def whole() -> None:
        model.train()
        step(case.x, case.y, seed=SEED)

    def outside() -> None:
        model.train()
        step(case.x, case.y, x_adv=case.x_adv)

    return whole, outside


def recorded(case: Case, precision: str, schedule: str) -> Played:
    """afd's as one CUDA graph, as the trainer replays it: the first call is eager, the second records.

    Raises:
        RecordingError: by the calls, which would otherwise go on without their graph.
    """
    model, step = built(case, precision, schedule)
    model.train()
    recordings = Recordings(model, step, case.x.device)

    def played(part: str, x_adv: Tensor | None) -> None:
        recordings(case.x, case.y, seed=SEED, x_adv=x_adv)
        if recordings.refused:
            name = f"the {schedule} round in {precision} ({part})"
            raise RecordingError(f"{name} cannot be recorded as one CUDA graph; the warning above says why")

    return partial(played, WHOLE, None), partial(played, OUTSIDE, case.x_adv)


def built(case: Case, precision: str, schedule: str) -> tuple[FeatureClassifier, Step]:
    """A copy of the network, and the step that attacks and trains it."""
    execution = Execution(precision)
    model = execution.prepare(copy.deepcopy(case.model))
    settings: dict[str, Any] = {"lr": LR, "lr_discriminator": LR, "lr_features": LR, "schedule": schedule}
    attack = APGDSettings(eps=case.eps, steps=case.steps)
    step = AFD(attack=attack, **settings).build(model, execution)
    step.looks = 0  # as a trainer's
    return model, step
