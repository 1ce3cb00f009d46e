"""The runner of a protocol: work item by work item, attack, judge what came back, keep it, and look at it once more."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from afd.attacks import Attack, ModelWarning, Report, engine
from afd.attacks.ball import Ball
from afd.attacks.external import check_returned, inside
from afd.attacks.inputs import rows_of
from afd.data import Images
from afd.errors import AfdError
from afd.evaluation.attacks import ATTACKS, Shortened, Stage, Target, WorkItem
from afd.evaluation.outcome import BLIND_AND_ROBUST, BROKEN_IN_FP32, LEFT_IN_BF16, ItemResult, Outcome
from afd.evaluation.protocol import Protocol
from afd.evaluation.store import Store
from afd.execution import Passes
from afd.metrics import Predictions, predict
from afd.ops import backend
from afd.runtime import Group

Count = Callable[[Tensor, Tensor], dict[str, int]]


class AttackFailedError(AfdError):
    """An attack raised on a batch; the message names both."""


@dataclass
class Batch:
    """One batch, and what this run has learned of it.

    Attributes:
        number: its number; its images are those from number * batch_size on.
        first: index of its first image.
        x: images [N, ...].
        y: labels [N].
        said: what the model says of the clean images.
        correct: whether that is right [N].
        taken: whether the cascade in a norm has found an adversarial image of it [N], by norm.
    """

    number: int
    first: int
    x: Tensor
    y: Tensor
    said: Predictions
    correct: Tensor
    taken: dict[str, Tensor]


class Meter(Interface):
    """Hears how far an evaluation has come."""

    def start(self, work: float) -> None:
        """All the work there is, in forwards and backwards of one image."""

    def moved(self, work: float, text: str) -> None:
        """Some of it is done."""


@dataclass
class Runner:
    """Runs a protocol on one model.

    Attributes:
        model: under evaluation.
        surrogates: models that transfer stages attack, by their number.
        images: what to attack, on the device of the models.
        classes: of the model.
        protocol: what to do.
        store: of what was found before.
        group: which batches are ours.
        seed: of all attacks.
        batch_size: images a batch.
        meter: hears of progress.
        count: counts things about images and their labels: clean ones, and as scoring stages leave them; of those only
            that the model gets right when clean. None counts nothing.
        places: of the images in the data that our attacks' draws hang on, int64 [N] on the CPU; None for 0, 1, ...
        precision: that attacks run in: "fp32", "bf16" or "auto". Figures are made in float32 (`predict`).
    """

    model: nn.Module
    surrogates: Sequence[nn.Module]
    images: Images
    classes: int
    protocol: Protocol
    store: Store
    group: Group
    seed: int
    batch_size: int
    meter: Meter
    count: Count | None = None
    places: Tensor | None = None
    precision: str = "fp32"

    @property
    def low_precision(self) -> bool:
        """Whether attacks run in bfloat16 here."""
        return self.precision == "bf16" or (self.precision == "auto" and backend.fast_bf16(self.images.device))

    def run(self) -> Outcome:
        """Everything that is not in the store yet; returns what all processes found.

        Raises:
            AttackFailedError: an attack raised; what was done before is in the store.
        """
        outcome = Outcome.empty(self.protocol, len(self.images))
        batches = self.batches()
        sizes = [min(self.batch_size, len(self.images) - number * self.batch_size) for number in batches]
        order = self.protocol.order()
        self.meter.start(sum(size * sum(item.passes for item in order) for size in sizes))
        for number in batches:
            batch = self.batch(number)
            counted = self.counted(batch.x, batch)
            outcome.clean(batch.first, batch.correct, {**counted, "not finite": int((~batch.said.finite).sum())})
            outcome.undefined(batch.first, batch.said.undefined)
            fooled = {stage.name: torch.zeros_like(batch.correct) for stage in self.protocol.stages}
            for item in order:
                result = self.result(batch, item, fooled[item.stage.name], outcome)
                self.note(outcome, batch, item, result, fooled[item.stage.name])
                self.meter.moved(len(batch.y) * item.passes, f"batch {number + 1}: {item}")
        return outcome.gathered(self.group)

    def batches(self) -> range:
        """Numbers of this process's batches."""
        return self.group.share(-(-len(self.images) // self.batch_size))

    def batch(self, number: int) -> Batch:
        """A batch, and where the model is right on it."""
        first = number * self.batch_size
        index = torch.arange(first, min(first + self.batch_size, len(self.images)), device="cpu")
        x, y = self.images.images(index), self.images.labels[index.to(self.images.device)]
        said = self.predict(x)
        correct = said.classes == y
        taken: dict[str, Tensor] = {stage.norm: torch.zeros_like(correct) for stage in self.protocol.stages}
        return Batch(number, first, x, y, said, correct, taken)

    def result(self, batch: Batch, item: WorkItem, fooled: Tensor, outcome: Outcome) -> ItemResult:
        """What an item finds, from the store or computed now.

        Args:
            batch: where.
            item: what is done.
            fooled: where its stage fooled the model at smaller radii, bool [N].
            outcome: what was found so far.
        """
        key = item.key(batch.number)
        if (result := self.store.load_or_forget(key)) is not None:
            return result
        rows = self.rows(batch, item, fooled, outcome).nonzero().squeeze(1)
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ModelWarning)  # the checks say the same, with their numbers
                result = self.compute(batch, item, rows, started)
        except Exception as error:  # whatever a model or an attack raises is told with the batch it happened on
            last = batch.first + len(batch.y) - 1
            raise AttackFailedError(
                f"{item} failed on batch {batch.number + 1} (images {batch.first} to {last}) with "
                f"{type(error).__name__}: {error}{self.store.kept}"
            ) from error
        if len(rows):
            self.store.save(key, result)
        return result

    def rows(self, batch: Batch, item: WorkItem, fooled: Tensor, outcome: Outcome) -> Tensor:
        """Which images of a batch an item attacks, bool [N]; see `result`."""
        stage, radius = item.stage, item.largest
        own = slice(batch.first, batch.first + len(batch.y))
        wanted = {
            "all": lambda: ~batch.said.undefined,
            "correct": lambda: batch.correct,
            "survivors": lambda: batch.correct & ~fooled,
            "remaining": lambda: batch.correct & ~batch.taken[stage.norm],
            "withstood": lambda: batch.correct & ~outcome.white_box(stage.norm, radius)[own].to(fooled.device),
        }[stage.scope]()
        if stage.after:
            before = self.protocol.find(stage.after)
            assert before is not None
            wanted = wanted & ~outcome.reached(before, radius)[own].to(fooled.device)
        if stage.first is None:
            return wanted
        return wanted & (torch.arange(len(wanted), device=wanted.device) + batch.first < stage.first)

    def compute(self, batch: Batch, item: WorkItem, rows: Tensor, started: float) -> ItemResult:
        """Attacks these rows, and believes nothing of what comes back until the model has seen it.

        What a minimal attack found is shown to the model at each radius, pulled back into the ball where it lies
        further away, as Foolbox does it; of each image the first that fools is kept.
        """
        x, y, stage = batch.x[rows], batch.y[rows], item.stage
        ball = Ball(stage.norm, float(item.largest))
        attack: Callable[..., Tensor] = self.attack(stage, ball)
        ours = ATTACKS[stage.attack].library == "afd"  # whose draws are those of each image, whoever is left beside it
        places = batch.first + rows.cpu()
        places = places if self.places is None else self.places[places]
        x_adv = attack(x.clone(), y, first_sample=places if ours else batch.first) if len(rows) else x
        check_returned(x_adv, x)
        legal = inside(x_adv)
        if not stage.minimal:
            legal &= ball.holds(ball.distance(x_adv, x))
        found = legal & (self.predict(x_adv).classes != y) if stage.minimal else legal
        x_adv = torch.where(rows_of(found, x), x_adv, x)  # a minimal attack that failed returns anything (C&W: black)
        kept, fooled, infinite = x_adv.clone(), torch.zeros_like(legal), torch.zeros_like(legal)
        counts: dict[str, int] = {}
        for position in item.positions:
            shown = _radius(stage, position).shorten(x_adv, x) if stage.minimal else x_adv
            said, left = self.predict(shown), legal & ~fooled
            new, infinite = left & (said.classes != y), infinite | (left & ~said.finite)
            kept, fooled = torch.where(rows_of(new, x), shown, kept), fooled | new
            counts |= self.count_sweep(batch, stage, position, rows, torch.where(rows_of(fooled, x), kept, shown))
        if (report := getattr(attack, "report", None)) is not None:
            counts |= aim(report, item.positions[0], fooled)
            infinite |= report.nonfinite.to(infinite.device)
        counts["not finite"] = int(infinite.sum())
        if self.low_precision and ATTACKS[stage.attack].library == "afd":
            left = legal & (self.predict_in_bf16(x_adv) == y)
            counts |= {LEFT_IN_BF16: int(left.sum()), BROKEN_IN_FP32: int((left & fooled).sum())}
        return ItemResult(
            rows=rows[fooled].cpu(), images=kept[fooled].cpu(), lengths=ball.distance(kept, x)[fooled].cpu(),
            attacked=len(rows), illegal=int((~legal).sum()), counts=counts, seconds=time.perf_counter() - started,
        )  # fmt: skip

    def attack(self, stage: Stage, ball: Ball) -> Attack:
        """The attack of a stage in a ball, on the model that it looks at."""
        kind = ATTACKS[stage.attack]
        seen = self.surrogates[stage.surrogate] if stage.role == "transfer" else self.model
        target = Target(seen, stage.norm, float(ball.eps), self.seed, self.classes, self.precision)
        attack = kind.build(target, **stage.settings)
        return Shortened(attack, ball) if kind.minimal and stage.role == "transfer" else attack

    def note(self, outcome: Outcome, batch: Batch, item: WorkItem, result: ItemResult, fooled: Tensor) -> None:
        """Writes a result into the outcome, and marks what the stage, or the cascade, need not attack again."""
        for position in item.positions:
            reached = _radius(item.stage, position).holds(result.lengths)
            outcome.adversarial(item.stage, position, batch.first + result.rows[reached], result)
        rows = result.rows.to(fooled.device)
        fooled[rows] = True
        if item.stage.scope == "remaining":
            batch.taken[item.stage.norm][rows] = True

    def saved(self) -> Iterator[tuple[int, WorkItem, ItemResult]]:
        """Every result of this process that is in the store, with its batch and work item."""
        for number in self.batches():
            for item in self.protocol.order():
                result = self.store.load(item.key(number))
                if result is not None:
                    yield number, item, result

    def predict(self, x: Tensor) -> Predictions:
        """What the model says of images [N, ...], in evaluation mode and float32."""
        return predict(self.model, x)

    def predict_in_bf16(self, x: Tensor) -> Tensor:
        """The classes that an attack in bfloat16 sees at images [N, ...], int64 [N]."""
        if not len(x):
            return torch.zeros(0, dtype=torch.int64, device=x.device)
        with engine.evaluating(self.model), torch.no_grad(), Passes("bf16").autocast(x.device):
            return engine.logits(self.model, x)[0].argmax(1)

    def counted(self, x: Tensor, batch: Batch) -> dict[str, int]:
        """Counts on the images that the model gets right when clean."""
        if self.count is None or not batch.correct.any():
            return {}
        return self.count(x[batch.correct], batch.y[batch.correct])

    def count_sweep(self, batch: Batch, stage: Stage, position: int, rows: Tensor, x_adv: Tensor) -> dict[str, int]:
        """Counts on a batch as it stands under attack at a radius, by "position name"."""
        if self.count is None or stage.role != "score":
            return {}
        now = self.attacked_before(batch, stage, position)
        now[rows] = x_adv
        return {f"{position} {name}": count for name, count in self.counted(now, batch).items()}

    def attacked_before(self, batch: Batch, stage: Stage, position: int) -> Tensor:
        """The batch with the adversarial images that this stage found at smaller radii."""
        now = batch.x.clone()
        if stage.scope == "survivors" and not stage.minimal:
            for smaller in range(position):
                result = self.store.load(WorkItem(stage, (smaller,)).key(batch.number))
                if result is not None:
                    now[result.rows.to(now.device)] = result.images.to(now.device)
        return now


def _radius(stage: Stage, position: int) -> Ball:
    return Ball(stage.norm, float(stage.epsilons[position]))


def aim(report: Report, position: int, fooled: Tensor) -> dict[str, int]:
    """Counts of an item at a radius: images at which the attack could never aim, and those of them that are robust."""
    blind = report.blind
    return {
        f"{position} blind": int(blind.sum()),
        f"{position} {BLIND_AND_ROBUST}": int((blind & ~fooled.to(blind.device)).sum()),
    }


# --- A second look at every adversarial image that was kept: in another batch size, with nothing remembered -----------


@dataclass(frozen=True)
class Verification:
    """What the second look found.

    Attributes:
        images: adversarial images looked at.
        robust: of these, how many the model gets right this time.
        outside: of these, how many are not in the ball, or not in [0, 1].
        batch_size: of the second look.
    """

    images: int
    robust: int
    outside: int
    batch_size: int


def other_batch_size(batch_size: int) -> int:
    """A batch size that pairs other images with each other: an odd one, about a third of the first."""
    return batch_size // 3 | 1 if batch_size > 3 else batch_size + 1


def verify(runner: Runner) -> Verification:
    """Looks again at what all processes saved, each at its own part."""
    size = other_batch_size(runner.batch_size)
    totals = torch.zeros(3, dtype=torch.int64, device="cpu")
    for x_adv, y, outside in _chunks(runner, size):
        robust = runner.predict(x_adv).classes == y
        totals += torch.tensor([len(y), int(robust.sum()), int(outside.sum())], device="cpu")
    images, robust, outside = runner.group.total(totals).tolist()
    return Verification(images, robust, outside, size)


def _chunks(runner: Runner, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Adversarial images, labels, and whether they lie outside of what is allowed, in batches of that size."""
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    count = 0
    for part in _saved(runner):
        held.append(part)
        count += len(part[1])
        if count < size:
            continue
        whole = [torch.cat(tensors) for tensors in zip(*held, strict=True)]
        full = count // size * size
        for start in range(0, full, size):
            x_adv, y, outside = (tensor[start : start + size] for tensor in whole)
            yield x_adv, y, outside
        x_adv, y, outside = (tensor[full:] for tensor in whole)
        held, count = [(x_adv, y, outside)], count - full
    if count:
        x_adv, y, outside = (torch.cat(tensors) for tensors in zip(*held, strict=True))
        yield x_adv, y, outside


def _saved(runner: Runner) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What was kept of each work item."""
    device = runner.images.device
    for number, item, result in runner.saved():
        if not len(result.rows):
            continue
        index = (result.rows + number * runner.batch_size).to(device)
        x_adv = result.images.to(device)
        legal = inside(x_adv)
        if not item.stage.minimal:
            ball = Ball(item.stage.norm, float(item.largest))
            legal &= ball.holds(ball.distance(x_adv, runner.images.images(index)))
        yield x_adv, runner.images.labels[index], ~legal
