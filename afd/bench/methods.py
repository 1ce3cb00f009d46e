"""Every training method beside its released flow, attack included: ``afd bench methods``.

What somebody wants to know before choosing: passes, time, images a second and memory of a step on one batch. Both sides
attack in as many steps, with BatchNorm in the authors' mode; `afd.bench.released` says where the flows come from. Free
is timed by the batch, all its replays. On CUDA afd's step is also timed as ``afd train --graph`` takes it: attack,
passes and optimizers recorded as one CUDA graph. Passes are counted on a small batch, and memory is measured in calls
of their own, after those that are timed.

Learning rates are so small that networks stay what they are, and labels are what the network says, so that every image
is attacked in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

from afd.attacks import APGDSettings, PGDSettings
from afd.bench import base, released, released_players, released_regularized
from afd.bench.base import Benchmark, Say
from afd.bench.baselines import BASELINES, Request, adapted
from afd.bench.metering import interleaved, peak_bytes
from afd.bench.results import Candidate, Case, Column, Figure, mebibytes
from afd.errors import AfdError
from afd.methods import (
    AFD,
    ALP,
    AT,
    AWP,
    FGSMRS,
    GAT,
    JARN,
    LLR,
    MART,
    TRADES,
    Execution,
    Free,
    Method,
    NormPenalty,
    NuAT,
)
from afd.nn import FeatureClassifier, build_model
from afd.passes import counted
from afd.training.recording import GraphedStep

NETWORKS: dict[str, tuple[str, tuple[int, int, int], int, float]] = {  # network, image, width and radius
    "small": ("convnet", (1, 28, 28), 16, 0.3),
    "resnet18": ("resnet18", (3, 32, 32), 64, 8 / 255),
}
RELEASED, GRAPH = "released", "graph"
PRECISIONS, SCHEDULES = ("fp32", "auto"), ("simultaneous", "alternating")
WARMUP = {"cpu": 1, "cuda": 3}  # calls: a graph is recorded in the second, and its memory settles in the third
LR, SEED = 1e-12, 1  # of all players, and of the attack's starts
SETTLING = 40  # training passes after which BatchNorm's running statistics are the batch's
COUNTED_IMAGES = 2  # that passes are counted on

Call = Callable[[], object]


class RecordingError(AfdError):
    """A step cannot be recorded as one CUDA graph, so there is no replay to be timed."""


@dataclass(frozen=True)
class Setting:
    """A network, its batch, and the attack's settings."""

    model: FeatureClassifier
    x: Tensor
    y: Tensor
    eps: float
    steps: int

    @classmethod
    def of(cls, name: str, batch: int, steps: int, device: torch.device, activation: str = "relu") -> Setting:
        """One of `NETWORKS` with random weights and images (speed does not depend on them)."""
        kind, shape, width, eps = NETWORKS[name]
        torch.manual_seed(0)
        model = build_model(kind, shape, 10, width, activation=activation).to(device)
        x = torch.rand(batch, *shape, device=device)
        with torch.no_grad():
            if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
                for _ in range(SETTLING):
                    model.train()(x[:32])
            y = model.eval()(x).argmax(1)
        return cls(model, x, y, eps, steps)

    @property
    def small(self) -> Setting:
        """The same on the CPU with a few images, for counts that grow with the batch."""
        model = copy.deepcopy(self.model).cpu()
        return replace(self, model=model, x=self.x[:COUNTED_IMAGES].cpu(), y=self.y[:COUNTED_IMAGES].cpu())

    def pgd(self, **settings: Any) -> PGDSettings:
        """The attack of a method."""
        return PGDSettings(**{"eps": self.eps, "alpha": self.eps / 4, "steps": self.steps, **settings})

    @property
    def one_step(self) -> PGDSettings:
        """The attack of GAT and NuAT."""
        return self.pgd(steps=1, alpha=self.eps, init="coin-flip", start_scale=self.eps / 2)


