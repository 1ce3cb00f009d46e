"""One cost for all methods: a time is measured once, as passes of adversarial training, and buys each its epochs.

What a run costs is counted and not timed: how often its images go through the network (`afd.passes`), each way that
its steps take, in the order in which a trainer takes them. So all entries cost the same on any machine.
"""

from __future__ import annotations

import math
import re
import statistics
import time
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afd.config import TrainConfig
from afd.data import Images
from afd.data.items import images_and_labels, index_in
from afd.errors import AfdError, InputError
from afd.experiments.assembly import model_for, train_batches, trainer_for
from afd.methods.base import LOOKS
from afd.methods.ramps import STEPS, Ramps, ramps_of
from afd.passes import counted
from afd.training.recording import recorded
from afd.training.trainer import Trainer

COUNTED_IMAGES = 8  # that passes are counted on
WARMUP, FEWEST = 3, 3  # steps before those that are timed, and of those
LONGEST, SHARE = 5.0, 0.05  # seconds that timing takes, and of the budget, at most
ROUNDS = 8  # of the search for a run that costs what was asked for
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
WRITTEN = re.compile(r"(?=.)(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s)?")


def seconds_in(text: str) -> float:
    """Seconds of a time written as 5m, 300s, 2h or 1h30m.

    Raises:
        InputError: it is written in another way, or no time at all.
    """
    found = WRITTEN.fullmatch(text.strip())
    parts = {} if found is None else {unit: float(one) for unit, one in found.groupdict().items() if one is not None}
    seconds = sum(UNITS[unit] * one for unit, one in parts.items())
    if not seconds > 0:
        raise InputError(f"budget is {text!r}; it must be a time such as 5m, 300s, 2h or 1h30m")
    return seconds


@dataclass(frozen=True)
class Cost:
    """How long an entry trains, and what that costs.

    Attributes:
        epochs: of the run.
        epoch_images: images of each.
        passes: of the whole run: forwards, backwards to the input and backwards to the weights of an image. None where
            they cannot be counted.
    """

    epochs: int
    epoch_images: int
    passes: float | None

    @property
    def per_image(self) -> float | None:
        """Passes that each image of an epoch takes, on average over the run."""
        return None if self.passes is None else self.passes / (self.epochs * self.epoch_images)


