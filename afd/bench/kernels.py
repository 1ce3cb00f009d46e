"""The kernels against their floor and against PyTorch: ``afd bench kernels`` and ``afd bench discriminator``.

On the CPU, eager's time hangs on the allocator: where glibc hands the large temporaries back to the system after each
call, page faults make it three to five times slower than where it keeps them, and at the small size either may happen.
``MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=2000000000`` keeps them, and compares arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from afd.bench import base
from afd.bench.base import Benchmark, Say
from afd.bench.baselines import TorchDiscriminator
from afd.bench.metering import COPY_RATE, Call, Calls, Clock, clock
from afd.bench.op_cases import OPS, SIZES, OpCase, Work, timed
from afd.bench.results import Candidate, Case, Column, Figure
from afd.nn import ProjectionDiscriminator
from afd.ops import backend
from afd.runtime import device_named

AGAINST = ("eager", "compiled", "reference")
BY_GRAPH = (Column("host µs", "host_us", "{:.1f}"), Column("timed by", "timed"))
WARMUP = {"kernels": 5, "discriminator": 10}


@dataclass(frozen=True, kw_only=True)
class KernelBench(Benchmark):
    """Each op: our kernel, eager PyTorch, torch.compile, the exact reference, and the floor."""

    name = "kernels"
    labels = ("sizes",)
    lists: ClassVar = {"sizes": SIZES, "ops": OPS, "against": AGAINST}
    columns = (
        Column("GB/s", "gigabytes_per_second", "{:.1f}"),
        Column("of floor's rate", "share_of_floor", "{:.0%}"),
        Column("of copy's rate", "share_of_copy", "{:.0%}"),
        *BY_GRAPH,
        Column("kernel faster", "over_native", "{:.1f}x"),
    )

    repeats: int = 60
    """Timed calls of each candidate, all candidates in turn."""
    ops: str = ",".join(OPS)
    """Ops, comma-separated."""
    sizes: str = ",".join(SIZES)
    """cifar (128x3x32x32) and imagenet (64x3x224x224), comma-separated."""
    against: str = ",".join(AGAINST)
    """What stands beside kernel and floor: eager, compiled, reference; comma-separated."""

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each op, norm, size and dtype."""
        timer = clock(device, say, WARMUP[self.name])
        for size in self.listed("sizes"):
            for op in self.listed("ops"):
                for one in (one for one in timed(size) if one.op == op):
                    yield one.name, case(one, device, self.listed("against"), self.repeats, timer, say)


def several(one: OpCase, device: torch.device, timer: Clock) -> list[Work]:
    """The work of a case on as many sets of inputs as the clock wants."""
    first = one.on(device)
    return [first, *(one.on(device) for _ in range(timer.sets(first.footprint) - 1))]


def case(one: OpCase, device: torch.device, against: Collection[str], repeats: int, timer: Clock, say: Say) -> Case:
    """All ways to do one op's work, on the same sets of inputs, timed in turn."""
    base.begin(one.name)
    sets = several(one, device, timer)
    with backend.use("native"):
        taken = timer.take(one.name, ways(sets, device, against, say), repeats)
    bytes_moved, rate = sets[0].bytes_moved, timer.measured.get(COPY_RATE)
    native, floor = taken["native"].median, taken["floor"].median

    def figures(found: Candidate) -> dict[str, Figure]:
        gigabytes = bytes_moved / found.median * 1e-9 if bytes_moved else None
        share = {"share_of_copy": gigabytes and gigabytes / rate} if isinstance(rate, float) else {}
        shares = {"share_of_floor": floor / found.median, "over_native": found.median / native}
        return {"gigabytes_per_second": gigabytes, **shares, **found.figures, **share}

    candidates = {way: Candidate(found.seconds, figures(found)) for way, found in taken.items()}
    return Case({"bytes_moved": bytes_moved}, candidates, timer.measured)


def ways(sets: Sequence[Work], device: torch.device, against: Collection[str], say: Say) -> dict[str, Calls]:
    """Kernel, floor, and what was asked for of the ways between them that the work has."""
    found: dict[str, list[Call]] = {"native": [work.native for work in sets]}
    if "eager" in against:
        found["eager"] = [work.eager for work in sets]
    if "compiled" in against and sets[0].compiles and (compiled := _compiled(sets, say)):
        found["compiled"] = compiled
    if "reference" in against and sets[0].exact:
        found["reference"] = [backend.use("reference")(work.native) for work in sets]
    found["floor"] = [work.floor(device) for work in sets]
    zeroed = [tensor for work in sets for tensor in work.zeroed]
    before = partial(torch._foreach_zero_, zeroed) if zeroed else None
    return {way: Calls(calls, before) for way, calls in found.items()}