# --- The methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A method on both sides.

    Attributes:
        ours: its settings, for a setting.
        released: (model, optimizer, eps=) -> its flow; None where `flow_of` knows better.
        batchnorm: what BatchNorm does during the attack, on both sides.
        attacks: whether the flow is told alpha and steps.
        activation: of the network.
        kinds: of steps that take turns, each with a graph of its own.
    """

    ours: Callable[[Setting], Any]
    released: Callable[..., Any] | None
    batchnorm: str = "eval"
    attacks: bool = True
    activation: str = "relu"
    kinds: int = 1


def _at(setting: Setting, batchnorm: Literal["eval", "train"]) -> AT:
    return AT(lr=LR, attack=setting.pgd(batchnorm=batchnorm))


def _trades(setting: Setting) -> TRADES:
    return TRADES(lr=LR, attack=setting.pgd(loss="kl", init="gaussian"))


METHODS: dict[str, Entry] = {
    "at": Entry(partial(_at, batchnorm="train"), released.RiceAT, "train"),
    "at-eval": Entry(partial(_at, batchnorm="eval"), released.RobustnessAT),
    "trades": Entry(_trades, released.TRADES),
    "mart": Entry(lambda setting: MART(lr=LR, attack=setting.pgd(init="gaussian")), released.MART),
    "alp": Entry(lambda setting: ALP(lr=LR, attack=setting.pgd(targeted=True)), released.ALP),
    "at+awp": Entry(
        lambda setting: AWP(_at(setting, "train")), partial(released_players.ATAWP, gamma=0.01), "train"
    ),
    "trades+awp": Entry(lambda setting: AWP(_trades(setting)), partial(released_players.TRADESAWP, gamma=0.005)),
    "fgsm-rs": Entry(
        lambda setting: FGSMRS(lr=LR, attack=setting.pgd(steps=1, alpha=1.25 * setting.eps, batchnorm="train")),
        released.FGSMRS,
        "train",
    ),
    "free": Entry(lambda setting: Free(lr=LR, eps=setting.eps), released.Free, "train", attacks=False),
    "norm-penalty": Entry(lambda setting: NormPenalty(lr=LR, attack=setting.pgd()), released.NormPenalty),
    "llr": Entry(
        lambda setting: LLR(lr=LR, eps=setting.eps, search_steps=setting.steps),
        released_regularized.LLR,
        "clean",
        activation="softplus",
    ),
    "gat": Entry(lambda setting: GAT(lr=LR, attack=setting.one_step), released_regularized.GAT, kinds=2),
    "nuat": Entry(lambda setting: NuAT(lr=LR, attack=setting.one_step), released_regularized.NuAT, kinds=2),
    "jarn": Entry(lambda setting: JARN(lr=LR, eps=setting.eps), released_players.JARN, "train", attacks=False),
    "afd": Entry(
        lambda setting: AFD(lr=LR, lr_discriminator=LR, lr_features=LR,
                            attack=APGDSettings(eps=setting.eps, steps=setting.steps)),
        None,
    ),
}  # fmt: skip


def of_released(name: str, setting: Setting) -> Call:
    """A call of the released flow, on a copy of the network."""
    entry, model = METHODS[name], copy.deepcopy(setting.model).train()
    if entry.released is None:  # of AFD, with optimizers of its own
        request = Request("apgd", "Linf", setting.eps, alpha=setting.eps, steps=setting.steps)
        attack = adapted("pyautoattack", model, request)
        return partial(released_players.AFD(model, LR, attack), setting.x, setting.y)
    method = entry.ours(setting)
    core = getattr(method, "core", method)
    optimizer = SGD(model.parameters(), LR, momentum=core.momentum, weight_decay=core.weight_decay)
    told = {}
    if isinstance(core, LLR):
        told = {"alpha": core.search_rate, "steps": core.search_steps}
    elif entry.attacks:
        told = {"alpha": core.attack.alpha, "steps": core.attack.steps}
    return partial(entry.released(model, optimizer, eps=setting.eps, **told), setting.x, setting.y)


def settings_of(name: str, setting: Setting, schedule: Any) -> Method:
    """Our method, in a schedule where it has any."""
    method: Method = METHODS[name].ours(setting)
    return replace(method, schedule=schedule) if isinstance(method, AFD) else method


def of_ours(method: Method, setting: Setting, precision: str) -> Call:
    """A call of ours: its steps on a batch, on a copy of the network."""
    execution = Execution(precision)
    model = execution.prepare(copy.deepcopy(setting.model)).train()
    step = method.build(model, execution)
    step.looks = 0  # as a trainer's

    def batch() -> None:
        for _ in range(method.repeats):
            step(setting.x, setting.y, seed=SEED)

    return batch


def of_graph(method: Method, setting: Setting, precision: str) -> Call:
    """A call of ours as one CUDA graph, as the trainer replays it: the first step is eager, the second records.

    A call raises RecordingError where it would otherwise go on without its graph.
    """
    execution = Execution(precision)
    model = execution.prepare(copy.deepcopy(setting.model)).train()
    step = method.build(model, execution)
    graphed = GraphedStep(model, step, setting.x.device)

    def batch() -> None:
        for _ in range(method.repeats):
            graphed(setting.x, setting.y, seed=SEED)
        if graphed.cache.refused:
            told = f"a step of {type(method).__name__} in {precision}"
            raise RecordingError(f"{told} cannot be recorded as one CUDA graph; the warning above says why")

    return batch


def candidates(
    name: str, setting: Setting, schedules: Sequence[str], precisions: Sequence[str], graphs: bool
) -> dict[str, Call]:
    """All ways to take a method's step by name, afd's also as one graph if that is asked for."""
    found = {RELEASED: of_released(name, setting)}
    for schedule, precision in product(schedules, precisions):
        method = settings_of(name, setting, schedule)
        told = f"afd {schedule} {precision}" if isinstance(method, AFD) else f"afd {precision}"
        if told in found:  # a method without schedules has one
            continue
        found[told] = of_ours(method, setting, precision)
        if graphs:
            found[f"{told} {GRAPH}"] = of_graph(method, setting, precision)
    return found


# --- The benchmark --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MethodsBench(Benchmark):
    """Training methods beside their released flows: passes, time, images a second, memory."""

    name, labels, shared = "methods", ("case",), ("case", "batch", "steps")
    counts = ("batch", "steps")
    lists: ClassVar[Mapping[str, Iterable[str]]] = {
        "methods": METHODS, "schedules": SCHEDULES, "precisions": PRECISIONS,
    }  # fmt: skip
    columns = (
        Column("ms an image", "ms_per_image"), Column("images/s", "images_per_second", "{:,.0f}"),
        Column("times as fast as released", "speedup"), Column("forwards", "forwards", "{:g}"),
        Column("backwards to input", "input_backwards", "{:g}"),
        Column("backwards to weights", "weight_backwards", "{:g}"), Column("cost", "cost", "{:g}"),
        Column("peak MiB", "peak_bytes", mebibytes),
    )  # fmt: skip

    case: Literal["small", "resnet18"] = "small"
    """Network and images: a small net on 1x28x28, or ResNet-18 on 3x32x32."""
    batch: int = 128
    """Images a batch."""
    steps: int = 10
    """Of the attacks, but for those that have one by definition."""
    methods: str = ",".join(METHODS)
    """Comma-separated; BatchNorm is in training mode in the attack of at (Rice), in evaluation mode in at-eval's."""
    schedules: str = "simultaneous"
    """Of afd: simultaneous, alternating; comma-separated."""
    precisions: str = ",".join(PRECISIONS)
    """fp32, auto; comma-separated."""

    @property
    def settings(self) -> Mapping[str, Figure]:
        """Network, images and attack."""
        return {**super().settings, "eps": NETWORKS[self.case][3]}

    @property
    def packages(self) -> Iterable[str]:
        """The attack of AFD's released flow."""
        return [BASELINES["pyautoattack"].package] if "afd" in self.listed("methods") else []

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """A case for each method, as soon as it is timed; it comes again with passes and memory.

        Raises:
            RecordingError: a step could not be recorded; after all others have been timed.
            BaselineMissingError: the attack of AFD's released flow is not installed; before anything is timed.
        """
        base.begin(f"building {self.case}")
        plain = Setting.of(self.case, self.batch, self.steps, device)
        names, refused = self.listed("methods"), list[RecordingError]()
        others = {METHODS[name].activation for name in names} - {"relu"}
        smooth = {one: Setting.of(self.case, self.batch, self.steps, device, one) for one in others}
        if "afd" in names:
            of_released("afd", plain)
        asked = self.listed("schedules"), self.listed("precisions")
        for name in names:
            base.begin(name)
            setting = smooth.get(METHODS[name].activation, plain)
            found = candidates(name, setting, *asked, graphs=device.type == "cuda")
            refused += left_out(name, found, say)
            case = timed(name, found, self.batch, self.repeats, device)
            yield name, case
            more = memory(found, device)
            found.clear()  # which hold networks, and graphs their memory
            for one, figures in passes(name, setting, asked[0], list(case.candidates)).items():
                more[one] |= figures
            yield name, replace(case, candidates={one: Candidate(known.seconds, {**known.figures, **more[one]})
                                                  for one, known in case.candidates.items()})  # fmt: skip
        if refused:
            raise refused[0]


