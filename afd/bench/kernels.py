"""The kernels against their floor and against PyTorch: ``afd bench kernels``.

On the CPU, eager's time hangs on the allocator: where glibc hands the large temporaries back to the system after each
call, page faults make it three to five times slower than where it keeps them, and at the small size either may happen.
``MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=2000000000`` keeps them, and compares arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from afd.bench import at_work, spectral_works, works
from afd.bench.clocks import Calls, Clock, clock, share_of_copy
from afd.bench.document import Candidate, Case, Figure
from afd.bench.program import Benchmark, Say, listed, reached
from afd.bench.show import Column
from afd.bench.timing import Call
from afd.bench.work import Work
from afd.bench.works import SIZES
from afd.ops import backend

Op = Callable[[str, torch.device], Iterator[Work]]
OPS: dict[str, Op] = {
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
AGAINST = ("eager", "compiled", "reference")
WARMUP = 5
LEAST_SPEEDUP = {"Linf": 3.0, "L2": 3.0, "L1": 10.0}  # what pgd_step is held to, over eager
LEAST_SHARE_OF_COPY = {"Linf": 0.7, "L2": 0.0, "L1": 0.0}  # and of the copy's rate


@dataclass(frozen=True, kw_only=True)
class KernelBench(Benchmark):
    """Each op: our kernel, eager PyTorch, torch.compile, the exact reference, and the floor."""

    name = "kernels"
    columns = (
        Column("GB/s", "gigabytes_per_second", "{:.1f}"),
        Column("of floor's rate", "share_of_floor", "{:.0%}"),
        Column("of copy's rate", "share_of_copy", "{:.0%}"),
        Column("host µs", "host_us", "{:.1f}"),
        Column("timed by", "timed"),
        Column("kernel faster", "over_native", "{:.1f}x"),
    )

    rounds: int = 60
    """Timed calls of each candidate, all candidates in turn."""
    ops: str = ",".join(OPS)
    """Ops, comma-separated."""
    sizes: str = ",".join(SIZES)
    """cifar (128x3x32x32) and imagenet (64x3x224x224), comma-separated."""
    against: str = ",".join(AGAINST)
    """What stands beside kernel and floor: eager, compiled, reference; comma-separated."""

    @property
    def subject(self) -> str:
        """Sizes."""
        return self.sizes

    def check(self) -> None:
        """The names, too."""
        super().check()
        self._asked()

    def _asked(self) -> tuple[list[str], list[str], list[str]]:
        """Sizes, ops and ways to do them."""
        return (
            listed("sizes", self.sizes, SIZES),
            listed("ops", self.ops, OPS),
            listed("against", self.against, AGAINST),
        )

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each op, norm, size and dtype."""
        (sizes, names, against), timer = self._asked(), clock(device, say, WARMUP)
        for size in sizes:
            for name in names:
                for sets in several(OPS[name], size, device, timer):
                    yield sets[0].name, case(sets, against, self.rounds, timer, say)

    def remarks(self, cases: Mapping[str, Case]) -> Iterable[str]:
        """Whether each step reaches what it is held to."""
        for name, found in cases.items():
            if name.startswith("pgd_step"):
                share, speedup = LEAST_SHARE_OF_COPY[name.split()[1]], LEAST_SPEEDUP[name.split()[1]]
                medians = {which: candidate.median for which, candidate in found.candidates.items()}
                bars = {f"{share:.0%} of the copy's rate": medians["floor"] / medians["native"] >= share}
                if "eager" in medians:
                    bars[f"{speedup:g}x eager"] = medians["eager"] / medians["native"] >= speedup
                yield f"{name}: {reached(bars)}"


def several(op: Op, size: str, device: torch.device, timer: Clock) -> Iterator[tuple[Work, ...]]:
    """The works of an op, each with as many sets of inputs as the clock wants."""
    wanted = timer.sets(work.footprint for work in op(size, device))
    return zip(*(op(size, device) for _ in range(wanted)), strict=True)


def case(sets: Sequence[Work], against: Collection[str], rounds: int, timer: Clock, say: Say) -> Case:
    """All ways to do one op's work, on the same sets of inputs, timed in turn."""
    at_work.begin(sets[0].name)
    name, bytes_moved = sets[0].name, sets[0].bytes_moved
    with backend.use("native"):
        taken = timer.take(name, ways(sets, against, say), rounds)
    medians = {way: found.seconds.p50 for way, found in taken.items()}

    def figures(way: str) -> dict[str, Figure]:
        seconds = medians[way]
        return {
            "gigabytes_per_second": bytes_moved / seconds * 1e-9 if bytes_moved else None,
            "share_of_floor": medians["floor"] / seconds,
            "over_native": seconds / medians["native"],
            **taken[way].figures,
            **share_of_copy(bytes_moved, seconds, timer.measured),
        }

    candidates = {way: Candidate(found.seconds, figures(way)) for way, found in taken.items()}
    return Case({"bytes_moved": bytes_moved}, candidates, timer.measured)


def ways(sets: Sequence[Work], against: Collection[str], say: Say) -> dict[str, Calls]:
    """Kernel, floor, and what was asked for of the ways between them that the work has."""
    found: dict[str, list[Call]] = {"native": [work.native for work in sets]}
    if "eager" in against:
        found["eager"] = [work.eager for work in sets]
    if "compiled" in against and sets[0].compiles and (compiled := _compiled(sets, say)):
        found["compiled"] = compiled
    if "reference" in against and (exact := [work.reference for work in sets if work.reference]):
        found["reference"] = exact
    found["floor"] = [work.floor for work in sets]
    zeroed = [tensor for work in sets for tensor in work.zeroed]
    before = partial(torch._foreach_zero_, zeroed) if zeroed else None
    return {way: Calls(calls, before) for way, calls in found.items()}


def _compiled(sets: Sequence[Work], say: Say) -> list[Call] | None:
    """The eager formulation under torch.compile, compiled once; None, with a word, where there is no compiler."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    at_work.now("compiling")
    torch.compiler.reset()  # earlier cases do not count towards the limit of recompilations
    calls: list[Call] = [torch.compile(work.eager) for work in sets]
    try:
        calls[0]()
    except TorchDynamoException as error:
        say(f"left out: torch.compile, which fails here: {str(error).splitlines()[0]}")
        return None
    return calls
