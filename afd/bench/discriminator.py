"""The discriminator beside the same layers of torch, with and without its spectral norm.

``afd bench discriminator`` runs it. A case is one forward and backward of the whole network, to the gradients
of its parameters and of its input. "plain" has no spectral norm: it is the floor that a spectral norm should cost
nothing over. "parametrized" is `torch.nn.utils.parametrizations.spectral_norm`. All candidates of a case run in turn,
so that a busy spell meets them alike.

With ``--device cuda`` the network also takes a step of SGD, stands beside torch.compile's form of torch's, and the
power iteration of the group is timed inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from afd.bench.document import Candidate, Case, Figure
from afd.bench.program import Benchmark, Say, reached
from afd.bench.show import Column
from afd.bench.timing import CPU, Candidates, Timing, interleaved
from afd.nn import ProjectionDiscriminator
from afd.ops import backend

WIDTH, CLASSES, BATCHES = 512, (10, 100), (128, 1024)
GRAPH = "power iteration in a CUDA graph"
MOST_OVER_PLAIN, LEAST_OVER_PARAMETRIZED = 1.15, 1.6  # what the CPU is held to
LEAST_ON_GPU = {"parametrized": 8.0, "compiled": 2.0}  # and a GPU, in speed
MOST_MICROSECONDS_IN_GRAPH = 15.0


@dataclass(frozen=True, kw_only=True)
class DiscriminatorBench(Benchmark):
    """The spectral-normalised discriminator beside the same layers of torch, with and without spectral norm."""

    name = "discriminator"
    columns = (
        Column("of plain", "over_plain"),
        Column("afd faster", "over_afd", "{:.2f}x"),
    )

    rounds: int = 300
    """Timed calls of each candidate, all candidates in turn."""

    @property
    def settings(self) -> Mapping[str, Figure]:
        """The width of its layers."""
        return {"width": WIDTH}

    def measure(self, device: torch.device, say: Say) -> Mapping[str, Case]:
        """A case for each batch and number of classes; on a GPU, the graph too."""
        del say
        cases = {}
        for batch in BATCHES:
            for classes in CLASSES:
                taken = times(batch, classes, self.rounds, device)
                cases[f"batch {batch}, {classes} classes"] = Case(
                    {"batch": batch, "classes": classes},
                    {name: Candidate(timing, _figures(timing, taken)) for name, timing in taken.items()},
                )
        if device.type == "cuda":
            cases[GRAPH] = Case({}, {"afd": Candidate(graphed_power_iteration(self.rounds, device))})
        return cases

    def remarks(self, cases: Mapping[str, Case]) -> Iterable[str]:
        """Which bars each case reaches."""
        for name, found in cases.items():
            yield f"{name}: {verdict({which: candidate.median for which, candidate in found.candidates.items()})}"


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


def times(batch: int, classes: int, rounds: int, device: torch.device = CPU) -> dict[str, Timing]:
    """One case: forward and backward on the CPU, and the update too on a GPU."""
    torch.manual_seed(0)
    z, y = torch.randn(batch, WIDTH, device=device, requires_grad=True), torch.randint(classes, (batch,), device=device)
    networks: dict[str, nn.Module] = {
        "afd": ProjectionDiscriminator(WIDTH, classes),
        "plain": Layers(WIDTH, classes),
        "parametrized": Layers(WIDTH, classes, spectral_norm),
    }
    on_gpu = device.type == "cuda"
    candidates: Candidates = {name: _round(net.to(device), z, y, on_gpu) for name, net in networks.items()}
    if on_gpu:
        compiled = Layers(WIDTH, classes, spectral_norm).to(device)
        compiled.compile()
        candidates = {**candidates, "compiled": _round(compiled, z, y, on_gpu)}
    with backend.use("native"):
        return interleaved(candidates, rounds, warmup=10, device=device)


def _round(net: nn.Module, z: Tensor, y: Tensor, updates: bool) -> Callable[[], None]:
    wanted = [z, *net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)

    def call() -> None:
        for tensor in wanted:
            tensor.grad = None
        net(z, y).sum().backward()
        if updates:
            optimizer.step()

    return call


def graphed_power_iteration(rounds: int, device: torch.device, replays: int = 100) -> Timing:
    """Seconds of one power iteration of the group (512x512, 512x512, 1x512, 100x512), replayed in a CUDA graph."""
    group = ProjectionDiscriminator(WIDTH, 100).to(device).spectra
    group()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(replays):
            group()
    taken = interleaved({"graph": graph.replay}, rounds, device=device)["graph"]
    return Timing(*(seconds / replays for seconds in (taken.p20, taken.p50, taken.p80)))


def _figures(timing: Timing, taken: Mapping[str, Timing]) -> dict[str, Figure]:
    return {"over_plain": timing.p50 / taken["plain"].p50, "over_afd": timing.p50 / taken["afd"].p50}


def verdict(medians: Mapping[str, float]) -> str:
    """Whether a case reaches its bars."""
    ours = medians["afd"]
    if "plain" not in medians:
        return reached({f"{MOST_MICROSECONDS_IN_GRAPH:g} us": ours * 1e6 <= MOST_MICROSECONDS_IN_GRAPH})
    if "compiled" in medians:
        return reached({f"{least:g}x {name}": medians[name] / ours >= least for name, least in LEAST_ON_GPU.items()})
    return reached({
        f"at most {MOST_OVER_PLAIN:g} of plain": ours / medians["plain"] <= MOST_OVER_PLAIN,
        f"{LEAST_OVER_PARAMETRIZED:g}x parametrized": medians["parametrized"] / ours >= LEAST_OVER_PARAMETRIZED,
    })  # fmt: skip
