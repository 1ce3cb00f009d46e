"""Alarms of a training run: what goes wrong while losses fall, told by numbers that few images and little time give.

After each validation the attack of one step is compared with that of many steps (catastrophic overfitting, Wong et al.
2020), and a few validation images are attacked by PGD from several starts and, where that fails, by Square, which knows
no gradients (masked gradients, Athalye et al. 2018). The latter only once it has been paid for: all of this takes at
most `SHARE` of the time of training and validation until then. Neither training images nor generators are touched.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from afd.attacks import AttackSettings, FGSMSettings, PGDSettings, Square, SquareSettings, UnionSettings
from afd.methods import Method
from afd.methods.optimizers import GradientNorms
from afd.metrics import interval, predict
from afd.runtime import Group
from afd.training.data import Sample

COLLAPSE, MASKED = "catastrophic overfitting", "masked gradients"
CHANCE, GRADIENTS = "at chance", "exploding gradients"
ON_ALARM = ("warn", "stop", "rollback", "off")
HELPS = {
    COLLAPSE: "an attack of more steps, or of smaller ones, helps",
    MASKED: "its robust accuracy is not to be believed; measure it with afd evaluate --protocol autoattack",
    CHANCE: "a radius that grows (eps_warmup), or a smaller learning rate, helps",
    GRADIENTS: "a smaller learning rate, or a bound on the gradient (clip), helps",
}
SHARE = 0.05  # of the time of training and validation
LEAST = 64  # that are worth a probe: on small networks, fewer take as long
RESTARTS: tuple[Literal["ce", "margin"], ...] = ("ce", "margin")  # losses of PGD, each from a start of its own
STEPS, QUERIES = 10, 100
CAUTION = 1.5  # with which time is foreseen
LATELY = 8  # probes that a verdict rests on, at most
FALL, GAP, NEVER = 0.2, 0.3, 0.05  # many-step accuracy below its best, below one-step accuracy, and as good as none
FEW = 16  # images that Square is shown, for a verdict
BROKEN = 0.05  # of the images that PGD leaves, that an honest model would lose to Square at most
BELOW = 0.1  # of PGD with restarts below validation's
PATIENCE, PATIENT_STEPS = 3, 100  # epochs and steps at chance; epochs whose gradients are what is usual
EXPLODED = 100.0  # times the usual gradient
SEED = 1 << 40  # beside those of training and validation


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong in a training run.

    Attributes:
        kind: "catastrophic overfitting", "masked gradients", "at chance" or "exploding gradients".
        epoch: after which it was noticed.
        told: what was seen, in words.
        helps: what helps against it.
        figures: what was seen, by name.
    """

    kind: str
    epoch: int
    told: str
    helps: str
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind} in epoch {self.epoch}: {self.told}; {self.helps}"

    @classmethod
    def of(cls, kind: str, epoch: int, told: str, **figures: float) -> Alarm:
        """One of a kind, with what helps."""
        return cls(kind, epoch, told, HELPS[kind], figures)


@dataclass(frozen=True)
class RollbackReport:
    """A training run has gone back to where all was well, and goes on otherwise.

    Attributes:
        epoch: in which something went wrong.
        global_step: where training goes on from.
        losses: of the epoch that is undone, as far as they were finite.
        learning_rates: of each optimizer in the next step.
        alarms: what went wrong.
        remedy: what is otherwise from here on, in words.
        natural: clean accuracy after the epoch that is undone; None if it came to no validation.
        robust: accuracy there under the validation attack.
        one_step: accuracy there under an attack of one step.
    """

    epoch: int
    global_step: int
    losses: dict[str, float]
    learning_rates: dict[str, float]
    alarms: tuple[Alarm, ...]
    remedy: str
    natural: float | None = None
    robust: float | None = None
    one_step: float | None = None


def alarm_lines(alarms: Iterable[Alarm], rollbacks: Iterable[Mapping[str, Any]] = ()) -> list[str]:
    """What a run's alarms and rollbacks come to, a line for each kind and each rollback."""
    by_kind: dict[str, list[Alarm]] = {}
    for alarm in alarms:
        by_kind.setdefault(alarm.kind, []).append(alarm)
    lines = []
    for kind, found in by_kind.items():
        first, last = found[0], found[-1].epoch
        count = len({alarm.epoch for alarm in found})
        when = f"epoch {last}" if count == 1 else f"{count} epochs, {first.epoch} to {last}"
        when += f", {len(found)} times" if len(found) > count else ""
        lines.append(f"alarm: {kind} in {when}: {first.told}; {first.helps}")
    return lines + [f"rolled back after epoch {back['epoch']}, and on with {back['told']}" for back in rollbacks]


