"""One attack by several libraries on the same model and batch: their speed, and what it was bought with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.attacks import engine, execution
from afd.attacks.joining import Joining
from afd.bench import at_work
from afd.bench.arithmetic import matmul_rate, pass_flops, tf32
from afd.bench.document import Candidate, Case, Figure
from afd.bench.host import HostReads
from afd.bench.memory import peak_bytes
from afd.bench.models import Subject
from afd.bench.peers import PEERS, PeerMissingError, adapted
from afd.bench.program import Say
from afd.bench.request import NotOfferedError, Request, Run, ours
from afd.bench.timing import Timing, interleaved
from afd.errors import InputError, out_of_memory
from afd.ops.backend import fast_bf16

FLOOR, OURS, AUTO = "floor", "afd", "afd auto"


@dataclass(frozen=True)
class Contestant:
    """A run, and the arithmetic that its model works in: fp32, tf32 or bf16."""

    run: Run
    arithmetic: str = "fp32"


def floor(target: Subject, request: Request) -> Run:
    """The model's own cost: forward and input gradient, as often as the attack takes them."""
    joining = Joining()

    def run(x: Tensor, y: Tensor) -> Tensor:
        with engine.evaluating(target.model), joining.joined(target.model):
            for rows in execution.pieces(target.model, x):
                images, labels = execution.channels_last(x[rows]).requires_grad_(), y[rows]
                for _ in range(request.passes):
                    torch.autograd.grad(F.cross_entropy(target.model(images), labels, reduction="sum"), images)
        return x

    return run


def contestants(target: Subject, request: Request, against: Sequence[str], say: Say) -> dict[str, Contestant]:
    """The floor, afd in each of its precisions, and the peers that are present and offer the attack."""
    device = target.x.device
    found = {FLOOR: Contestant(floor(target, request)), OURS: Contestant(ours(target.model, request))}
    if device.type == "cuda":
        found["afd tf32"] = Contestant(tf32(True)(ours(target.model, request)), "tf32")
    auto = ours(target.model, request, precision="auto")
    found[AUTO] = Contestant(auto, "bf16" if fast_bf16(device) else "fp32")
    absent = []
    for name in against:
        try:
            found[name] = Contestant(adapted(name, target.model, request), PEERS[name].arithmetic)
        except (PeerMissingError, NotOfferedError) as error:
            absent.append(str(error))
    if absent:
        say(f"{request.name}, left out: {'; '.join(dict.fromkeys(absent))}")
    return found


def fitting(target: Subject, request: Request, against: Sequence[str], rounds: int, say: Say) -> tuple[Subject, Case]:
    """The case with the largest batch, of the one given and its halves, that everybody has memory for.

    Raises:
        InputError: a single image is too much.
    """
    while True:
        try:
            return target, case(target, request, against, rounds, say)
        except Exception as error:
            if not out_of_memory(error):
                raise
            images = len(target.x)
        if images == 1:
            raise InputError(f"{request.name} on {target.name} does not fit in memory, not even with one image")
        say(f"{images} images do not fit in memory: all candidates go on with {images // 2}")
        target = target.first(images // 2)
        if target.x.is_cuda:
            torch.cuda.empty_cache()


def case(target: Subject, request: Request, against: Sequence[str], rounds: int, say: Say) -> Case:
    """Everybody timed in turn, after two untimed calls.

    The first is watched for host reads, and its points for the accuracy they leave; the second for memory. (On CUDA
    afd records its graph in the second, so that its memory counts and its recording takes no timed call's time.)
    """
    entrants = contestants(target, request, against, say)
    device, x, y = target.x.device, target.x, target.y
    facts: dict[str, dict[str, Figure]] = {}
    at_work.begin(f"{request.name}, {target.size}")
    for name, entrant in list(entrants.items()):
        at_work.now(f"two untimed calls of {name}")
        try:
            facts[name] = untimed(target, entrant.run, attacks=name != FLOOR)
        except NotOfferedError as error:
            say(f"{request.name}, left out: {error}")
            del entrants[name]
    calls = {name: partial(entrant.run, x, y) for name, entrant in entrants.items()}
    times = interleaved(calls, rounds, warmup=0, device=device)
    at_work.now("counting its arithmetic, and timing matrix products")
    flops = pass_flops(target.model, x, y)
    speeds = _speeds(times, entrants, len(x) * request.steps, request.passes * flops, device)
    images = {name: {"images_per_second": len(x) / taken.p50} for name, taken in times.items()}
    return Case(
        settings={"images": target.size, **asdict(request), "flops_per_pass": flops},
        candidates={name: Candidate(times[name], {**images[name], **speeds[name], **facts[name]}) for name in entrants},
        measured={f"matmul_{kind}": _rate(kind, device) for kind in sorted({e.arithmetic for e in entrants.values()})},
    )


def untimed(target: Subject, run: Run, attacks: bool) -> dict[str, Figure]:
    """What two calls show beside their time."""
    with HostReads() as reads:
        attacked = run(target.x, target.y)
    return {
        "accuracy_left": accuracy(target, attacked) if attacks else None,
        "host_reads": reads.count,
        "peak_bytes": peak_bytes(lambda: run(target.x, target.y), target.x.device),
    }


@torch.no_grad()
def accuracy(target: Subject, x: Tensor) -> float:
    """Share of images that the model still classifies as it did."""
    right = [(target.model(part).argmax(1) == y) for part, y in zip(x.split(128), target.y.split(128), strict=True)]
    return float(torch.cat(right).float().mean())


def _speeds(
    times: Mapping[str, Timing],
    entrants: Mapping[str, Contestant],
    image_steps: int,
    flops: float,
    device: torch.device,
) -> dict[str, dict[str, Figure]]:
    """What follows from the times.

    A candidate's share of the matrix products' rate is that of the work everybody needs: what it computes beside that
    lowers its share, and a convolution that is not computed as a matrix product may raise it.
    """
    base = {f"over_{word}": times[name].p50 for word, name in (("floor", FLOOR), ("afd", OURS), ("auto", AUTO))}
    return {
        name: {
            "image_steps_per_second": image_steps / taken.p50,
            **{word: taken.p50 / seconds for word, seconds in base.items()},
            "matmul_share": flops / taken.p50 / _rate(entrants[name].arithmetic, device),
            "arithmetic": entrants[name].arithmetic,
        }
        for name, taken in times.items()
    }


@cache
def _rate(kind: str, device: torch.device) -> float:
    return matmul_rate(kind, device)
