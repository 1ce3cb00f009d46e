"""Attack throughput side by side: ``python -m afd.bench.attacks``.

Every library runs L∞ PGD with the same model, batch, radius, step and number of steps, in turn. The floor is what the
model itself costs: as many bare forwards and input gradients as there are steps, on the whole batch at once. The
accuracy each attack leaves stands beside its speed, so that speed bought with a weaker attack shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from afd.attacks import PGD
from afd.bench.peers import PEERS, PeerMissingError, Run, Settings, peer_pgd
from afd.bench.timing import CPU, Timing, device_name, interleaved, record, slug
from afd.nn import build_model


@dataclass(frozen=True)
class Case:
    """A model with the batch it is attacked on."""

    model: nn.Module
    x: Tensor
    y: Tensor
    settings: Settings


def lenet() -> nn.Module:
    """LeNet-size network for 1x28x28 images, as attack libraries use in their MNIST examples."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 49, 1024), nn.ReLU(), nn.Linear(1024, 10),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Settings]] = {
    "resnet18": (
        lambda: build_model("resnet18", (3, 32, 32), 10, 64),
        (128, 3, 32, 32),
        Settings(8 / 255, 2 / 255, 10),
    ),
    "lenet": (lenet, (512, 1, 28, 28), Settings(0.3, 0.03, 20)),
}


def case(name: str, batch: int | None, steps: int | None, device: torch.device) -> Case:
    """One of `CASES`, with random weights and images (speed does not depend on them)."""
    build, shape, defaults = CASES[name]
    torch.manual_seed(0)
    shape = (batch or shape[0], *shape[1:])
    settings = Settings(defaults.eps, defaults.alpha, steps or defaults.steps)
    x = torch.rand(shape, device=device)
    return Case(build().to(device).eval(), x, torch.randint(10, shape[:1], device=device), settings)


def floor(case: Case) -> Run:
    """The model's own cost: forward and input gradient, once a step."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(case.settings.steps):
            x = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(case.model(x), y, reduction="sum"), x)
        return x.detach()

    return run


def ours(case: Case) -> Run:
    """afd's PGD."""
    return PGD(case.model, **asdict(case.settings))


def measure(
    case: Case, against: list[str], rounds: int, device: torch.device
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times by library, and the accuracy that each attack leaves."""
    runs: dict[str, Run] = {"floor": floor(case), "afd": ours(case)}
    for name in against:
        runs[name] = peer_pgd(name, case.model, case.settings)
    left = {name: _accuracy(case, run(case.x, case.y)) for name, run in runs.items() if name != "floor"}
    candidates = {name: partial(run, case.x, case.y) for name, run in runs.items()}
    return interleaved(candidates, rounds, warmup=0, device=device), left


@torch.no_grad()
def _accuracy(case: Case, x: Tensor) -> float:
    return float((case.model(x).argmax(1) == case.y).float().mean())


def table(times: dict[str, Timing], left: dict[str, float], case: Case, title: str) -> Table:
    """One row a library: time, rate, share of the floor, speed against it, accuracy left."""
    shown = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("p20 s", "p50 s", "p80 s", "image-steps/s", "over floor", "afd is faster", "accuracy left"):
        shown.add_column(heading, justify="right")
    work = len(case.x) * case.settings.steps
    for name, taken in times.items():
        shown.add_row(
            name,
            *(f"{seconds:.3f}" for seconds in (taken.p20, taken.p50, taken.p80)),
            f"{work / taken.p50:,.0f}",
            f"{taken.p50 / times['floor'].p50:.2f}x",
            f"{taken.p50 / times['afd'].p50:.2f}x",
            f"{left[name]:.1%}" if name in left else "",
        )
    return shown


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(prog="python -m afd.bench.attacks", description="Times attacks side by side.")
    parser.add_argument("--model", choices=sorted(CASES), default="lenet", help="network and images")
    parser.add_argument("--batch", type=int, help="images a batch (default: the case's own)")
    parser.add_argument("--steps", type=int, help="attack steps (default: the case's own)")
    parser.add_argument("--against", default=",".join(PEERS), help="libraries, comma-separated; missing ones are named")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: benchmarks/results/attacks-<model>-<device>.json)"
    )
    options = parser.parse_args()
    console = Console()
    device = options.device
    chosen = case(options.model, options.batch, options.steps, device)
    present = []
    for name in filter(None, options.against.split(",")):
        try:
            peer_pgd(name, chosen.model, chosen.settings)
            present.append(name)
        except PeerMissingError as error:
            console.print(f"left out: {error}", soft_wrap=True)
    times, left = measure(chosen, present, options.rounds, device)
    size = "x".join(str(length) for length in chosen.x.shape)
    title = f"PGD-{chosen.settings.steps} Linf on {options.model} {size}, {device_name(device)}"
    console.print(table(times, left, chosen, title))
    out = options.out or Path("benchmarks/results") / f"attacks-{options.model}-{slug(device_name(device))}.json"
    record(
        out,
        f"attacks {options.model}",
        times,
        device,
        rounds=options.rounds,
        accuracy_left=left,
        **asdict(chosen.settings),
    )
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
