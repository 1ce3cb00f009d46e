"""Carries out a protocol, unit by unit: attack, judge what came back, remember it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from afd.attacks import Attack, ModelWarning, Report
from afd.attacks.strangers import check_returned, inside
from afd.data import Images
from afd.errors import AfdError
from afd.evaluation.catalogue import ATTACKS
from afd.evaluation.outcome import Outcome
from afd.evaluation.place import Place
from afd.evaluation.predictions import Predictions, predict
from afd.evaluation.protocol import Protocol, Stage
from afd.evaluation.state import Store, Unit
from afd.evaluation.target import Target, distance, per_row, shorten, within
from afd.evaluation.units import Batch, Shortened, key_of, label, work

Watch = Callable[[Tensor, Tensor], dict[str, int]]


class AttackFailedError(AfdError):
    """An attack raised on a batch; the message names both."""


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
        surrogate: model that transfer stages attack; None if there are none.
        images: what to attack, on the device of the models.
        classes: of the model.
        protocol: what to do.
        store: of finished units.
        place: which batches are ours.
        seed: of all attacks.
        batch_size: images a batch.
        meter: hears of progress.
        watch: counts things about images and their labels; called with clean and with attacked images of those that
            the model gets right, if the protocol's stages are to be watched.
    """

    model: nn.Module
    surrogate: nn.Module | None
    images: Images
    classes: int
    protocol: Protocol
    store: Store
    place: Place
    seed: int
    batch_size: int
    meter: Meter
    watch: Watch | None = None

    def run(self) -> Outcome:
        """Everything that is not in the store yet; returns what all processes found.

        Raises:
            AttackFailedError: an attack raised; what was done before is in the store.
        """
        outcome = Outcome.empty(self.protocol, len(self.images))
        batches = self.batches()
        sizes = [min(self.batch_size, len(self.images) - number * self.batch_size) for number in batches]
        order = self.protocol.order()
        self.meter.start(sum(size * sum(work(stage) for stage, _ in order) for size in sizes))
        for number in batches:
            batch = self.batch(number)
            watched = self.watched(batch.x, batch)
            outcome.clean(batch.first, batch.correct, {**watched, "not finite": int((~batch.said.finite).sum())})
            outcome.undefined(batch.first, batch.said.undefined)
            done = {stage.name: torch.zeros_like(batch.correct) for stage in self.protocol.stages}
            for stage, positions in order:
                unit = self.unit(batch, stage, positions, done[stage.name])
                self.note(outcome, batch, stage, positions, unit, done[stage.name])
                self.meter.moved(len(batch.y) * work(stage), f"batch {number + 1}: {label(stage, positions)}")
        return outcome.gathered(self.place)

    def batches(self) -> range:
        """Numbers of this process's batches."""
        return self.place.share(-(-len(self.images) // self.batch_size))

    def batch(self, number: int) -> Batch:
        """A batch, and where the model is right on it."""
        first = number * self.batch_size
        index = torch.arange(first, min(first + self.batch_size, len(self.images)), device="cpu")
        x, y = self.images.images(index), self.images.labels[index.to(self.images.device)]
        said = self.predict(x)
        correct = said.classes == y
        return Batch(number, first, x, y, said, correct, torch.zeros_like(correct))

    def unit(self, batch: Batch, stage: Stage, positions: tuple[int, ...], broken: Tensor) -> Unit:
        """One unit, from the store or computed now; `broken` [N] is what its stage broke at smaller radii."""
        key = key_of(stage, positions, batch.number)
        if (unit := self.store.load_or_forget(key)) is not None:
            return unit
        rows = self.rows(batch, stage, broken).nonzero().squeeze(1)
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ModelWarning)  # the checks say the same, with their numbers
                unit = self.compute(batch, stage, positions, rows, started)
        except Exception as error:  # whatever a model or an attack raises is told with the batch it happened on
            last = batch.first + len(batch.y) - 1
            raise AttackFailedError(
                f"{label(stage, positions)} failed on batch {batch.number + 1} (images {batch.first} to {last}) with "
                f"{type(error).__name__}: {error}; what was computed before is kept in {self.store.folder}, "
                "and the same command goes on from there"
            ) from error
        if len(rows):
            self.store.save(key, unit)
        return unit

    def rows(self, batch: Batch, stage: Stage, broken: Tensor) -> Tensor:
        """Which images of a batch a stage attacks, bool [N]."""
        wanted = {
            "all": ~batch.said.undefined,
            "correct": batch.correct,
            "survivors": batch.correct & ~broken,
            "remaining": batch.correct & ~batch.taken,
        }[stage.scope]
        if stage.first is None:
            return wanted
        return wanted & (torch.arange(len(wanted), device=wanted.device) + batch.first < stage.first)

    def compute(self, batch: Batch, stage: Stage, positions: tuple[int, ...], rows: Tensor, started: float) -> Unit:
        """Attacks these rows, and believes nothing of what comes back until the model has seen it.

        What a minimal attack found is shown to the model at each radius, pulled back into the ball where it lies
        further away, as Foolbox does it; of each image the first that fools is kept.
        """
        x, y = batch.x[rows], batch.y[rows]
        largest = float(stage.epsilons[positions[-1]])
        attack = self.attack(stage, largest)
        x_adv = attack(x.clone(), y, first_sample=batch.first) if len(rows) else x
        check_returned(x_adv, x)
        legal = inside(x_adv)
        if not stage.minimal:
            legal &= within(distance(x_adv, x, stage.norm), largest)
        found = legal & (self.predict(x_adv).classes != y) if stage.minimal else legal
        x_adv = torch.where(per_row(found, x), x_adv, x)  # a minimal attack that failed returns anything (C&W: black)
        kept, fooled, infinite = x_adv.clone(), torch.zeros_like(legal), torch.zeros_like(legal)
        counts: dict[str, int] = {}
        for position in positions:
            shown = shorten(x_adv, x, stage.norm, float(stage.epsilons[position])) if stage.minimal else x_adv
            said, left = self.predict(shown), legal & ~fooled
            new, infinite = left & (said.classes != y), infinite | (left & ~said.finite)
            kept, fooled = torch.where(per_row(new, x), shown, kept), fooled | new
            counts |= self.watch_sweep(batch, stage, position, rows, torch.where(per_row(fooled, x), kept, shown))
        if (report := getattr(attack, "report", None)) is not None:
            counts |= aim(report, positions[0], fooled)
            infinite |= report.nonfinite.to(infinite.device)
        counts["not finite"] = int(infinite.sum())
        return Unit(
            rows=rows[fooled].cpu(), images=kept[fooled].cpu(), lengths=distance(kept, x, stage.norm)[fooled].cpu(),
            attacked=len(rows), illegal=int((~legal).sum()), counts=counts, seconds=time.perf_counter() - started,
        )  # fmt: skip

    def attack(self, stage: Stage, eps: float) -> Attack:
        """The attack of a stage at a radius, on the model that it looks at."""
        kind = ATTACKS[stage.attack]
        seen = self.surrogate if stage.role == "transfer" else self.model
        assert seen is not None
        attack = kind.build(Target(seen, stage.norm, eps, self.seed, self.classes), **stage.settings)
        return Shortened(attack, stage.norm, eps) if kind.minimal and stage.role == "transfer" else attack

    def note(
        self, outcome: Outcome, batch: Batch, stage: Stage, positions: tuple[int, ...], unit: Unit, broken: Tensor
    ) -> None:
        """Writes a unit into the outcome, and marks what the stage, or the cascade, need not attack again."""
        for position in positions:
            reached = within(unit.lengths, float(stage.epsilons[position]))
            outcome.broken(stage, position, batch.first + unit.rows[reached], unit)
        rows = unit.rows.to(broken.device)
        broken[rows] = True
        if stage.scope == "remaining":
            batch.taken[rows] = True

    def saved(self) -> Iterator[tuple[int, Stage, tuple[int, ...], Unit]]:
        """Every unit of this process that is in the store, with its batch, stage and radii."""
        for number in self.batches():
            for stage, positions in self.protocol.order():
                unit = self.store.load(key_of(stage, positions, number))
                if unit is not None:
                    yield number, stage, positions, unit

    def predict(self, x: Tensor) -> Predictions:
        """What the model says of images [N, ...], in evaluation mode and float32."""
        return predict(self.model, x)

    def watched(self, x: Tensor, batch: Batch) -> dict[str, int]:
        """Counts on the images that the model gets right when clean."""
        if self.watch is None or not batch.correct.any():
            return {}
        return self.watch(x[batch.correct], batch.y[batch.correct])

    def watch_sweep(self, batch: Batch, stage: Stage, position: int, rows: Tensor, x_adv: Tensor) -> dict[str, int]:
        """Counts on a batch as it stands under attack at a radius, by "position name"."""
        if self.watch is None or stage.role != "score":
            return {}
        now = self.attacked_before(batch, stage, position)
        now[rows] = x_adv
        return {f"{position} {name}": count for name, count in self.watched(now, batch).items()}

    def attacked_before(self, batch: Batch, stage: Stage, position: int) -> Tensor:
        """The batch with the adversarial images that this stage found at smaller radii."""
        now = batch.x.clone()
        if stage.scope == "survivors" and not stage.minimal:
            for smaller in range(position):
                unit = self.store.load(key_of(stage, (smaller,), batch.number))
                if unit is not None:
                    now[unit.rows.to(now.device)] = unit.images.to(now.device)
        return now


def aim(report: Report, position: int, fooled: Tensor) -> dict[str, int]:
    """Counts of a unit at a radius: images at which the attack could never aim, and those of them that stand."""
    blind = report.blind
    return {
        f"{position} blind": int(blind.sum()),
        f"{position} blind and standing": int((blind & ~fooled.to(blind.device)).sum()),
    }
