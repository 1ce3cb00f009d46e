"""AutoAttack's standard version beside pyautoattack's, whole and each part alone: ``afd bench autoattack``.

Both attack the same images of a trained model, in turn; a repeat has its own seed, so that the accuracies that a side
leaves have a spread to be judged by. The floor is what the model itself costs: as many forwards and input gradients of
images as the part makes, at the model's own best, in whichever layout and batch it is fastest, its layers not joined,
in the same precision and the same run.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd import data
from afd.attacks import AutoAttack, Norm, engine, external
from afd.bench import base
from afd.bench.base import Benchmark, Say
from afd.bench.metering import Call, Reading, between_events, in_turn, on_cpu, products, tf32
from afd.bench.results import Candidate, Case, Column, Figure, Timing
from afd.errors import InputError, one_of
from afd.evaluation.attacks import Epsilon, check_radius
from afd.evaluation.command import load, trained_at
from afd.execution import Passes, channels_last
from afd.files import check_path
from afd.metrics import predict
from afd.ops.backend import fast_bf16
from afd.passes import pass_flops

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
WHOLE = "whole"
PEER, OURS, AUTO, FLOOR, AUTO_FLOOR = "pyautoattack", "afd", "afd auto", "floor", "floor auto"
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"NCHW": lambda x: x.contiguous(), "channels_last": channels_last}
BATCHES = (16, 32, 64, 128, 256)  # of the floor
AT_ONCE = 250  # images that a side is given together


@dataclass(frozen=True, kw_only=True)
class AutoAttackBench(Benchmark):
    """AutoAttack beside pyautoattack's on a trained model: time, floor, and the accuracy that each part leaves."""

    name, labels, shared = "autoattack", ("data", "norm"), ("model", "data", "images", "norm")
    counts = ("images",)
    lists: ClassVar = {"parts": (WHOLE, *PARTS)}
    columns = (
        Column("over floor", "over_floor", "{:.2f}x"),
        Column("afd faster", "over_afd", "{:.2f}x"),
        Column("auto faster", "over_auto", "{:.2f}x"),
        Column("accuracy left", "accuracy_left", "{:.1%}"),
        Column("least", "least_left", "{:.1%}"),
        Column("most", "most_left", "{:.1%}"),
        Column("of matmul rate", "matmul_share", "{:.0%}"),
        Column("forwards an image", "forwards", "{:,.0f}"),
        Column("gradients an image", "gradients", "{:,.0f}"),
    )

    model: str = ""
    """A checkpoint, a run's folder, or package.module:function."""
    data: Literal["digits", "mnist", "cifar10", "cifar100"] = "digits"
    """Data set, whose first test images are attacked."""
    data_root: Path | None = None
    """Folder of the data files; by default a cache folder, filled from the network."""
    images: int = 200
    """Of the test set."""
    norm: Norm = "Linf"
    """Linf, L2 or L1."""
    eps: str = ""
    """Radius, such as 0.3 or 8/255. Default, in Linf: what the model was trained at."""
    parts: str = ",".join((WHOLE, *PARTS))
    """whole, apgd-ce, apgd-t, fab-t, square; comma-separated."""
    peer: bool = True
    """Run pyautoattack, too."""
    repeats: int = 3
    """Of each candidate, all candidates in turn, each time with another seed."""

    @property
    def packages(self) -> Iterable[str]:
        """The peer."""
        return ("pyautoattack",) if self.peer else ()

    @property
    def settings(self) -> Mapping[str, Figure]:
        """Of all cases; of a path, the last part."""
        return {**super().settings, "model": Path(self.model).name}

    def check(self) -> None:
        """The model and the radius, too."""
        super().check()
        one_of("norm", self.norm, ("Linf", "L2", "L1"))
        if not self.model:
            raise InputError("model is missing; name a checkpoint, a run's folder or package.module:function")
        if self.data_root is not None:
            check_path("data-root", self.data_root)
        if not self.eps and self.norm != "Linf":
            raise InputError(f"eps is missing; norm {self.norm} has no usual radius, so name one")

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for the whole, and one for each part on its own."""
        base.begin(f"loading {self.model}")
        model = load(self.model, device)
        test = data.load(self.data, self.data_root).test
        if self.images > len(test):
            raise InputError(f"images is {self.images}; the test set of {self.data} has {len(test)}")
        x, y = (part[: self.images].to(device) for part in (test.images(torch.arange(self.images)), test.labels))
        eps = Epsilon.of(self.eps) if self.eps else trained_at(model, self.data)
        check_radius(eps, self.norm, math.prod(x.shape[1:]))
        attacked = Attacked(model.network.eval(), x, y, self.norm, float(eps))
        for part in self.listed("parts"):
            with tf32(False):
                yield f"{part}, {self.norm}", case(attacked, part, self.repeats, peer=self.peer, say=say)


@dataclass(frozen=True)
class Attacked:
    """A model in evaluation mode, images [N, C, H, W] in [0, 1], their labels [N], and the ball around them."""

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: Norm
    eps: float


class Counted(nn.Module):
    """A model that counts the images which pass it, with and without a gradient wanted.

    Attributes:
        images: by "forwards" (without) and "gradients".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, Counter[str]()

    def forward(self, x: Tensor) -> Any:
        """What the model returns."""
        self.images["gradients" if torch.is_grad_enabled() and x.requires_grad else "forwards"] += len(x)
        return self.model(x)


