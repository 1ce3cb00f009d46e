"""Attack throughput side by side: ``python -m afd.bench.attacks``.

Every library runs the same attack on the same model and batch, in turn. The floor is what the model itself costs afd in
float32: as many forwards and input gradients as the attack makes, in afd's own memory layout, pieces of the batch and
folded layers, and nothing else. The accuracy each attack leaves stands beside its speed, so that speed bought with a
weaker attack shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from afd.attacks import engine, execution
from afd.attacks.folding import folding
from afd.bench.memory import peak_bytes
from afd.bench.models import Subject, subject
from afd.bench.peers import NotOfferedError, PeerMissingError, Request, Run, adapted, ours, requests
from afd.bench.timing import Timing, device_name, interleaved, record, slug

RADII = {  # by channels: the usual ones of MNIST and of CIFAR-10
    1: {"Linf": 0.3, "L2": 2.0, "L1": 10.0},
    3: {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0},
}


@dataclass(frozen=True)
class AttackBench:
    """Time attacks side by side.

    Attributes:
        model: lenet, resnet18, or package.module:factory.
        batch: images a batch; by default the model's own.
        shape: of one image, for a factory's model.
        attack: pgd, apgd; comma-separated.
        norm: Linf, L2, L1; comma-separated.
        steps: of each attack.
        against: libraries, comma-separated; missing ones are named.
        rounds: timed runs of each.
        device: cpu or cuda.
        out: JSON file; by default benchmarks/results/attacks-<model>-<attack>-<device>.json.
    """

    model: str = "lenet"
    batch: int | None = None
    shape: tuple[int, int, int] | None = None
    attack: str = "pgd"
    norm: str = "Linf"
    steps: int = 20
    against: str = "torchattacks,foolbox,art,pyautoattack"
    rounds: int = 5
    device: str = "cpu"
    out: Path | None = None


@dataclass(frozen=True)
class Result:
    """What one library did: its times, the accuracy it left, and the most bytes it held at a time."""

    seconds: Timing
    accuracy_left: float | None
    peak_bytes: int


def floor(target: Subject, request: Request) -> Run:
    """The model's own cost: forward and input gradient, as often as the attack takes them."""
    evaluations = request.steps + (request.attack == "apgd")

    def run(x: Tensor, y: Tensor) -> Tensor:
        with engine.evaluating(target.model), folding(target.model).folded():
            for rows in execution.pieces(target.model, x):
                images, labels = execution.channels_last(x[rows]).requires_grad_(), y[rows]
                for _ in range(evaluations):
                    torch.autograd.grad(F.cross_entropy(target.model(images), labels, reduction="sum"), images)
        return x

    return run


def contestants(target: Subject, request: Request, against: list[str], say: Callable[[str], None]) -> dict[str, Run]:
    """The floor, afd in both precisions, and the libraries that are present and offer the attack."""
    runs = {
        "floor": floor(target, request),
        "afd": ours(target.model, request),
        "afd auto": ours(target.model, request, precision="auto"),
    }
    for name in against:
        try:
            runs[name] = adapted(name, target.model, request)
        except (PeerMissingError, NotOfferedError) as error:
            say(f"left out: {error}")
    return runs


def measure(target: Subject, runs: Mapping[str, Run], rounds: int) -> dict[str, Result]:
    """Times the runs in turn; the first, untimed call of each gives its memory and the accuracy it leaves."""
    device, first = target.x.device, {}
    for name, run in runs.items():
        kept: list[Tensor] = []
        most = peak_bytes(lambda run=run, kept=kept: kept.append(run(target.x, target.y)), device)  # type: ignore[misc]
        first[name] = (accuracy(target, kept[0]) if name != "floor" else None, most)
    times = interleaved(
        {name: partial(run, target.x, target.y) for name, run in runs.items()}, rounds, warmup=0, device=device
    )
    return {name: Result(times[name], *first[name]) for name in runs}


@torch.no_grad()
def accuracy(target: Subject, x: Tensor) -> float:
    """Share of images that the model still classifies as it did."""
    right = [(target.model(part).argmax(1) == y) for part, y in zip(x.split(128), target.y.split(128), strict=True)]
    return float(torch.cat(right).float().mean())


def table(results: Mapping[str, Result], target: Subject, request: Request) -> Table:
    """One row a library: time, rates, time over the floor, speed of afd against it, memory, accuracy left."""
    device = device_name(target.x.device)
    title = f"{request.name} on {target.name} {target.size}, {device}, {torch.get_num_threads()} threads"
    shown = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("p50 s", "p20-p80", "images/s", "image-steps/s", "over floor", "afd faster", "auto faster",
                    "peak MiB", "accuracy left"):  # fmt: skip
        shown.add_column(heading, justify="right")
    images = len(target.x)
    for name, result in results.items():
        taken = result.seconds
        shown.add_row(
            name,
            f"{taken.p50:.3f}",
            f"{taken.p20:.3f}-{taken.p80:.3f}",
            f"{images / taken.p50:,.0f}",
            f"{images * request.steps / taken.p50:,.0f}",
            *(f"{taken.p50 / results[base].seconds.p50:.2f}x" for base in ("floor", "afd", "afd auto")),
            f"{result.peak_bytes / 2**20:,.0f}",
            "" if result.accuracy_left is None else f"{result.accuracy_left:.1%}",
        )
    return shown


def run(options: AttackBench, console: Console) -> Path:
    """Measures, prints and records; returns the JSON file."""
    target = subject(options.model, options.batch, options.shape, options.device)
    radii = RADII[1 if target.x.shape[1] == 1 else 3]
    wanted = requests(options.attack.split(","), options.norm.split(","), options.steps, radii)
    results = {}
    for request in wanted:
        runs = contestants(
            target, request, [name for name in options.against.split(",") if name],
            lambda words: console.print(words, soft_wrap=True),
        )  # fmt: skip
        measured = measure(target, runs, options.rounds)
        console.print(table(measured, target, request))
        results[request.name] = {"request": asdict(request), "libraries": measured}
    device = target.x.device
    out = options.out or Path("benchmarks/results") / (
        f"attacks-{slug(options.model)}-{slug(options.attack)}-{slug(device_name(device))}.json"
    )
    record(out, "attacks", results, device, model=options.model, batch=target.size, rounds=options.rounds)
    console.print(f"written to {out}")
    return out


def main() -> None:
    """Reads the command line."""
    run(tyro.cli(Annotated[AttackBench, tyro.conf.arg(name="")], prog="python -m afd.bench.attacks"), Console())


if __name__ == "__main__":
    main()
