"""The discriminator beside the same layers of torch, with and without its spectral norm.

``afd bench discriminator`` runs it. A case is one forward and backward of the whole network, to the gradients
of its parameters and of its input. "plain" has no spectral norm: it is the floor that a spectral norm should cost
nothing over. "parametrized" is `torch.nn.utils.parametrizations.spectral_norm`. All candidates of a case run in turn,
so that a busy spell meets them alike.

With ``--device cuda`` the network also takes a step of SGD, stands beside torch.compile's form of torch's, and the
power iteration of the group is timed by itself. There each candidate has several networks and batches in turn, so that
weights are as cold as another network leaves them; only torch.compile's, which would compile each anew, is one network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from afd.bench import at_work
from afd.bench.clocks import Calls, clock
from afd.bench.document import Candidate, Case, Figure
from afd.bench.program import Benchmark, Say, listed, reached
from afd.bench.show import Column
from afd.bench.timing import Call
from afd.evaluation.place import device_named
from afd.nn import ProjectionDiscriminator
from afd.ops import backend

WIDTH, CLASSES, BATCHES = 512, (10, 100), (128, 1024)
AGAINST = {"cpu": ("plain", "parametrized"), "cuda": ("plain", "parametrized", "compiled")}
WARMUP = 10
GRAPH = "power iteration in a CUDA graph"
MOST_OVER_PLAIN, LEAST_OVER_PARAMETRIZED = 1.15, 1.6  # what the CPU is held to
LEAST_ON_GPU = {"parametrized": 8.0, "compiled": 2.0}  # and a GPU, in speed
MOST_MICROSECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class DiscriminatorBench(Benchmark):
    """The spectral-normalised discriminator beside the same layers of torch, with and without spectral norm."""

    name = "discriminator"
    columns = (
        Column("host µs", "host_us", "{:.1f}"),
        Column("timed by", "timed"),
        Column("of plain", "over_plain"),
        Column("afd faster", "over_afd", "{:.2f}x"),
    )

    rounds: int = 300
    """Timed calls of each candidate, all candidates in turn."""
    against: str | None = None
    """plain, parametrized, compiled (on a GPU only); comma-separated. Default: all that the device has."""

    @property
    def settings(self) -> Mapping[str, Figure]:
        """The width of its layers."""
        return {"width": WIDTH}

    def check(self) -> None:
        """The peers of its device, too."""
        super().check()
        self._asked(device_named(self.device))

    def _asked(self, device: torch.device) -> Sequence[str]:
        allowed = AGAINST[device.type]
        return allowed if self.against is None else listed("against", self.against, allowed)

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each batch and number of classes; on a GPU, the power iteration too."""
        against = self._asked(device)
        timer = clock(device, say, WARMUP)
        for batch in BATCHES:
            for classes in CLASSES:
                name = f"batch {batch}, {classes} classes"
                at_work.begin(name)
                sets = timer.sets([footprint(batch, classes)])
                with backend.use("native"):
                    taken = timer.take(name, updates(batch, classes, sets, against, device), self.rounds)
                medians = {which: found.seconds.p50 for which, found in taken.items()}
                candidates = {
                    which: Candidate(found.seconds, {**_figures(which, medians), **found.figures})
                    for which, found in taken.items()
                }
                yield name, Case({"batch": batch, "classes": classes}, candidates, timer.measured)
        if device.type == "cuda":
            sets = timer.sets([matrices(classes=100)])
            groups = [ProjectionDiscriminator(WIDTH, 100).to(device).spectra for _ in range(sets)]
            with backend.use("native"):
                found = timer.take(GRAPH, {"afd": Calls(groups)}, self.rounds)["afd"]
            yield GRAPH, Case({}, {"afd": Candidate(found.seconds, found.figures)}, timer.measured)

    def remarks(self, cases: Mapping[str, Case]) -> Iterable[str]:
        """Which bars each case reaches."""
        for name, found in cases.items():
            medians = {which: candidate.median for which, candidate in found.candidates.items()}
            if name == GRAPH:
                bar = reached({f"{MOST_MICROSECONDS:g} us": medians["afd"] * 1e6 <= MOST_MICROSECONDS})
            else:
                bar = verdict(medians, on_gpu="device_us" in found.candidates["afd"].figures)
            if bar:
                yield f"{name}: {bar}"


class Layers(nn.Module):
    """The projection discriminator of torch's own layers, each under `norm`."""

    def __init__(self, width: int, classes: int, norm: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(norm(nn.Linear(width, width)) for _ in range(2))
        self.w = norm(nn.Linear(width, 1))
        self.e = norm(nn.Embedding(classes, width))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Scores [N] of z [N, width] and y [N]."""
        h = z
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
        score: Tensor = self.w(h).squeeze(1) + torch.sum(self.e(y) * h, dim=1)
        return score


def footprint(batch: int, classes: int) -> int:
    """Bytes of parameters, momenta and gradients, and of a batch and its gradient."""
    return 3 * matrices(classes) + 2 * 4 * batch * WIDTH


def matrices(classes: int) -> int:
    """Bytes of the layers' weights."""
    return 4 * WIDTH * (2 * WIDTH + 1 + classes)


def updates(batch: int, classes: int, sets: int, against: Collection[str], device: torch.device) -> dict[str, Calls]:
    """One case: forward and backward on the CPU, and the step of SGD too on a GPU."""
    torch.manual_seed(0)
    batches = [
        (
            torch.randn(batch, WIDTH, device=device, requires_grad=True),
            torch.randint(classes, (batch,), device=device),
        )
        for _ in range(sets)
    ]
    builds: dict[str, Callable[[], nn.Module]] = {
        "afd": lambda: ProjectionDiscriminator(WIDTH, classes),
        "plain": lambda: Layers(WIDTH, classes),
        "parametrized": lambda: Layers(WIDTH, classes, spectral_norm),
    }
    networks = {
        name: [build().to(device) for _ in batches] for name, build in builds.items() if name in ("afd", *against)
    }
    if "compiled" in against:
        compiled = Layers(WIDTH, classes, spectral_norm).to(device)
        compiled.compile()
        networks["compiled"] = [compiled] * sets
    steps = device.type == "cuda"
    return {
        name: Calls([_update(net, z, y, steps) for net, (z, y) in zip(nets, batches, strict=True)])
        for name, nets in networks.items()
    }


def _update(net: nn.Module, z: Tensor, y: Tensor, steps: bool) -> Call:
    wanted = [z, *net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)

    def call() -> None:
        for tensor in wanted:
            tensor.grad = None
        net(z, y).sum().backward()
        if steps:
            optimizer.step()

    return call


def _figures(name: str, medians: Mapping[str, float]) -> dict[str, Figure]:
    plain = medians.get("plain")
    return {"over_plain": medians[name] / plain if plain else None, "over_afd": medians[name] / medians["afd"]}


def verdict(medians: Mapping[str, float], on_gpu: bool) -> str:
    """Whether a case reaches the bars of those that took part in it."""
    ours = medians["afd"]
    over = {name: seconds / ours for name, seconds in medians.items()}
    if on_gpu:
        return reached(
            {f"{least:g}x {name}": over[name] >= least for name, least in LEAST_ON_GPU.items() if name in over}
        )
    bars = {}
    if "plain" in over:
        bars[f"at most {MOST_OVER_PLAIN:g} of plain"] = ours / medians["plain"] <= MOST_OVER_PLAIN
    if "parametrized" in over:
        bars[f"{LEAST_OVER_PARAMETRIZED:g}x parametrized"] = over["parametrized"] >= LEAST_OVER_PARAMETRIZED
    return reached(bars)
