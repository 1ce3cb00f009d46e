"""Does speed cost strength? ``python -m afd.bench.agreement --data DIR``: afd and pyautoattack break which images?

A LeNet-size net is trained on MNIST for an epoch, a little adversarially, so that about half of the test images can be
broken. Both libraries then run APGD-CE with the same steps and restarts, and the table says how many images each
leaves, and how many each breaks that the other does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from afd.attacks import PGD
from afd.bench.models import lenet
from afd.bench.peers import Request, Run, adapted, ours
from afd.bench.timing import CPU, device_name, record, slug
from afd.data import load

RADII = {"Linf": 0.15, "L2": 1.5, "L1": 8.0}


@dataclass(frozen=True)
class AgreementBench:
    """Compare the images that afd and another library break.

    Attributes:
        data: folder with MNIST.
        images: of the test set.
        steps: of APGD.
        peer: the other library.
        precision: of afd.
        out: JSON file; by default benchmarks/results/agreement-<device>.json.
    """

    data: Path
    images: int = 1000
    steps: int = 100
    peer: str = "pyautoattack"
    precision: str = "fp32"
    out: Path | None = None


@dataclass(frozen=True)
class Agreement:
    """Shares of images that stand, and counts of those that one library breaks and the other does not."""

    ours: float
    theirs: float
    broken_by_ours_only: int
    broken_by_theirs_only: int


def trained(x: Tensor, y: Tensor, eps: float = 0.1) -> nn.Module:
    """A LeNet after one epoch on images that two PGD steps have attacked."""
    torch.manual_seed(0)
    model = lenet()
    attack = PGD(model, eps=eps, alpha=eps, steps=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = torch.randperm(len(x))
    for number, rows in enumerate(order.split(128)):
        x_adv = attack(x[rows], y[rows], seed=number)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_adv), y[rows]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def standing(model: nn.Module, run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model still classifies rightly after an attack, [N] bool."""
    with torch.enable_grad():
        attacked = [(run(a, b), b) for a, b in zip(x.split(250), y.split(250), strict=True)]
    return torch.cat([model(a).argmax(1) == b for a, b in attacked])


def compare(model: nn.Module, request: Request, x: Tensor, y: Tensor, peer: str, precision: str) -> Agreement:
    """Both libraries on the same images."""
    left = standing(model, ours(model, request, precision), x, y)
    other = standing(model, adapted(peer, model, request), x, y)
    only = int((~left & other).sum()), int((left & ~other).sum())
    return Agreement(float(left.float().mean()), float(other.float().mean()), *only)


def run(options: AgreementBench, console: Console) -> None:
    """Trains, compares, prints and records."""
    sets = load("mnist", options.data)
    model = trained(sets.train.images(), sets.train.labels)
    x, y = sets.test.images()[: options.images], sets.test.labels[: options.images]
    shown = Table("", title=f"{options.images} MNIST images, APGD-{options.steps}", box=box.SIMPLE_HEAD)
    for heading in ("eps", "afd leaves", f"{options.peer} leaves", "broken by afd only", f"by {options.peer} only"):
        shown.add_column(heading, justify="right")
    results = {}
    for norm, eps in RADII.items():
        found = compare(model, Request("apgd", norm, eps, eps, options.steps), x, y, options.peer, options.precision)
        results[norm] = {"eps": eps, **asdict(found)}
        counts = (str(found.broken_by_ours_only), str(found.broken_by_theirs_only))
        shown.add_row(norm, f"{eps:g}", f"{found.ours:.1%}", f"{found.theirs:.1%}", *counts)
    console.print(shown)
    out = options.out or Path("benchmarks/results") / f"agreement-{slug(device_name(CPU))}.json"
    asked = {"images": options.images, "steps": options.steps, "peer": options.peer, "precision": options.precision}
    record(out, "agreement", results, CPU, settings=asked)
    console.print(f"written to {out}")


def main() -> None:
    """Reads the command line."""
    run(tyro.cli(Annotated[AgreementBench, tyro.conf.arg(name="")], prog="python -m afd.bench.agreement"), Console())


if __name__ == "__main__":
    main()