# --- What is looked at ----------------------------------------------------------------------------------------------


Measured = Any  # what is known of an epoch: its natural, robust and one_step, as of EpochReport


@dataclass
class Probes:
    """What is kept from epoch to epoch: plain numbers, for checkpoints.

    Attributes:
        norms: the largest norm of the gradient in each epoch.
        found: of each probe: images tested, left by PGD, of these shown to Square, broken by it, and validation's
            robust accuracy then (-1: none).
        seconds: of training and validation, without probes.
        spent: of these, on probes.
        per_image: seconds that PGD, and that Square, is expected to take for an image of a probe; 0 until known.
    """

    norms: list[float] = field(default_factory=list)
    found: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    spent: float = 0.0
    per_image: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def with_square(self) -> bool:
        """Whether the next probe asks Square, too, which takes longer than PGD on small networks: every second."""
        return bool(self.found) and not self.found[-1][2]

    def affordable(self) -> int:
        """Images of the next probe."""
        each = self.per_image[0] + self.per_image[1] * self.with_square
        return int(self.credit / each) if each else 0

    @property
    def credit(self) -> float:
        """Seconds that may be spent."""
        return max(0.0, SHARE * self.seconds - self.spent)

    def expect(self, seconds: float) -> None:
        """Takes what an attack of one step took for an image: so much for each of its three passes, and some more."""
        if not self.found:
            known = self.per_image if self.per_image[0] else [math.inf] * 2  # the first call takes longest
            passes = 2 * STEPS * len(RESTARTS), QUERIES
            self.per_image = [min(one, CAUTION * seconds / 3 * of) for one, of in zip(known, passes, strict=True)]

    def lately(self) -> tuple[float, float, float, float, float]:
        """Sums over the latest probes of the images tested, left, shown to Square, broken; validation's accuracy."""
        latest = self.found[-LATELY:]
        tested, left, asked, broken = (sum(one[part] for one in latest) for part in range(4))
        judged = [one for one in latest if one[4] >= 0]
        shares = sum(one[0] * one[4] for one in judged)
        return tested, left, asked, broken, shares / max(1.0, sum(one[0] for one in judged)) if judged else -1.0