class StepCosts:
    """What the steps of a run cost, each way that they go counted once on a throwaway model.

    Args:
        config: the run, settled.
        images: that it is trained on.
        device: where to.

    Raises:
        AfdError: the method cannot be trained so, on such images; the message says why.
        UncountableError: passes of such a network cannot be counted.
    """

    def __init__(self, config: TrainConfig, images: Images, device: torch.device) -> None:
        self.config, self.images = config, images
        plain = replace(config, compile=False, graph=False, precision="fp32", out=None, resume=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself gives them
            self.trainer = throwaway(plain, images, device)
        self.trainer.step.looks = LOOKS
        self.x, self.y, self.index = next(_batches(plain, images, device, self.trainer))
        self.found: dict[Hashable, float] = {}
        self.passes(1, 1)

    def passes(self, epochs: int, epoch_images: int) -> float:
        """Of a run of so many epochs, each of so many images."""
        size = self.config.data.batch_size
        sizes = [size] * (epoch_images // size) + [epoch_images % size] * (epoch_images % size > 0)
        repeats = self.trainer.method.repeats
        step = self.trainer.step
        step.adopt(self.trainer.method)
        ramps = {name: one for name, one in ramps_of(self.config.ramps).items() if name == STEPS}
        growing = Ramps(self.trainer.method, step, ramps, len(sizes) * repeats)
        total, done = 0.0, 0
        for epoch in range(1, epochs + 1):
            for images in sizes:
                for _ in range(repeats):
                    growing.at(done)
                    total += images * self._cost(done, epoch)
                    done += 1
        return total

    def _cost(self, done: int, epoch: int) -> float:
        """Passes of each image in the step after so many."""
        step = self.trainer.step
        step.steps, step.epoch = done, epoch
        attack = getattr(step.method.attack, "steps", None)
        way = step.kind(), attack
        if way not in self.found:
            self.found[way] = self._counted(done)
        return self.found[way]

    def _counted(self, done: int) -> float:
        step = self.trainer.step

        def taken() -> None:
            step.steps = done
            step(self.x, self.y, index=self.index, seed=done)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself gives them
            taken()  # the first one builds what stays
            return counted(taken, self.trainer.model, self.x).cost

    def within(self, passes: float) -> Cost:
        """The run that costs so many, to a batch or so: in as many epochs as leave each nearest to all images once.

        1.4 epochs' worth are one epoch of 1.4 times as many images as there are; three quarters are the least.

        Raises:
            BudgetError: they are fewer than one epoch takes.
        """
        whole = len(self.images)
        least = self.passes(1, whole)
        images = passes * whole / least
        if images < whole:
            raise BudgetError(least)
        cost = best = self._of(images)
        for _ in range(ROUNDS):
            assert cost.passes is not None
            if abs(cost.passes - passes) < cost.passes / (cost.epochs * cost.epoch_images):
                return cost
            images = max(whole, images * passes / cost.passes)
            cost = self._of(images)
            best = min(best, cost, key=lambda one: abs((one.passes or 0.0) - passes))
        return best

    def _of(self, images: float) -> Cost:
        epochs = max(1, round(images / len(self.images)))
        epoch_images = round(images / epochs)
        if epoch_images % self.config.data.batch_size == 1:  # an image alone, which BatchNorm could not be shown
            epoch_images -= 1
        return Cost(epochs, epoch_images, self.passes(epochs, epoch_images))


class BudgetError(AfdError):
    """A budget buys less than one epoch.

    Attributes:
        needed: passes of one.
    """

    def __init__(self, needed: float) -> None:
        super().__init__(f"one epoch takes {needed:.3g} passes")
        self.needed = needed


def throwaway(config: TrainConfig, images: Images, device: torch.device) -> Trainer:
    """The trainer of a run that leaves nothing behind, its model in training mode."""
    torch.manual_seed(config.seed)
    trainer = trainer_for(replace(config, out=None, resume=None), model_for(config, images).to(device))
    trainer.network.train()
    return trainer


def _batches(
    config: TrainConfig, images: Images, device: torch.device, trainer: Trainer
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """The first images of the run's first batches, mixed where it mixes them."""
    for item in train_batches(config, images, device):
        x, y = images_and_labels(item, trainer.method.labels)
        index = index_in(item, len(x))
        x = x[:COUNTED_IMAGES]
        y, index = (None if one is None else one[:COUNTED_IMAGES] for one in (y, index))
        if trainer.mixing.active and y is not None:
            trainer.mixing.check(x, y)
            x, y = trainer.mixing(x, y, trainer.network.num_classes, seed=0)
        yield x, y, index


def cost_of(config: TrainConfig, images: Images, steps: StepCosts | None) -> Cost:
    """What a settled run costs with its own epochs.

    Args:
        config: the run.
        images: that it is trained on.
        steps: what its steps cost; None where nobody can count that.
    """
    assert config.epochs is not None
    own = config.data.epoch_images or len(images)
    return Cost(config.epochs, own, None if steps is None else steps.passes(config.epochs, own))


def images_per_second(config: TrainConfig, images: Images, device: torch.device, budget: float) -> float:
    """How many images a run trains on in a second here, its attack and the loading of its batches included.

    The middle one of some seconds' steps, after a few to warm up.

    Args:
        config: the run, settled.
        images: that it is trained on.
        device: where to.
        budget: seconds, of which this takes a twentieth at most, or a few steps.
    """
    trainer = throwaway(config, images, device)
    run_step = recorded(trainer.network, trainer.step, trainer.device, 1, trainer.execution)
    loader = train_batches(config, images, device)
    end, found = time.perf_counter() + min(LONGEST, SHARE * budget), list[float]()

    def all_batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        while True:
            yield from (images_and_labels(item, trainer.method.labels) for item in loader)

    before = time.perf_counter()
    for number, (x, y) in enumerate(all_batches(), 1):
        for _ in range(trainer.method.repeats):
            run_step(x, y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if number > WARMUP:
            found.append((now - before) / len(x))
        if len(found) >= FEWEST and now >= end:
            break
        before = now
    return 1 / statistics.median(found)


def too_small(entry: str, error: BudgetError, passes: float, seconds: float | None) -> InputError:
    """What is said of a budget that does not buy an entry an epoch.

    Args:
        entry: which.
        error: that was found.
        passes: that the budget is.
        seconds: likewise, where that was measured here and now.
    """
    told = f"the budget of {passes:.3g} passes is less than one epoch of {entry!r}, which takes {error.needed:.3g}"
    if seconds is None:  # measured at another time, elsewhere perhaps
        return InputError(told)
    wanted = seconds * error.needed / passes
    needed = f"{math.ceil(wanted / 60)}m" if wanted > 600 else f"{math.ceil(wanted)}s"
    return InputError(f"{told}: that needs a budget of {needed} here")