def _compiled(sets: Sequence[Work], say: Say) -> list[Call] | None:
    """The eager formulation under torch.compile, compiled once; None, with a word, where there is no compiler."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    base.detail("compiling")
    torch.compiler.reset()  # earlier cases do not count towards the limit of recompilations
    calls: list[Call] = [torch.compile(work.eager) for work in sets]
    try:
        calls[0]()
    except TorchDynamoException as error:
        say(f"left out: torch.compile, which fails here: {str(error).splitlines()[0]}")
        return None
    return calls


# --- The discriminator -----------------------------------------------------------------------------------------------

WIDTH, CLASSES, BATCHES = 512, (10, 100), (128, 1024)
BESIDE = {"cpu": ("plain", "parametrized"), "cuda": ("plain", "parametrized", "compiled")}
GRAPH = "power iteration in a CUDA graph"


@dataclass(frozen=True, kw_only=True)
class DiscriminatorBench(Benchmark):
    """The spectral-normalised discriminator beside the same layers of torch, with and without spectral norm.

    A case is one forward and backward of the whole network, to the gradients of its parameters and of its input.
    "plain" has no spectral norm: it is the floor that a spectral norm should cost nothing over. "parametrized" is
    `torch.nn.utils.parametrizations.spectral_norm`.

    With ``--device cuda`` the network also takes a step of SGD, stands beside torch.compile's form of torch's, and the
    power iteration of the group is timed by itself. There each candidate has several networks and batches in turn, so
    that weights are as cold as another leaves them; only torch.compile's, which would compile each anew, is one.
    """

    name = "discriminator"
    columns = (*BY_GRAPH, Column("of plain", "over_plain"), Column("afd faster", "over_afd", "{:.2f}x"))

    repeats: int = 300
    """Timed calls of each candidate, all candidates in turn."""
    against: str | None = None
    """plain, parametrized, compiled (on a GPU only); comma-separated. Default: all that the device has."""

    @property
    def settings(self) -> dict[str, Figure]:
        """The width of its layers."""
        return {"width": WIDTH}

    def check(self) -> None:
        """The candidates of its device, too."""
        super().check()
        self.beside(device_named(self.device))

    def beside(self, device: torch.device) -> list[str]:
        """The candidates that were asked for, which the device must have."""
        return list(BESIDE[device.type]) if self.against is None else self.listed("against", BESIDE[device.type])

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each batch and number of classes; on a GPU, the power iteration too."""
        against, timer = self.beside(device), clock(device, say, WARMUP[self.name])
        for batch, classes in product(BATCHES, CLASSES):
            name = f"batch {batch}, {classes} classes"
            base.begin(name)
            sets = timer.sets(footprint(batch, classes))
            with backend.use("native"):
                taken = timer.take(name, updates(batch, classes, sets, against, device), self.repeats)
            ours, plain = taken["afd"].median, taken["plain"].median if "plain" in taken else None
            candidates = {which: Candidate(found.seconds, {
                "over_plain": found.median / plain if plain else None, "over_afd": found.median / ours, **found.figures,
            }) for which, found in taken.items()}  # fmt: skip
            yield name, Case({"batch": batch, "classes": classes}, candidates, timer.measured)
        if device.type == "cuda":
            groups = [ProjectionDiscriminator(WIDTH, 100).to(device).spectra for _ in range(timer.sets(matrices(100)))]
            with backend.use("native"):
                yield GRAPH, Case({}, timer.take(GRAPH, {"afd": Calls(groups)}, self.repeats), timer.measured)


def footprint(batch: int, classes: int) -> int:
    """Bytes of parameters, momenta and gradients, and of a batch and its gradient."""
    return 3 * matrices(classes) + 2 * 4 * batch * WIDTH


def matrices(classes: int) -> int:
    """Bytes of the layers' weights."""
    return 4 * WIDTH * (2 * WIDTH + 1 + classes)


def updates(batch: int, classes: int, sets: int, against: Collection[str], device: torch.device) -> dict[str, Calls]:
    """One case: forward and backward on the CPU, and the step of SGD too on a GPU."""
    torch.manual_seed(0)
    inputs = [(torch.randn(batch, WIDTH, device=device, requires_grad=True),
               torch.randint(classes, (batch,), device=device)) for _ in range(sets)]  # fmt: skip
    builds: dict[str, Callable[[], nn.Module]] = {
        "afd": lambda: ProjectionDiscriminator(WIDTH, classes),
        "plain": lambda: TorchDiscriminator(WIDTH, classes),
        "parametrized": lambda: TorchDiscriminator(WIDTH, classes, spectral_norm),
    }
    nets = {name: [build().to(device) for _ in inputs] for name, build in builds.items() if name in ("afd", *against)}
    if "compiled" in against:
        compiled = builds["parametrized"]().to(device)
        compiled.compile()
        nets["compiled"] = [compiled] * sets
    return {
        name: Calls([_update(net, *one) for net, one in zip(each, inputs, strict=True)]) for name, each in nets.items()
    }


def _update(net: nn.Module, z: Tensor, y: Tensor) -> Call:
    wanted = [z, *net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)

    def call() -> None:
        for tensor in wanted:
            tensor.grad = None
        net(z, y).sum().backward()
        if z.is_cuda:
            optimizer.step()

    return call
