"""Attack throughput side by side: ``afd bench attacks``.

Every library runs the same attack on the same model and batch, in turn. The floor is what the model itself costs afd in
float32: as many forwards and input gradients as the attack makes, in afd's own memory layout, pieces of the batch and
folded layers, and nothing else. The accuracy each attack leaves stands beside its speed, so that speed bought with a
weaker attack shows.

Float32 means float32: CUDA's TF32, which torch allows in convolutions unless told otherwise, is off for everybody but
the candidates named after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from afd.attacks.settings import Norm
from afd.bench import at_work
from afd.bench.arithmetic import tf32
from afd.bench.contest import fitting
from afd.bench.document import Case, Figure
from afd.bench.models import MODELS, image_shape, subject
from afd.bench.peers import PEERS
from afd.bench.program import Benchmark, Say, listed
from afd.bench.request import ATTACKS, NORMS, Request, requests
from afd.bench.show import Column, mebibytes
from afd.errors import InputError, at_least, count
from afd.evaluation.subject import from_factory
from afd.evaluation.target import check_radius

RADII: dict[int, dict[Norm, float]] = {  # by channels: the usual ones of MNIST and of CIFAR-10
    1: {"Linf": 0.3, "L2": 2.0, "L1": 10.0},
    3: {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0},
}


@dataclass(frozen=True, kw_only=True)
class AttackBench(Benchmark):
    """Attacks of afd beside other libraries': speed, memory, host reads, and the accuracy that each leaves."""

    name = "attacks"
    columns = (
        Column("images/s", "images_per_second", "{:,.0f}"),
        Column("image-steps/s", "image_steps_per_second", "{:,.0f}"),
        Column("over floor", "over_floor", "{:.2f}x"),
        Column("afd faster", "over_afd", "{:.2f}x"),
        Column("auto faster", "over_auto", "{:.2f}x"),
        Column("of matmul rate", "matmul_share", "{:.0%}"),
        Column("peak MiB", "peak_bytes", mebibytes),
        Column("host reads", "host_reads", "{:,}"),
        Column("accuracy left", "accuracy_left", "{:.1%}"),
    )

    model: str = "lenet"
    """lenet, resnet18, or package.module:factory, a function that returns a classifier."""
    batch: int | None = None
    """Images a batch, halved until it fits in memory. Default: 512 for lenet, else 128."""
    shape: tuple[int, int, int] | None = None
    """Channels, height and width of an image, for a factory's model. Default: 3 32 32."""
    attack: str = "pgd"
    """pgd, apgd; comma-separated."""
    norm: str = "Linf"
    """Linf, L2, L1; comma-separated."""
    eps: float | None = None
    """Radius, where one norm is asked for. Default: the usual one of MNIST (1 channel) or CIFAR-10."""
    steps: int = 20
    """Of each attack."""
    against: str = ",".join(PEERS)
    """Peers, comma-separated; what is not installed or has no such attack is named and left out."""

    @property
    def subject(self) -> str:
        """Model, attacks and steps."""
        return f"{self.model} {self.attack} {self.steps}"

    @property
    def settings(self) -> Mapping[str, Figure]:
        """The model; the batch is the cases' own."""
        return {"model": self.model}

    @property
    def packages(self) -> Iterable[str]:
        """Of the peers asked for."""
        asked = [PEERS[name] for name in listed("against", self.against, PEERS)]
        return sorted({peer.package for peer in asked if peer.installed} - {"torch"})

    def check(self) -> None:
        """The settings of all attacks, and a factory's model."""
        super().check()
        self._asked()
        if self.batch is not None:
            count("batch", self.batch, 1)
        _ = self.own

    @cached_property
    def own(self) -> nn.Module | None:
        """The model of the user's factory, if that is what was named."""
        if self.model in MODELS:
            return None
        torch.manual_seed(0)
        return from_factory(self.model, torch.device("cpu")).model

    def _asked(self) -> tuple[list[Request], list[str]]:
        """The attacks and the peers."""
        attacks, norms = listed("attack", self.attack, ATTACKS), listed("norm", self.norm, NORMS)
        against = listed("against", self.against, PEERS)
        count("steps", self.steps, 1)
        shape = image_shape(self.model, self.shape)
        return requests(attacks, norms, self.steps, self.radii(norms, shape)), against

    def radii(self, norms: Sequence[Norm], shape: tuple[int, ...]) -> Mapping[Norm, float]:
        """By norm, for images of a shape.

        Raises:
            InputError: a radius for several norms, which measure differently, or one below 0 or longer than images are
                apart.
        """
        if self.eps is None:
            return RADII[1 if shape[0] == 1 else 3]
        if len(norms) > 1:
            raise InputError(f"eps is {self.eps:g} for {', '.join(norms)}; ask for one norm at a time")
        at_least("eps", self.eps, 0)
        check_radius(self.eps, norms[0], math.prod(shape))
        return {norms[0]: self.eps}

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each attack in each norm."""
        wanted, against = self._asked()
        at_work.begin(f"building {self.model}")
        target = subject(self.model, self.batch, self.shape, device, self.own)
        for request in wanted:
            with tf32(False):
                target, found = fitting(target, request, against, self.rounds, say)
            yield f"{request.name}, {target.size}", found