@dataclass
class Side:
    """One library at a part, or at the whole.

    Attributes:
        attack: (model, seed) -> a call (x, y) -> x_adv.
        attacked: what is attacked.
        left: accuracy that each run left.
        passes: images a run passed through the model, by kind, in the last run.
    """

    attack: Callable[[nn.Module, int], Callable[[Tensor, Tensor], Tensor]]
    attacked: Attacked
    left: list[float] = field(default_factory=list)
    passes: Mapping[str, int] = field(default_factory=dict)
    runs: int = 0

    def __call__(self) -> None:
        """One run, with a seed of its own; what the model says of its points is asked for afterwards."""
        attacked, counted = self.attacked, Counted(self.attacked.model)
        attack = self.attack(counted, self.runs)
        self.runs += 1
        self.points = [attack(a, b) for a, b in zip(attacked.x.split(AT_ONCE), attacked.y.split(AT_ONCE), strict=True)]
        self.passes = dict(counted.images)

    def judge(self) -> None:
        """Notes the accuracy that the last run left."""
        said = predict(self.attacked.model, torch.cat(self.points)).classes
        self.left.append(float((said == self.attacked.y).double().mean()))


def case(attacked: Attacked, part: str, repeats: int, *, peer: bool, say: Say) -> Case:
    """Everybody in turn, once a repeat, and beside them the time that the model takes for an image."""
    parts = PARTS if part == WHOLE else (part,)
    base.begin(f"{part}, {attacked.norm}, {len(attacked.x)} images")
    sides = {OURS: Side(partial(ours, attacked, parts, "fp32"), attacked)}
    device = attacked.x.device
    if fast_bf16(device):
        sides[AUTO] = Side(partial(ours, attacked, parts, "auto"), attacked)
    else:
        say("afd auto is left out: this device does not multiply bfloat16 in hardware, so it is afd itself")
    if peer:
        sides[PEER] = Side(partial(theirs, attacked, parts), attacked)
    costs = {OURS: PassCost(attacked, "fp32"), AUTO: PassCost(attacked, "bf16")}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, taken in in_turn(sides, 1, reader(device)).items():
            base.detail(f"repeat {number + 1} of {repeats}, the floor beside {name}")
            times[name] += taken
            sides[name].judge()
        for name in sides.keys() & costs.keys():
            costs[name].measure()
    timings = {name: Timing.of(taken) for name, taken in times.items()}
    flops, found = pass_flops(attacked.model, attacked.x[:2], attacked.y[:2]) / 2, dict[str, Candidate]()
    for name, side in sides.items():
        figures: dict[str, Figure] = {
            "accuracy_left": median(side.left), "least_left": min(side.left), "most_left": max(side.left),
            "over_afd": timings[name].p50 / timings[OURS].p50,
            **{kind: side.passes.get(kind, 0) / len(attacked.x) for kind in ("forwards", "gradients")},
        }  # fmt: skip
        if AUTO in timings:
            figures["over_auto"] = timings[name].p50 / timings[AUTO].p50
        if name in costs:
            seconds = costs[name].seconds(side.passes)
            figures["over_floor"] = timings[name].p50 / seconds
            rate = matmul_rate("bf16" if name == AUTO else "fp32", device)
            work = (side.passes.get("forwards", 0) / 2 + side.passes.get("gradients", 0)) * flops
            figures["matmul_share"] = work / timings[name].p50 / rate
            found[FLOOR if name == OURS else AUTO_FLOOR] = Candidate(
                Timing(seconds, seconds, seconds), costs[name].figures
            )
        found[name] = Candidate(timings[name], figures)
    clock = "CUDA events" if device.type == "cuda" else "CPU" if reader(device) is of_process else "wall"
    settings: dict[str, Figure] = {
        "clock": clock,
        "images": len(attacked.x),
        "eps": attacked.eps,
        "norm": attacked.norm,
        "part": part,
    }
    return Case(settings, found)


