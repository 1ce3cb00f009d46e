"""One AFD training round beside one of the released code: ``python -m afd.bench.rounds``.

Both attack the same batch with Auto-PGD of as many steps, then play AFD-WGAN with SGD. Learning rates are so small that
the networks stay what they are, and labels are what the network says, so that every image is attacked in every round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from afd.attacks import APGD
from afd.bench.released import ReleasedRound, apgd
from afd.bench.timing import CPU, Timing, device_name, interleaved, record, slug
from afd.methods import AFD, Execution
from afd.nn import FeatureClassifier, build_model

LR = 1e-12
RELEASED = "released"
PRECISIONS = ("fp32", "auto")
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
    round_, attack = ReleasedRound(model, LR), apgd(model, case.eps, case.steps)

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
    case: Case, rounds: int, schedules: list[str], precisions: list[str], device: torch.device
) -> dict[str, dict[str, Timing]]:
    """Times of whole rounds and of what comes after the attack, by candidate."""
    candidates = {RELEASED: released(case)}
    for schedule in schedules:
        for precision in precisions:
            candidates[f"afd {schedule} {precision}"] = ours(case, precision, schedule)
    parts = {"whole": 0, "outside the attack": 1}
    return {
        part: interleaved({name: pair[i] for name, pair in candidates.items()}, rounds, warmup=0, device=device)
        for part, i in parts.items()
    }


def table(times: dict[str, dict[str, Timing]], title: str) -> Table:
    """One row a candidate and part."""
    shown = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("p20 s", "p50 s", "p80 s", "times as fast as released"):
        shown.add_column(heading, justify="right")
    for part, taken in times.items():
        shown.add_row(f"[bold]{part}")
        for name, time in taken.items():
            seconds = (f"{value:.4f}" for value in (time.p20, time.p50, time.p80))
            shown.add_row(f"  {name}", *seconds, f"{taken[RELEASED].p50 / time.p50:.2f}")
    return shown


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(prog="python -m afd.bench.rounds", description="Times AFD rounds side by side.")
    parser.add_argument("--case", choices=sorted(CASES), default="small", help="network and images")
    parser.add_argument("--batch", type=int, default=128, help="images a batch")
    parser.add_argument("--steps", type=int, default=10, help="attack steps")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each")
    parser.add_argument("--schedules", nargs="+", default=["simultaneous"], help="simultaneous, alternating")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="fp32, auto")
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/rounds-<case>-<device>.json)")
    options = parser.parse_args()
    console, device = Console(), options.device
    chosen = case(options.case, options.batch, options.steps, device)
    times = measure(chosen, options.rounds, options.schedules, options.precisions, device)
    size = "x".join(str(length) for length in chosen.x.shape)
    threads = torch.get_num_threads()
    console.print(
        table(times, f"{options.case} {size}, APGD-{options.steps}, {device_name(device)}, {threads} threads")
    )
    bars, whole, outside = CASES[options.case][-1], times["whole"], times["outside the attack"]
    for schedule in options.schedules:
        for precision in options.precisions:
            bar, name = getattr(bars, precision), f"afd {schedule} {precision}"
            speedup, beyond = (t[RELEASED].p50 / t[name].p50 for t in (whole, outside))
            verdicts = ("yes" if speedup >= bar else "NO", "yes" if beyond >= OUTSIDE_BAR else "NO")
            console.print(f"{name}: {bar:g}x the released round? {verdicts[0]} ({speedup:.2f}x)", end="; ")
            console.print(f"{OUTSIDE_BAR:g}x outside the attack? {verdicts[1]} ({beyond:.2f}x)")
    out = options.out or Path("benchmarks/results") / f"rounds-{options.case}-{slug(device_name(device))}.json"
    settings = {"batch": options.batch, "steps": options.steps, "eps": chosen.eps, "rounds": options.rounds}
    record(out, f"rounds {options.case}", times, device, **settings)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
