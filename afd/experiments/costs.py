"""What the steps of a run cost: how often its images go through the network, counted, and how fast they go, timed.

Passes are counted (`afd.passes`) each way that a run's steps take, in the order in which a trainer takes them.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from afd.config import TrainConfig
from afd.data import Batches, Images
from afd.data.items import images_and_labels, index_in
from afd.experiments.assembly import model_for, train_batches, trainer_for
from afd.methods.base import LOOKS
from afd.methods.ramps import STEPS, Ramps, ramps_of
from afd.passes import Passes, counted
from afd.training.recording import recorded
from afd.training.trainer import Trainer

COUNTED_IMAGES = 8  # that passes are counted on
WARMUP, FEWEST = 3, 3  # steps before those that are timed, and of those
LONGEST, SHARE = 5.0, 0.05  # seconds that timing takes, and of the budget, at most


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


Count = Callable[[Callable[[], object], nn.Module, Tensor], Passes]  # as `counted`


class StepCosts:
    """What the steps of a run cost, each way that they go counted once on a throwaway model.

    Args:
        config: the run, settled.
        images: that it is trained on.
        device: where to.
        count: how passes are counted.
        rows: images that they are counted on.

    Raises:
        AfdError: the method cannot be trained so, on such images; the message says why.
        UncountableError: passes of such a network cannot be counted.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: Images,
        device: torch.device,
        count: Count = counted,
        rows: int = COUNTED_IMAGES,
    ) -> None:
        self.config, self.images, self.count = config, images, count
        plain = replace(config, compile=False, graph=False, precision="fp32", out=None, resume=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself gives them
            self.trainer = throwaway(plain, images, device)
        self.trainer.step.looks = LOOKS
        self.x, self.y, self.index = next(_batches(plain, images, device, self.trainer, rows))
        self.found: dict[Hashable, Passes] = {}
        self.passes(1, 1)

    @property
    def first(self) -> Passes:
        """Of each image in the first step, with all numbers that grow at their own value."""
        self.trainer.step.adopt(self.trainer.method)
        return self._cost(0, 1)

    def passes(self, epochs: int, epoch_images: int) -> float:
        """Of a run of so many epochs, each of so many images."""
        return sum(images * one.cost for one, images in self.ways(epochs, epoch_images).items())

    def ways(self, epochs: int, epoch_images: int) -> Counter[Passes]:
        """How many images, of such a run, are passed in which way; repeats of a batch count each."""
        size = self.config.data.batch_size
        sizes = [size] * (epoch_images // size) + [epoch_images % size] * (epoch_images % size > 0)
        repeats = self.trainer.method.repeats
        step = self.trainer.step
        step.adopt(self.trainer.method)
        ramps = {name: one for name, one in ramps_of(self.config.ramps).items() if name == STEPS}
        growing = Ramps(self.trainer.method, step, ramps, len(sizes) * repeats)
        found, done = Counter[Passes](), 0
        for epoch in range(1, epochs + 1):
            for images in sizes:
                for _ in range(repeats):
                    growing.at(done)
                    found[self._cost(done, epoch)] += images
                    done += 1
        return found

    def _cost(self, done: int, epoch: int) -> Passes:
        """Passes of each image in the step after so many."""
        step = self.trainer.step
        step.steps, step.epoch = done, epoch
        attack = getattr(step.method.attack, "steps", None)
        way = step.kind(), attack
        if way not in self.found:
            self.found[way] = self._counted(done)
        return self.found[way]

    def _counted(self, done: int) -> Passes:
        step = self.trainer.step

        def taken() -> None:
            step.steps = done
            step(self.x, self.y, index=self.index, seed=done)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself gives them
            taken()  # the first one builds what stays
            return self.count(taken, self.trainer.model, self.x)


def throwaway(config: TrainConfig, images: Images, device: torch.device) -> Trainer:
    """The trainer of a run that leaves nothing behind, its model in training mode."""
    torch.manual_seed(config.seed)
    trainer = trainer_for(replace(config, out=None, resume=None), model_for(config, images).to(device))
    trainer.network.train()
    return trainer


def _batches(
    config: TrainConfig, images: Images, device: torch.device, trainer: Trainer, rows: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """The first images of the run's first batches, mixed where it mixes them."""
    for item in train_batches(config, images, device):
        x, y = images_and_labels(item, trainer.method.labels)
        index = index_in(item, len(x))
        x = x[:rows]
        y, index = (None if one is None else one[:rows] for one in (y, index))
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


class TimedSteps:
    """Steps of a run that is thrown away, on one batch after the other, and what they take.

    Args:
        config: the run, settled.
        images: that it is trained on.
        device: where to.

    Attributes:
        loading: seconds that the last batch was waited for.
        stepping: seconds that the step on it took, all repeats together.
    """

    def __init__(self, config: TrainConfig, images: Images, device: torch.device) -> None:
        self.trainer, self.device = throwaway(config, images, device), device
        self.run_step = recorded(self.trainer.network, self.trainer.step, device, 1, self.trainer.execution)
        self.batches = self._batches(train_batches(config, images, device))
        self.loading = self.stepping = 0.0

    def _batches(self, loader: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
        while True:
            yield from (images_and_labels(item, self.trainer.method.labels) for item in loader)

    def take(self, rows: int | None = None) -> float:
        """Seconds for each image of the next batch, or of its first rows, where so many are named."""
        before = time.perf_counter()
        x, y = next(self.batches)
        x, y = x[:rows], None if y is None else y[:rows]
        loaded = time.perf_counter()
        for _ in range(self.trainer.method.repeats):
            self.run_step(x, y)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.loading, self.stepping = loaded - before, now - loaded
        return (now - before) / len(x)


def images_per_second(config: TrainConfig, images: Images, device: torch.device, budget: float) -> float:
    """How many images a run trains on in a second here, its attack and the loading of its batches included.

    The middle one of some seconds' steps, after a few to warm up.

    Args:
        config: the run, settled.
        images: that it is trained on.
        device: where to.
        budget: seconds, of which this takes a twentieth at most, or a few steps.
    """
    steps = TimedSteps(config, images, device)
    end, found = time.perf_counter() + min(LONGEST, SHARE * budget), list[float]()
    for _ in range(WARMUP):
        steps.take()
    while len(found) < FEWEST or time.perf_counter() < end:
        found.append(steps.take())
    return 1 / statistics.median(found)
