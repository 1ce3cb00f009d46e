"""Does speed cost strength? ``afd bench agreement``: afd and pyautoattack break which images?

A LeNet-size net is trained on MNIST for an epoch, a little adversarially, so that about half of the test images can be
broken. Both libraries then run APGD-CE with the same steps and restarts, and the table says how many images each
leaves, and how many each breaks that the other does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.attacks import PGD
from afd.attacks.settings import Norm
from afd.bench import at_work
from afd.bench.document import Candidate, Case, Figure
from afd.bench.models import lenet
from afd.bench.peers import PEERS, adapted
from afd.bench.program import Benchmark, Say
from afd.bench.request import Request, Run, ours
from afd.bench.show import Column
from afd.data import load
from afd.errors import count, one_of
from afd.extras import needed_by
from afd.files import check_path

with needed_by("afd bench agreement"):
    from tyro.conf import Suppress

RADII: dict[Norm, float] = {"Linf": 0.15, "L2": 1.5, "L1": 8.0}


@dataclass(frozen=True, kw_only=True)
class AgreementBench(Benchmark):
    """Which of a thousand MNIST images afd breaks, and which another library does. Nothing is timed."""

    name = "agreement"
    columns = (
        Column("accuracy left", "accuracy_left", "{:.1%}"),
        Column("broken by it alone", "broken_alone", "{}"),
    )

    data: Path | None = None
    """Folder of MNIST's files; by default a cache folder, filled from the network."""
    rounds: Suppress[int] = 1  # the same seed finds the same points
    images: int = 1000
    """Of the test set."""
    steps: int = 100
    """Of APGD."""
    peer: str = "pyautoattack"
    """The other library."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of afd."""

    @property
    def settings(self) -> Mapping[str, Figure]:
        """Of all norms."""
        return {"images": self.images, "steps": self.steps, "precision": self.precision}

    @property
    def packages(self) -> Iterable[str]:
        """The peer."""
        one_of("peer", self.peer, PEERS)
        return [PEERS[self.peer].package]

    def check(self) -> None:
        """Counts, the peer and the data's folder, too."""
        super().check()
        count("images", self.images, 1)
        count("steps", self.steps, 1)
        one_of("peer", self.peer, PEERS)
        if self.data is not None:
            check_path("data", self.data)

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each norm."""
        del say
        at_work.begin("training a LeNet on MNIST")
        sets = load("mnist", self.data)
        model = trained(sets.train.images().to(device), sets.train.labels.to(device))
        x, y = (part[: self.images].to(device) for part in (sets.test.images(), sets.test.labels))
        for norm in RADII:
            yield norm, self.agreement(norm, model, x, y)

    def agreement(self, norm: Norm, model: nn.Module, x: Tensor, y: Tensor) -> Case:
        """Both libraries on the same images."""
        eps = RADII[norm]
        at_work.begin(f"{norm}: both libraries attack {len(x)} images")
        request = Request("apgd", norm, eps, alpha=eps, steps=self.steps)
        runs = {"afd": ours(model, request, self.precision), self.peer: adapted(self.peer, model, request)}
        left, other = (standing(model, run, x, y) for run in runs.values())
        alone = ((~left & other).sum(), (left & ~other).sum())
        found = {
            name: Candidate(None, {"accuracy_left": float(stand.double().mean()), "broken_alone": int(count)})
            for name, stand, count in zip(runs, (left, other), alone, strict=True)
        }
        return Case({"eps": eps}, found)


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
def standing(model: nn.Module, run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model still classifies rightly after an attack, [N] bool."""
    with torch.enable_grad():
        attacked = [(run(a, b), b) for a, b in zip(x.split(250), y.split(250), strict=True)]
    return torch.cat([model(a).argmax(1) == b for a, b in attacked])