@cache
def matmul_rate(kind: str, device: torch.device) -> float:
    """Floating-point operations a second of the fastest matrix product."""
    forms = products(kind, device)
    times = in_turn({name: form.call for name, form in forms.items()}, 9, reader(device))
    return max(form.flops / median(times[name]) for name, form in forms.items())


def ours(
    attacked: Attacked, parts: Iterable[str], precision: str, model: nn.Module, seed: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Our engine."""
    return AutoAttack(
        model, norm=attacked.norm, eps=attacked.eps, seed=seed, precision=precision, attacks=tuple(parts)
    )  # fmt: skip


def theirs(attacked: Attacked, parts: Iterable[str], model: nn.Module, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """pyautoattack."""
    return external.autoattack(model, norm=attacked.norm, eps=attacked.eps, seed=seed, parts=tuple(parts))


# --- Time ------------------------------------------------------------------------------------------------------------


def reader(device: torch.device) -> Callable[[Call], Reading]:
    """What times a call: events on CUDA, the process's seconds of CPU on one thread, else the clock.

    A side runs for minutes, in which a shared machine gives now more, now less of a core to it; one thread's seconds of
    CPU are what it would take alone.
    """
    return between_events if device.type == "cuda" else of_process if torch.get_num_threads() == 1 else on_cpu


def of_process(call: Call) -> Reading:
    """Seconds of CPU that a call takes this process."""
    begin = time.process_time()
    call()
    seconds = time.process_time() - begin
    return lambda: seconds


# --- The floor --------------------------------------------------------------------------------------------------------


class PassCost:
    """Seconds that an image takes the model, at its best: a forward, and a forward with the gradient at the image.

    Args:
        attacked: whose model and images.
        precision: "fp32" or "bf16".

    Attributes:
        taken: by kind of pass, layout and batch: seconds an image of each measurement.
    """

    def __init__(self, attacked: Attacked, precision: str) -> None:
        self.attacked, self.passes = attacked, Passes(precision)
        self.taken: dict[tuple[str, str, int], list[float]] = {}

    def measure(self) -> None:
        """Once in each layout and batch."""
        sizes = sorted({min(size, len(self.attacked.x)) for size in BATCHES})
        with engine.evaluating(self.attacked.model):
            for kind, run in {"forwards": self._forward, "gradients": self._gradient}.items():
                for layout, lay_out in LAYOUTS.items():
                    for size in sizes:
                        x, y = lay_out(self.attacked.x[:size]), self.attacked.y[:size]
                        calls = {"": partial(run, x, y)}
                        seconds = median(in_turn(calls, 5, reader(x.device))[""])
                        self.taken.setdefault((kind, layout, size), []).append(seconds / size)

    def _forward(self, x: Tensor, _y: Tensor) -> None:
        with torch.inference_mode(), self.passes.autocast(x.device):
            self.attacked.model(x)

    def _gradient(self, x: Tensor, y: Tensor) -> None:
        x = x.detach().requires_grad_()
        with torch.enable_grad(), self.passes.autocast(x.device):
            torch.autograd.grad(F.cross_entropy(self.attacked.model(x), y, reduction="sum"), x)

    def best(self, kind: str) -> tuple[float, str, int]:
        """Seconds an image, with the layout and batch that they are had in."""
        ways = {way: median(taken) for way, taken in self.taken.items() if way[0] == kind}
        fastest = min(ways, key=ways.__getitem__)
        return ways[fastest], *fastest[1:]

    def seconds(self, passes: Mapping[str, int]) -> float:
        """Of so many images, by kind."""
        return sum(images * self.best(kind)[0] for kind, images in passes.items())

    @property
    def figures(self) -> dict[str, Figure]:
        """The best ways, for the document."""
        found: dict[str, Figure] = {}
        for kind in ("forwards", "gradients"):
            seconds, layout, size = self.best(kind)
            found |= {f"{kind}_us_an_image": 1e6 * seconds, f"{kind}_layout": layout, f"{kind}_batch": size}
        return found