class Watch:
    """Looks at a model after each epoch, and says what goes wrong.

    Args:
        method: that it is trained by; one without a ball is attacked by nobody.
        group: of the processes, which look together and find the same.
        seed: of the run.
        judge: settings of the attack that it is validated by: accuracies in other balls are not compared.

    Attributes:
        learning: whether clean accuracy was above chance when it last looked.
    """

    def __init__(self, method: Method, group: Group, seed: int, judge: Any = None) -> None:
        self.group, self.seed = group, SEED + int(seed)
        self.one_step = one_step(method)
        self.comparable = self.one_step is not None and within(judge) == within(self.one_step)
        self.gradients, self.state, self.learning = GradientNorms(group.device), Probes(), False
        self.looked = 0  # images that one-step accuracy is of

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; waits for the device."""
        return {**dataclasses.asdict(self.state), "largest": float(self.gradients.largest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` said, or, of checkpoints without, from the beginning."""
        known = {**state}
        self.gradients.largest.fill_(known.pop("largest", 0.0))
        self.state = Probes(**known)
        for name in ("norms", "found", "per_image"):  # its own
            setattr(self.state, name, list(getattr(self.state, name)))

    def under_one_step(self, model: nn.Module, sample: Sample, passes: float) -> float | None:
        """Accuracy under an attack of one step; None without a ball, and where a look at few images is not paid for.

        That is counted, and not measured: reports are the same however fast a machine is.

        Args:
            model: that is looked at.
            sample: images to be looked at.
            passes: of an image, that the epoch and its validation have taken.
        """
        balls = 0 if self.one_step is None else len(self.one_step.balls)
        self.looked = images = min(len(sample), int(SHARE * passes / (4 * balls))) if balls else 0
        if self.one_step is None or images < min(FEW, max(len(sample), 1)):
            self.looked = 0
            return None
        began, mine = time.perf_counter(), self._share(images)
        x, y = self._rows(sample, images, mine)
        right = int(_withstand(model, self.one_step, x, y, self.seed, mine.start).sum()) if len(mine) else 0
        found: float = sum(self.group.gather(right)) / images
        took = time.perf_counter() - began
        self.state.spent += took
        self.state.expect(took / images)
        return found

    def _rows(self, sample: Sample, images: int, mine: range) -> tuple[Tensor, Tensor]:
        """This process's part of so many of the images, from all over the sample."""
        chosen = [row * len(sample) // images for row in range(images)][mine.start : mine.stop]
        return sample.images(self.group.device, chosen)

    def _share(self, images: int) -> range:
        """This process's rows."""
        size, rank = self.group.size, self.group.rank
        return range(images * rank // size, images * (rank + 1) // size)

    def probe(self, model: nn.Module, sample: Sample, epoch: int, robust: float | None) -> None:
        """PGD from several starts, then Square, if that has been paid for."""
        images = min(self.state.affordable(), len(sample))
        images = self.group.gather(images)[0]
        if self.one_step is None or images < min(LEAST, max(len(sample), 1)):
            return
        mine = self._share(images)
        x, y = self._rows(sample, images, mine)
        balls: list[dict[str, Any]] = [
            {"norm": norm, "eps": eps, "bounds": self.one_step.bounds} for norm, eps in self.one_step.balls.items()
        ]
        rounds: list[list[AttackSettings]] = [
            [PGDSettings(**ball, steps=STEPS, loss=loss) for loss in RESTARTS for ball in balls],
            [SquareSettings(**ball, queries=QUERIES) for ball in balls if ball["norm"] in Square.known],
        ]
        counts, seed, asked = [len(x)], self.seed + sum(map(len, rounds)) * epoch, 1 + self.state.with_square
        for number, attacks in enumerate(rounds[:asked]):
            began = time.perf_counter()
            for attack in attacks:
                if len(x):
                    stands = _withstand(model, attack, x, y, seed, mine.start)
                    x, y = x[stands], y[stands]
                seed += 1
            counts.append(len(x))
            took = time.perf_counter() - began
            self.state.spent += took  # of a machine that others use, too, its slower moments count
            self.state.per_image[number] = max(took / images, 0.7 * self.state.per_image[number])
        tested, left, *end = map(sum, zip(*self.group.gather(counts), strict=True))
        square = [left, left - end[0]] if end else [0, 0]
        self.state.found.append([tested, left, *square, robust if robust is not None and self.comparable else -1.0])
        del self.state.found[:-LATELY]

    def alarms(self, history: Sequence[Measured], now: Measured, epoch: int, sample: Sample) -> tuple[Alarm, ...]:
        """What goes wrong, of an epoch that others came before."""
        largest, rows = self.group.gather(self.gradients.read())[0], [*history, now]
        if not self.comparable:
            rows = [dataclasses.replace(one, robust=None) for one in rows]
        found = (
            collapsed(rows[:-1], rows[-1], epoch, (sample.seen, self.looked), self.state),
            masked(self.state, epoch),
            at_chance(history, now, epoch, sample.seen, sample.largest_class),
            exploded(self.state.norms, largest, epoch),
        )
        self.state.norms.append(largest)
        self.learning = now.natural > min(best_at_chance(sample.largest_class, sample.seen), 0.999)
        return tuple(alarm for alarm in found if alarm is not None)


def one_step(method: Method) -> AttackSettings | None:
    """An attack of one step to look at a model with: the training attack if it is one, else FGSM in its ball."""
    own, ball = method.attack, method.ball
    radii = ball.balls.values() if isinstance(ball, AttackSettings) else ()
    if not radii or any(isinstance(eps, Tensor) and eps.dim() for eps in radii):
        return None
    if isinstance(ball, UnionSettings):
        return dataclasses.replace(ball.pgd(1), random_start=False)
    if isinstance(own, PGDSettings) and own.steps == 1 and not own.targeted and own.loss == "ce":
        return dataclasses.replace(own, batchnorm="eval", precision="fp32")
    return FGSMSettings(norm=ball.norm, eps=ball.eps, bounds=ball.bounds)


def within(attack: Any) -> tuple[Any, Any] | None:
    """The balls and bounds of an attack's settings, if it has any."""
    return (attack.balls, attack.bounds) if isinstance(attack, AttackSettings) else None


def _withstand(model: nn.Module, attack: AttackSettings, x: Tensor, y: Tensor, seed: int, first: int) -> Tensor:
    """Which images a model classifies correctly under an attack, bool [N]; it records no graph for so few."""
    built: Any = attack.build(model, validate=False)
    built.own_graphs = False
    return predict(model, built(x, y, seed=seed, first_sample=first)).classes == y


# --- Verdicts -------------------------------------------------------------------------------------------------------


def collapsed(
    history: Sequence[Measured], now: Measured, epoch: int, images: tuple[int, int], probes: Probes
) -> Alarm | None:
    """Many-step accuracy (of so many images) has fallen far below its best, or never rose; one-step's is far above."""
    many, one, (of_many, of_one) = now.robust, now.one_step, images
    if many is None:
        tested, left, *_ = probes.lately()
        many, of_many = (left / tested, int(tested)) if tested else (None, 0)
    if many is None or one is None:
        return None
    best = max((seen.robust for seen in history if seen.robust is not None), default=0.0)
    surely = interval(one * of_one, of_one, 2.0)[0] - interval(many * of_many, of_many, 2.0)[1]
    fell = many <= best / 2 and best - many >= FALL
    last = (history[-1].robust, history[-1].one_step) if history else (None, None)
    never = many < NEVER and one >= 0.5 and last[0] is not None and last[0] < NEVER and (last[1] or 0.0) >= 0.5
    if not (fell or never) or one - many < GAP or surely < GAP / 2:
        return None
    told = f"accuracy under one step is {one:.1%}, under many {many:.1%}" + (f" (once {best:.1%})" if fell else "")
    return Alarm.of(COLLAPSE, epoch, told, one_step=one, many_steps=many, best=best)


def masked(probes: Probes, epoch: int) -> Alarm | None:
    """Square breaks what PGD could not, or PGD from several starts much of what validation's could not."""
    tested, left, asked, broken, robust = probes.lately()
    figures = {"images": tested, "left_by_pgd": left, "shown_to_square": asked, "broken_by_square": broken}
    if asked >= FEW and interval(broken, asked, 3.0)[0] > BROKEN:
        told = f"Square of {QUERIES} queries breaks {broken:g} of {asked:g} validation images that PGD has left"
        return Alarm.of(MASKED, epoch, told, **figures)
    if robust >= 0 and interval(left, tested, 3.0)[1] < robust - BELOW:
        told = f"PGD from several starts leaves {left:g} of {tested:g} validation images, validation's {robust:.1%}"
        return Alarm.of(MASKED, epoch, told, **figures, validation=robust)
    return None


def best_at_chance(share: float, images: int) -> float:
    """Clean accuracy that one answer for all images may have by luck, where a class has that share of all."""
    return share + 2 * math.sqrt(share * (1 - share) / max(images, 1))


def at_chance(history: Sequence[Measured], now: Measured, epoch: int, images: int, share: float) -> Alarm | None:
    """Clean accuracy is what one answer for all images would have, for several epochs that are not mere moments."""
    stuck, begin = 0, 0
    for one in reversed([*history, now]):
        begin = one.global_step
        if one.natural > best_at_chance(share, images):
            break
        stuck, begin = stuck + 1, 0
    few = best_at_chance(share, images) >= 1  # of which even all may be right by chance
    if few or stuck < PATIENCE or now.global_step - begin < PATIENT_STEPS or share > 0.9:
        return None
    told = f"clean accuracy is {now.natural:.1%}, in {stuck} epochs in a row; one class for all has {share:.1%}"
    return Alarm.of(CHANCE, epoch, told, natural=now.natural, chance=share)


def exploded(before: Sequence[float], largest: float, epoch: int) -> Alarm | None:
    """The largest gradient of an epoch is not finite, or far beyond that of the epochs before."""
    if not math.isfinite(largest):
        return Alarm.of(GRADIENTS, epoch, "the gradient of a step was not finite")
    known = [one for one in before if math.isfinite(one)]
    usual = statistics.median(known) if len(known) >= PATIENCE else math.inf
    if largest <= EXPLODED * usual or not usual:
        return None
    told = f"the largest gradient has norm {largest:.3g}, in the epochs before {usual:.3g}"
    return Alarm.of(GRADIENTS, epoch, told, largest=largest, usual=usual)
