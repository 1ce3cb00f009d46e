"""The kernels against their floor and against PyTorch: ``python -m afd.bench.kernels``.

The floor of an op that is bound by memory is torch's own multi-threaded copy of as many bytes as the op moves: half of
them read, half written. "eager" is the best formulation in PyTorch (`afd.bench.eager`); in L2 and L1 the references
are exact rather than fast, and are shown too. All candidates of a case run in turn, so that a busy spell meets them
alike.

On the CPU, eager's time hangs on the allocator: where glibc hands the large temporaries back to the system after each
call, page faults make it three to five times slower than where it keeps them, and at the small shape either may happen.
``MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=2000000000`` keeps them, and compares arithmetic alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from afd import ops
from afd.bench import eager
from afd.bench.timing import CPU, Candidates, Timing, device_name, interleaved, record, slug
from afd.ops import backend, reference

SHAPES = ((128, 3, 32, 32), (64, 3, 224, 224))
GRAD_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOW, HIGH = 0.0, 1.0
RADII = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}  # AutoAttack's for CIFAR-10
STRIDES = {"Linf": 2 / 255, "L2": 0.1, "L1": 1.0}
SPARSITY = 0.05
EPS = RADII["Linf"]
LEAST_SPEEDUP = {"Linf": 3.0, "L2": 3.0, "L1": 10.0}  # what pgd_step is held to, over eager
LEAST_SHARE_OF_COPY = {"Linf": 0.7, "L2": 0.0, "L1": 0.0}  # and of the copy's rate


@dataclass(frozen=True)
class Rates:
    """One case: the times of its candidates (native, eager, compiled, copy) and the bytes the op moves."""

    times: dict[str, Timing]
    bytes_moved: int

    def gigabytes_per_second(self, candidate: str) -> float:
        """Bytes the op must move over the median time."""
        return self.bytes_moved / self.times[candidate].p50 * 1e-9

    def share_of_copy(self, candidate: str) -> float:
        """Rate relative to the copy of as many bytes."""
        return self.times["copy"].p50 / self.times[candidate].p50

    def speedup(self, candidate: str) -> float:
        """Speed relative to the reference run eagerly."""
        return self.times["eager"].p50 / self.times[candidate].p50

    def meets_bars(self, norm: str) -> bool:
        """Whether the native step reaches both bars."""
        enough = self.share_of_copy("native") >= LEAST_SHARE_OF_COPY[norm]
        return enough and self.speedup("native") >= LEAST_SPEEDUP[norm]


def pgd_step_rates(
    shape: tuple[int, ...],
    grad_dtype: torch.dtype = torch.float32,
    rounds: int = 100,
    device: torch.device = CPU,
    norm: str = "Linf",
) -> Rates:
    """pgd_step in place: reads x_adv, x and grad and writes x_adv."""
    x = torch.rand(shape, device=device)
    x_adv, grad = x.clone(), torch.randn(shape, device=device).to(grad_dtype)
    alpha, eps = STRIDES[norm], RADII[norm]

    def native() -> None:
        ops.pgd_step_(x_adv, x, grad, alpha=alpha, eps=eps, bounds=(LOW, HIGH), norm=norm, sparsity=SPARSITY)

    def exact() -> None:
        x_adv.copy_(reference.pgd_step(x_adv, x, grad, alpha, eps, LOW, HIGH, norm=norm, sparsity=SPARSITY))

    def best(x_adv: Tensor, x: Tensor, grad: Tensor) -> None:
        x_adv.copy_(eager.pgd_step(x_adv, x, grad, alpha, eps, LOW, HIGH, norm, SPARSITY))

    compiled = _compiled(best)
    candidates: Candidates = {
        "native": native,
        "eager": lambda: best(x_adv, x, grad),
        "compiled": lambda: compiled(x_adv, x, grad),
        "reference": exact,
    }
    return _rates(_sensible(candidates, norm, x), (3 * 4 + grad_dtype.itemsize) * x.numel(), rounds, device)


def project_rates(shape: tuple[int, ...], norm: str, rounds: int = 100, device: torch.device = CPU) -> Rates:
    """Project into a new tensor, which counts: reads x_adv and x and writes the result."""
    x_adv, x = torch.rand(2, *shape, device=device)
    eps = RADII[norm]

    def best(x_adv: Tensor, x: Tensor) -> Tensor:
        return eager.project(x_adv, x, eps, LOW, HIGH, norm)

    compiled = _compiled(best)
    candidates: Candidates = {
        "native": lambda: ops.project(x_adv, x, eps=eps, bounds=(LOW, HIGH), norm=norm),
        "eager": lambda: best(x_adv, x),
        "compiled": lambda: compiled(x_adv, x),
        "reference": lambda: reference.project(x_adv, x, eps, LOW, HIGH, norm=norm),
    }
    return _rates(_sensible(candidates, norm, x), 3 * 4 * x.numel(), rounds, device)


def random_start_rates(shape: tuple[int, ...], rounds: int = 100, device: torch.device = CPU) -> Rates:
    """random_start into another tensor: reads x and writes x_adv."""
    x = torch.rand(shape, device=device)
    x_adv = torch.empty_like(x)

    def native() -> None:
        ops.random_start_(x_adv, x, eps=EPS, seed=1, bounds=(LOW, HIGH))

    def eager(x_adv: Tensor, x: Tensor) -> None:
        x_adv.copy_(reference.random_start(x, EPS, LOW, HIGH, 1))

    compiled = _compiled(eager)
    candidates: Candidates = {
        "native": native,
        "eager": lambda: eager(x_adv, x),
        "compiled": lambda: compiled(x_adv, x),
    }
    return _rates(candidates, 2 * 4 * x.numel(), rounds, device)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one case: earlier cases do not count towards its limit of recompilations."""
    torch.compiler.reset()
    return torch.compile(function)


