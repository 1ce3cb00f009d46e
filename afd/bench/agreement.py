"""Does speed cost strength? ``afd bench agreement``: afd and pyautoattack break which images?

A LeNet-size net is trained on MNIST for an epoch, a little adversarially, so that about half of the test images can be
broken. Both libraries then run APGD-CE with the same steps and restarts, and the table says how many images each
leaves, and how many each breaks that the other does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.attacks import PGD, Norm
from afd.bench import base
from afd.bench.attacks import lenet
from afd.bench.base import Benchmark, Say
from afd.bench.baselines import BASELINES, Request, Run, adapted, ours
from afd.bench.results import Candidate, Case, Column
from afd.data import load
from afd.errors import one_of
from afd.extras import needed_by
from afd.files import check_path

with needed_by("afd bench agreement"):
    from tyro.conf import Suppress

RADII: dict[Norm, float] = {"Linf": 0.15, "L2": 1.5, "L1": 8.0}


@dataclass(frozen=True, kw_only=True)
class AgreementBench(Benchmark):
    """Which of a thousand MNIST images afd breaks, and which another library does. Nothing is timed."""

    name, shared, counts = "agreement", ("images", "steps", "precision"), ("images", "steps")
    columns = (Column("accuracy left", "accuracy_left", "{:.1%}"), Column("broken by it alone", "broken_alone", "{}"))

    data: Path | None = None
    """Folder of MNIST's files; by default a cache folder, filled from the network."""
    repeats: Suppress[int] = 1  # the same seed finds the same points
    images: int = 1000
    """Of the test set."""
    steps: int = 100
    """Of APGD."""
    peer: str = "pyautoattack"
    """The other library."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of afd."""

    @property
    def packages(self) -> list[str]:
        """The peer."""
        return [BASELINES[self.peer].package]

    def check(self) -> None:
        """The peer and the data's folder, too."""
        super().check()
        one_of("peer", self.peer, BASELINES)
        if self.data is not None:
            check_path("data", self.data)

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each norm."""
        del say
        base.begin("training a LeNet on MNIST")
        sets = load("mnist", self.data)
        model = trained(sets.train.images().to(device), sets.train.labels.to(device))
        x, y = (part[: self.images].to(device) for part in (sets.test.images(), sets.test.labels))
        for norm, eps in RADII.items():
            base.begin(f"{norm}: both libraries attack {len(x)} images")
            request = Request("apgd", norm, eps, alpha=eps, steps=self.steps)
            runs = {"afd": ours(model, request, self.precision), self.peer: adapted(self.peer, model, request)}
            left = {name: robust(model, run, x, y) for name, run in runs.items()}
            somebody = torch.stack(list(left.values())).any(0)
            yield norm, Case({"eps": eps}, {name: Candidate(None, {
                "accuracy_left": float(kept.double().mean()), "broken_alone": int((somebody & ~kept).sum()),
            }) for name, kept in left.items()})  # fmt: skip


def trained(x: Tensor, y: Tensor, eps: float = 0.1) -> nn.Module:
    """A LeNet after one epoch on images that two PGD steps have attacked."""
    torch.manual_seed(0)
    model = lenet().to(x.device)
    attack = PGD(model, eps=eps, alpha=eps, steps=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = torch.randperm(len(x), device=x.device)
    for number, rows in enumerate(order.split(128)):
        x_adv = attack(x[rows], y[rows], seed=number)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_adv), y[rows]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def robust(model: nn.Module, run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model still classifies rightly after an attack, [N] bool."""
    with torch.enable_grad():
        attacked = [(run(a, b), b) for a, b in zip(x.split(250), y.split(250), strict=True)]
    return torch.cat([model(a).argmax(1) == b for a, b in attacked])
