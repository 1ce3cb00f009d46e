"""The kernels against their floor and against PyTorch: ``afd bench kernels``.

On the CPU, eager's time hangs on the allocator: where glibc hands the large temporaries back to the system after each
call, page faults make it three to five times slower than where it keeps them, and at the small size either may happen.
``MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=2000000000`` keeps them, and compares arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from afd.bench import spectral_works, works
from afd.bench.document import Candidate, Case, Figure
from afd.bench.program import Benchmark, Say, listed, reached
from afd.bench.show import Column
from afd.bench.timing import Timing, interleaved
from afd.bench.works import SIZES, Work
from afd.ops import backend

OPS: dict[str, Callable[[str, torch.device], Iterator[Work]]] = {
    "pgd_step": works.pgd_step,
    "project": works.project,
    "random_start": works.random_start,
    "apgd_step": works.apgd_step,
    "apgd_update": works.apgd_update,
    "load_batch": works.load_batch,
    "spectral_norm": spectral_works.spectral_norm,
    "spectral_linear": spectral_works.spectral_linear,
    "projection_logits": spectral_works.projection_logits,
}
LEAST_SPEEDUP = {"Linf": 3.0, "L2": 3.0, "L1": 10.0}  # what pgd_step is held to, over eager
LEAST_SHARE_OF_COPY = {"Linf": 0.7, "L2": 0.0, "L1": 0.0}  # and of the copy's rate


@dataclass(frozen=True, kw_only=True)
class KernelBench(Benchmark):
    """Each op: our kernel, eager PyTorch, torch.compile, the exact reference, and the floor."""

    name = "kernels"
    columns = (
        Column("GB/s", "gigabytes_per_second", "{:.1f}"),
        Column("of floor's rate", "share_of_floor", "{:.0%}"),
        Column("kernel faster", "over_native", "{:.1f}x"),
    )

    rounds: int = 60
    """Timed calls of each candidate, all candidates in turn."""
    ops: str = ",".join(OPS)
    """Ops, comma-separated."""
    sizes: str = ",".join(SIZES)
    """cifar (128x3x32x32) and imagenet (64x3x224x224), comma-separated."""

    @property
    def subject(self) -> str:
        """Sizes."""
        return self.sizes

    def measure(self, device: torch.device, say: Say) -> Mapping[str, Case]:
        """A case for each op, norm, size and dtype."""
        sizes, names = listed("sizes", self.sizes, SIZES), listed("ops", self.ops, OPS)
        found = {}
        for size in sizes:
            for name in names:
                for work in OPS[name](size, device):
                    found[work.name] = case(work, self.rounds, device, say)
        return found

    def remarks(self, cases: Mapping[str, Case]) -> Iterable[str]:
        """Whether each step reaches what it is held to."""
        for name, found in cases.items():
            if name.startswith("pgd_step"):
                share, speedup = LEAST_SHARE_OF_COPY[name.split()[1]], LEAST_SPEEDUP[name.split()[1]]
                ours, eager, floor = (found.candidates[which].median for which in ("native", "eager", "floor"))
                bars = {f"{share:.0%} of the copy's rate": floor / ours >= share}
                yield f"{name}: {reached({**bars, f'{speedup:g}x eager': eager / ours >= speedup})}"


def case(work: Work, rounds: int, device: torch.device, say: Say) -> Case:
    """All ways to do one op's work, timed in turn."""
    calls = work.candidates
    if work.compiles and (compiled := _compiled(work, say)):
        calls = {"native": calls.pop("native"), "eager": calls.pop("eager"), "compiled": compiled, **calls}
    with backend.use("native"):
        times = interleaved(calls, rounds, device=device)
    figures = {name: _figures(taken, times, work.bytes_moved) for name, taken in times.items()}
    return Case({"bytes_moved": work.bytes_moved}, {name: Candidate(times[name], figures[name]) for name in times})


def _figures(taken: Timing, times: Mapping[str, Timing], bytes_moved: int | None) -> dict[str, Figure]:
    return {
        "gigabytes_per_second": bytes_moved / taken.p50 * 1e-9 if bytes_moved else None,
        "share_of_floor": times["floor"].p50 / taken.p50,
        "over_native": taken.p50 / times["native"].p50,
    }


def _compiled(work: Work, say: Say) -> Callable[[], object] | None:
    """The eager formulation under torch.compile; None, with a word, where there is no compiler."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    torch.compiler.reset()  # earlier cases do not count towards the limit of recompilations
    call = torch.compile(work.eager)
    try:
        call()
    except TorchDynamoException as error:
        say(f"left out: torch.compile, which fails here: {str(error).splitlines()[0]}")
        return None
    return call