def _sensible(candidates: Candidates, norm: str, x: Tensor) -> Candidates:
    """Drops what would take minutes: compiling L1's unrolled passes, and the exact references on a large batch."""
    without = {"compiled"} if norm == "L1" else set()
    if norm == "Linf" or x.numel() > 1 << 20:
        without.add("reference")
    return {name: call for name, call in candidates.items() if name not in without}


def _rates(candidates: Candidates, bytes_moved: int, rounds: int, device: torch.device) -> Rates:
    source = torch.rand(bytes_moved // 8, device=device)  # float32: half of the bytes
    target = torch.zeros_like(source)
    running: dict[str, Callable[[], object]] = {**candidates, "copy": lambda: target.copy_(source)}
    try:
        running.get("compiled", lambda: None)()
    except BackendCompilerFailed as error:
        Console(stderr=True).print(f"without torch.compile, which fails here: {str(error).splitlines()[0]}")
        del running["compiled"]
    with backend.use("native"):
        return Rates(interleaved(running, rounds, device=device), bytes_moved)


# --- The program ----------------------------------------------------------------------------------------------------


def all_rates(rounds: int, device: torch.device) -> dict[str, Rates]:
    """Every case, by name."""
    cases = {}
    for shape in SHAPES:
        size = "x".join(str(length) for length in shape)
        for norm in RADII:
            for label, dtype in GRAD_DTYPES.items():
                cases[f"pgd_step {norm} {size} {label}"] = pgd_step_rates(shape, dtype, rounds, device, norm)
            cases[f"project {norm} {size}"] = project_rates(shape, norm, rounds, device)
        cases[f"random_start {size}"] = random_start_rates(shape, rounds, device)
    return cases


def table(cases: dict[str, Rates], title: str) -> Table:
    """The cases as a table, one row a candidate."""
    shown = Table("", title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading in ("p20 ms", "p50 ms", "p80 ms", "GB/s", "of copy", "x eager"):
        shown.add_column(heading, justify="right")
    for name, rates in cases.items():
        shown.add_row(f"[bold]{name}")
        for candidate, taken in rates.times.items():
            shown.add_row(
                f"  {candidate}",
                *(f"{seconds * 1e3:.3f}" for seconds in (taken.p20, taken.p50, taken.p80)),
                f"{rates.gigabytes_per_second(candidate):.1f}",
                f"{rates.share_of_copy(candidate):.0%}",
                f"{rates.speedup(candidate):.1f}",
            )
    return shown


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(prog="python -m afd.bench.kernels", description="Times afd's kernels.")
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each candidate")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/kernels-<device>.json)")
    options = parser.parse_args()
    device = options.device
    cases = all_rates(options.rounds, device)
    console = Console()
    console.print(table(cases, f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"))
    for name, rates in cases.items():
        if name.startswith("pgd_step"):
            norm = name.split()[1]
            share, speedup = LEAST_SHARE_OF_COPY[norm], LEAST_SPEEDUP[norm]
            verdict = "yes" if rates.meets_bars(norm) else "NO"
            console.print(f"{name}: {share:.0%} of the copy's rate and {speedup:g}x eager? {verdict}")
    out = options.out or Path("benchmarks/results") / f"kernels-{slug(device_name(device))}.json"
    record(out, "kernels", cases, device, rounds=options.rounds)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
