"""Attack throughput side by side, ``afd bench attacks``, and what both sides break, ``afd bench agreement``.

Every library runs the same attack on the same model and batch, in turn. The floor is what the model itself costs afd in
float32: as many forwards and input gradients as the attack makes, in afd's own memory layout, pieces of the batch and
folded layers, and nothing else. The accuracy each attack leaves stands beside its speed, so that speed bought with a
weaker attack shows.

Float32 means float32: CUDA's TF32, which torch allows in convolutions unless told otherwise, is off for everybody but
the candidates named after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd import execution
from afd.attacks import PGD, Norm, engine
from afd.attacks.joining import Joining
from afd.bench import base
from afd.bench.base import Benchmark, Say
from afd.bench.baselines import (
    ATTACKS,
    BASELINES,
    NORMS,
    BaselineMissingError,
    NotOfferedError,
    Request,
    Run,
    adapted,
    ours,
)
from afd.bench.metering import Call, HostReads, interleaved, peak_bytes, products, tf32
from afd.bench.results import Candidate, Case, Column, Figure, mebibytes
from afd.data import load
from afd.errors import InputError, at_least, one_of, out_of_memory
from afd.evaluation.attacks import check_radius
from afd.evaluation.model import from_factory
from afd.files import check_path
from afd.nn import build_model, build_named
from afd.nn.sources import source_of
from afd.ops.backend import fast_bf16
from afd.passes import pass_flops

CLASSES = 10  # of a library's network
RADII: dict[int, dict[Norm, float]] = {  # by channels: the usual ones of MNIST and of CIFAR-10
    1: {"Linf": 0.3, "L2": 2.0, "L1": 10.0},
    3: {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0},
}
FLOOR, OURS, AUTO = "floor", "afd", "afd auto"
BASES = {"floor": FLOOR, "afd": OURS, "auto": AUTO}  # that times are given as multiples of


@dataclass(frozen=True, kw_only=True)
class AttackBench(Benchmark):
    """Attacks of afd beside other libraries': speed, memory, host reads, and the accuracy that each leaves."""

    name, labels, shared, counts = "attacks", ("model", "attack", "steps"), ("model",), ("batch", "steps")
    lists: ClassVar = {"attack": ATTACKS, "norm": NORMS, "against": BASELINES}
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
    """lenet, resnet18; timm:NAME, torchvision:NAME or hf:NAME, with random weights; or package.module:factory, a
    function that returns a classifier."""
    batch: int | None = None
    """Images a batch. Default: 512 for lenet, else 128."""
    shape: tuple[int, int, int] | None = None
    """Channels, height and width of an image, for a model that is not one of the two. Default: 3 32 32."""
    attack: str = "pgd"
    """pgd, apgd; comma-separated."""
    norm: str = "Linf"
    """Linf, L2, L1; comma-separated."""
    eps: float | None = None
    """Radius, where one norm is asked for. Default: the usual one of MNIST (1 channel) or CIFAR-10."""
    steps: int = 20
    """Of each attack."""
    against: str = ",".join(BASELINES)
    """Baselines, comma-separated; what is not installed or has no such attack is named and left out."""

    @property
    def packages(self) -> Iterable[str]:
        """Of the baselines asked for."""
        asked = [BASELINES[name] for name in self.listed("against")]
        return sorted({baseline.package for baseline in asked if baseline.installed} - {"torch"})

    def check(self) -> None:
        """The settings of all attacks, and a factory's model, too."""
        super().check()
        _ = self.requests(), self.model in MODELS or self.own

    @cached_property
    def own(self) -> nn.Module:
        """The model of the user's factory."""
        torch.manual_seed(0)
        if not source_of(self.model)[0]:
            return from_factory(self.model, torch.device("cpu")).network
        channels, height, width = self.size
        return build_named(self.model, (channels, height, width), CLASSES).eval()

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of an image."""
        if self.model not in MODELS and ":" not in self.model:
            raise InputError(
                f"model is {self.model!r}; allowed are {', '.join(MODELS)}, timm:NAME and such, and "
                "package.module:factory"
            )
        found = self.shape or (MODELS[self.model][1] if self.model in MODELS else (3, 32, 32))
        if min(found) < 1:
            raise InputError(f"shape is {'x'.join(map(str, found))}; each side must be at least 1")
        return found

    def requests(self) -> list[Request]:
        """Every attack in every norm; PGD's steps together are 2.5 times as long as the radius (Madry et al. 2018)."""
        norms: list[Norm] = self.listed("norm")
        radii = RADII[1 if self.size[0] == 1 else 3]
        if self.eps is not None:
            if len(norms) > 1:
                raise InputError(f"eps is {self.eps:g} for {', '.join(norms)}; ask for one norm at a time")
            at_least("eps", self.eps, 0)
            check_radius(self.eps, norms[0], math.prod(self.size))
            radii = {norms[0]: self.eps}
        return [Request(attack, norm, radii[norm], radii[norm] * 2.5 / self.steps, self.steps)
                for attack in self.listed("attack") for norm in norms]  # fmt: skip

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each attack in each norm."""
        base.begin(f"building {self.model}")
        timed = self.timed(device)
        for request in self.requests():
            with tf32(False):
                found = case(timed, request, self.listed("against"), self.repeats, say)
            yield f"{request.name}, {timed.size}", found

    def timed(self, device: torch.device) -> TimedModel:
        """The model with random images; an InputError if it does not take them."""
        torch.manual_seed(0)
        known = MODELS.get(self.model)
        model = (known[0]().eval() if known else self.own).to(device)
        x = torch.rand(self.batch or (known[2] if known else 128), *self.size, device=device)
        try:
            with torch.no_grad():
                found = [model(part) for part in x.split(128)]
                if not all(isinstance(one, Tensor) for one in found):
                    raise TypeError(f"it returns a {type(found[0]).__name__}, and other libraries take logits alone")
                y = torch.cat([one.argmax(1) for one in found])
        except Exception as error:  # the model's own
            if out_of_memory(error):
                raise
            told, reason = "x".join(map(str, self.size)), str(error).split("\n", 1)[0]
            raise InputError(f"shape is {told}, which model {self.model} does not take: {reason}") from error
        return TimedModel(self.model, model, x, y)


# --- What attacks are timed on ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimedModel:
    """A model in evaluation mode with a batch it classifies rightly."""

    name: str  # what it was asked for by
    model: nn.Module  # images -> logits
    x: Tensor  # images [N, C, H, W] in [0, 1]
    y: Tensor  # the model's own predictions [N], so that every library has every image to attack

    @property
    def size(self) -> str:
        """The batch's shape, as in 128x3x32x32."""
        return "x".join(map(str, self.x.shape))

    @torch.no_grad()
    def accuracy(self, x: Tensor) -> float:
        """Share of images that the model still classifies as it did."""
        right = [(self.model(part).argmax(1) == y) for part, y in zip(x.split(128), self.y.split(128), strict=True)]
        return float(torch.cat(right).float().mean())