def left_out(name: str, found: dict[str, Call], say: Say) -> list[RecordingError]:
    """Takes out, with a word, the graphs that cannot be recorded: the others are worth timing all the same."""
    refused = []
    for one in [one for one in found if one.endswith(GRAPH)]:
        try:
            for _ in range(2 * METHODS[name].kinds):  # the second of each kind records
                found[one]()
        except RecordingError as error:
            say(f"{name}, left out: {error}")
            refused.append(error)
            del found[one]
    return refused


def timed(name: str, found: Mapping[str, Call], batch: int, repeats: int, device: torch.device) -> Case:
    """A batch by everybody in turn."""
    times = interleaved(found, repeats, WARMUP[device.type] * METHODS[name].kinds, device)
    figures = {one: {"speedup": times[RELEASED].p50 / taken.p50, "ms_per_image": 1e3 * taken.p50 / batch,
                     "images_per_second": batch / taken.p50} for one, taken in times.items()}  # fmt: skip
    return Case(
        {"batchnorm": METHODS[name].batchnorm},
        {one: Candidate(taken, figures[one]) for one, taken in times.items()},
    )


def memory(found: Mapping[str, Call], device: torch.device) -> dict[str, dict[str, Figure]]:
    """Bytes at the worst moment of a batch, by candidate; a graph has its memory before it is replayed: no figure."""
    peaks: dict[str, dict[str, Figure]] = {}
    for one, call in found.items():
        base.detail(f"memory, {one}")
        peaks[one] = {"peak_bytes": None if one.endswith(GRAPH) else peak_bytes(call, device)}
    return peaks


def passes(name: str, setting: Setting, schedules: Sequence[str], among: Sequence[str]) -> dict[str, dict[str, Figure]]:
    """Passes of an image by candidate, whatever the precision; counted in the second call, as the first builds."""
    base.detail("counting passes")
    small, found = setting.small, dict[str, dict[str, Figure]]()
    calls = {RELEASED: of_released(name, small)}
    for schedule in schedules:
        method = settings_of(name, small, schedule)
        calls[f"afd {schedule}" if isinstance(method, AFD) else "afd"] = of_ours(method, small, "fp32")
    for start, call in calls.items():
        call()
        figures: dict[str, Figure] = {**counted(call, small.model, small.x).figures}
        found |= {one: figures for one in among if one.startswith(start)}
    return found
