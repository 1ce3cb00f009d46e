"""The discriminator beside the same layers of torch, with and without its spectral norm.

``python -m afd.bench.discriminator`` runs it. A case is one forward and backward of the whole network, to the gradients
of its parameters and of its input. "plain" has no spectral norm: it is the floor that a spectral norm should cost
nothing over. "parametrized" is `torch.nn.utils.parametrizations.spectral_norm`. All candidates of a case run in turn,
so that a busy spell meets them alike.

With ``--device cuda`` the network also takes a step of SGD, stands beside torch.compile's form of torch's, and the
power iteration of the group is timed inside a CUDA graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from afd.bench.timing import CPU, Candidates, Timing, device_name, interleaved, record, slug
from afd.nn import ProjectionDiscriminator
from afd.ops import backend

WIDTH, CLASSES, BATCHES = 512, (10, 100), (128, 1024)
MOST_OVER_PLAIN, LEAST_OVER_PARAMETRIZED = 1.15, 1.6  # what the CPU is held to
LEAST_ON_GPU = {"parametrized": 8.0, "compiled": 2.0}  # and a GPU, in speed
MOST_MICROSECONDS_IN_GRAPH = 15.0


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


# --- The program ----------------------------------------------------------------------------------------------------


def table(cases: dict[str, dict[str, Timing]], title: str) -> Table:
    """The cases as a table, one row a candidate."""
    shown = Table("", title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading in ("p20 ms", "p50 ms", "p80 ms", "of plain", "x faster than parametrized"):
        shown.add_column(heading, justify="right")
    for name, taken in cases.items():
        shown.add_row(f"[bold]{name}")
        for candidate, timing in taken.items():
            shown.add_row(
                f"  {candidate}",
                *(f"{seconds * 1e3:.3f}" for seconds in (timing.p20, timing.p50, timing.p80)),
                f"{timing.p50 / taken['plain'].p50:.2f}",
                f"{taken['parametrized'].p50 / timing.p50:.2f}",
            )
    return shown


def verdict(taken: dict[str, Timing]) -> str:
    """Whether a case reaches its bars."""
    ours = taken["afd"].p50
    if "compiled" in taken:
        bars = {f"{least:g}x {name}": taken[name].p50 / ours >= least for name, least in LEAST_ON_GPU.items()}
    else:
        bars = {
            f"at most {MOST_OVER_PLAIN:g} of plain": ours / taken["plain"].p50 <= MOST_OVER_PLAIN,
            f"{LEAST_OVER_PARAMETRIZED:g}x parametrized": taken["parametrized"].p50 / ours >= LEAST_OVER_PARAMETRIZED,
        }
    return ", ".join(f"{bar}? {'yes' if reached else 'NO'}" for bar, reached in bars.items())


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(prog="python -m afd.bench.discriminator", description="Times the discriminator.")
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=300, help="timed calls of each candidate")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/discriminator-<device>.json)")
    options = parser.parse_args()
    device, console = options.device, Console()
    cases = {
        f"batch {batch}, {classes} classes": times(batch, classes, options.rounds, device)
        for batch in BATCHES
        for classes in CLASSES
    }
    console.print(table(cases, f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"))
    for name, taken in cases.items():
        console.print(f"{name}: {verdict(taken)}")
    results: dict[str, object] = {**cases}
    if device.type == "cuda":
        iteration = graphed_power_iteration(options.rounds, device)
        results["power iteration in a graph"] = iteration
        reached = "yes" if iteration.p50 * 1e6 <= MOST_MICROSECONDS_IN_GRAPH else "NO"
        console.print(f"power iteration: {iteration.p50 * 1e6:.1f} us; {MOST_MICROSECONDS_IN_GRAPH:g} us? {reached}")
    out = options.out or Path("benchmarks/results") / f"discriminator-{slug(device_name(device))}.json"
    record(out, "discriminator", results, device, rounds=options.rounds, width=WIDTH)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