def lenet() -> nn.Module:
    """LeNet-size network for 1x28x28 images, as attack libraries use in their MNIST examples."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 49, 1024), nn.ReLU(), nn.Linear(1024, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # with an image's shape, and images
    "lenet": (lenet, (1, 28, 28), 512),
    "resnet18": (lambda: build_model("resnet18", (3, 32, 32), 10, 64), (3, 32, 32), 128),
}


# --- One attack by everybody -----------------------------------------------------------------------------------------


def case(timed: TimedModel, request: Request, against: Sequence[str], repeats: int, say: Say) -> Case:
    """Everybody timed in turn, after two untimed calls.

    The first is watched for host reads, and its points for the accuracy they leave; the second for memory. (On CUDA
    afd records its graph in the second, so that its memory counts and its recording takes no timed call's time.)
    """
    runs = candidates(timed, request, against, say)
    device, x, y = timed.x.device, timed.x, timed.y
    facts: dict[str, dict[str, Figure]] = {}
    base.begin(f"{request.name}, {timed.size}")
    for name, (run, _) in list(runs.items()):
        base.detail(f"two untimed calls of {name}")
        try:
            with HostReads() as reads:
                attacked = run(x, y)
        except NotOfferedError as error:
            say(f"{request.name}, left out: {error}")
            del runs[name]
            continue
        facts[name] = {
            "accuracy_left": None if name == FLOOR else timed.accuracy(attacked),
            "host_reads": reads.count,
            "peak_bytes": peak_bytes(partial(run, x, y), device),
        }
    base.detail("counting its arithmetic, and trying matrix products")
    flops = pass_flops(timed.model, x, y)
    by_kind = {kind: _products(kind, device) for kind in sorted({kind for _, kind in runs.values()})}
    calls: dict[str, Call] = {name: partial(run, x, y) for name, (run, _) in runs.items()}
    calls |= {name: product.call for forms in by_kind.values() for name, product in forms.items()}
    times = interleaved(calls, repeats, 0, device)
    rates = {
        kind: max(product.flops / times.pop(name).p50 for name, product in forms.items())
        for kind, forms in by_kind.items()
    }
    for name, taken in times.items():
        # The share of the matrix products' rate is that of the work everybody needs: what a candidate computes beside
        # that lowers it, and on CUDA a convolution that is not computed as a matrix product may raise it. The products
        # are timed in turn with the candidates, so that what slows the machine down slows both.
        facts[name] = {
            "images_per_second": len(x) / taken.p50,
            "image_steps_per_second": len(x) * request.steps / taken.p50,
            **{f"over_{word}": taken.p50 / times[other].p50 for word, other in BASES.items()},
            "matmul_share": request.passes * flops / taken.p50 / rates[runs[name][1]],
            "arithmetic": runs[name][1],
            **facts[name],
        }
    return Case(
        settings={"images": timed.size, **asdict(request), "flops_per_pass": flops},
        candidates={name: Candidate(taken, facts[name]) for name, taken in times.items()},
        measured={f"matmul_{kind}": rate for kind, rate in rates.items()},
    )


_products = cache(products)


def candidates(timed: TimedModel, request: Request, against: Sequence[str], say: Say) -> dict[str, tuple[Run, str]]:
    """The floor, afd in each of its precisions, and the baselines that are present and offer the attack.

    Each with the arithmetic that its model works in: fp32, tf32 or bf16.
    """
    device = timed.x.device
    found = {FLOOR: (floor(timed, request), "fp32"), OURS: (ours(timed.model, request), "fp32")}
    if device.type == "cuda":
        found["afd tf32"] = (tf32(True)(ours(timed.model, request)), "tf32")
    found[AUTO] = (ours(timed.model, request, precision="auto"), "bf16" if fast_bf16(device) else "fp32")
    absent = []
    for name in against:
        try:
            found[name] = (adapted(name, timed.model, request), BASELINES[name].arithmetic)
        except (BaselineMissingError, NotOfferedError) as error:
            absent.append(str(error))
    if absent:
        say(f"{request.name}, left out: {'; '.join(dict.fromkeys(absent))}")
    return found


def floor(timed: TimedModel, request: Request) -> Run:
    """The model's own cost: forward and input gradient, as often as the attack takes them."""
    joining = Joining()

    def run(x: Tensor, y: Tensor) -> Tensor:
        with engine.evaluating(timed.model), joining.joined(timed.model):
            for rows in execution.AttackExecution().chunks(timed.model, x):
                images, labels = execution.channels_last(x[rows]).requires_grad_(), y[rows]
                for _ in range(request.passes):
                    torch.autograd.grad(F.cross_entropy(timed.model(images), labels, reduction="sum"), images)
        return x

    return run


# --- Does speed cost strength? ----------------------------------------------------------------------------------------

AGREED: dict[Norm, float] = {"Linf": 0.15, "L2": 1.5, "L1": 8.0}  # radii


@dataclass(frozen=True, kw_only=True)
class AgreementBench(Benchmark):
    """Which of a thousand MNIST images afd breaks, and which another library does. Nothing is timed.

    A LeNet-size net is trained on MNIST for an epoch, a little adversarially, so that about half of the test images can
    be broken. Both libraries then run APGD-CE with the same steps and restarts, and the table says how many images each
    leaves, and how many each breaks that the other does not.
    """

    name, shared, counts = "agreement", ("images", "steps", "precision"), ("images", "steps")
    columns = (Column("accuracy left", "accuracy_left", "{:.1%}"), Column("broken by it alone", "broken_alone", "{}"))

    data: Path | None = None
    """Folder of MNIST's files; by default a cache folder, filled from the network."""
    repeats: ClassVar[int] = 1  # type: ignore[misc]  # the same seed finds the same points
    images: int = 1000
    """Of the test set."""
    steps: int = 100
    """Of APGD."""
    peer: str = "pyautoattack"
    """The other library."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of afd."""

    @property
    def packages(self) -> list[str]:
        """The peer."""
        return [BASELINES[self.peer].package]

    def check(self) -> None:
        """The peer and the data's folder, too."""
        super().check()
        one_of("peer", self.peer, BASELINES)
        if self.data is not None:
            check_path("data", self.data)

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each norm."""
        del say
        base.begin("training a LeNet on MNIST")
        sets = load("mnist", self.data)
        model = trained(sets.train.images().to(device), sets.train.labels.to(device))
        x, y = (part[: self.images].to(device) for part in (sets.test.images(), sets.test.labels))
        for norm, eps in AGREED.items():
            base.begin(f"{norm}: both libraries attack {len(x)} images")
            request = Request("apgd", norm, eps, alpha=eps, steps=self.steps)
            runs = {"afd": ours(model, request, self.precision), self.peer: adapted(self.peer, model, request)}
            left = {name: robust(model, run, x, y) for name, run in runs.items()}
            somebody = torch.stack(list(left.values())).any(0)
            yield norm, Case({"eps": eps}, {name: Candidate(None, {
                "accuracy_left": float(kept.double().mean()), "broken_alone": int((somebody & ~kept).sum()),
            }) for name, kept in left.items()})  # fmt: skip


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
def robust(model: nn.Module, run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model still classifies rightly after an attack, [N] bool."""
    with torch.enable_grad():
        attacked = [(run(a, b), b) for a, b in zip(x.split(250), y.split(250), strict=True)]
    return torch.cat([model(a).argmax(1) == b for a, b in attacked])
