"""The loop, and only the loop: attack, round, report, save, validate."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from afd.attacks import Attack, AttackFactory
from afd.attacks.capture import guard
from afd.errors import InputError, at_least
from afd.methods import AFD, Execution, Method
from afd.methods.execution import isolated
from afd.nn import FeatureSplit, split
from afd.training import distributed, loaders, recording, run_state
from afd.training.average import averaged
from afd.training.foreign import device_of, settle, taken_in
from afd.training.keeper import Keeper
from afd.training.loaders import Loader
from afd.training.meter import Meter, NotFiniteError
from afd.training.reports import Callback, EpochReport, IntervalReport, Report, TrainingError
from afd.training.schedule import Rates, Schedule, schedule_named
from afd.training.signals import StoppedError, on_signals
from afd.training.stream import Stream
from afd.training.validation import shared_accuracy
from afd.training.warmup import Warmup, unwatched

BY_CALLBACK = 1  # what stopped a run, if not the signal of a larger number


@dataclass
class Position:
    """How far a run has come: the epoch in progress, batches of it played, rounds played in all."""

    epoch: int = 1
    batch: int = 0
    round: int = 0


@dataclass
class Trainer:
    """Trains any image classifier with a method against an attack.

    Under torchrun, every process builds a trainer and they train one model together.

    Attributes:
        model: trained in place, on the device it is on; `afd.nn.split` says what it may be.
        method: settings of the training method.
        attack: the training attack, without its model, e.g. `PGD.partial(eps=0.3)`; not used by natural training.
        validation_attack: likewise; measures robust accuracy after each epoch.
        epochs: passes over the training images.
        schedule: of all learning rates: "step" (a tenth after 1/2 and 5/6 of the run), "cosine", "one-cycle", or a
            function from progress in [0, 1) to a factor.
        eps_warmup: epochs in which the training attack grows to its full radius.
        ema: decay a round of an exponential average of the weights, which is then what is validated; None for none.
        execution: precision, memory layout and compilation of the training passes, and whether rounds are recorded.
        feature_layer: the linear layer that features enter; by default the last one.
        normalize: whether the features of somebody's own model are scaled to length 1: None for the discriminator
            alone, so that the model stays the function that it is; True for the layer that they enter, too, which makes
            it another function, whose weights load with `load_weights` only; False for nowhere. A model that is split
            already, such as afd's own, says so itself.
        seed: of the attacks' random starts.
        callbacks: functions called with every report.
        log_every: rounds between interval reports; losses are read, and checked, only then.
        folder: for checkpoints (`Keeper`); None to keep none.
        save_every: rounds between checkpoints within an epoch; 0 for one at its end only.
        resume: a checkpoint to go on from, or "auto": the newest whole one in `folder`, or none if there is none.
        config: kept in the checkpoints; a resumed run must have the same. Default: what the settings above say.
    """

    model: nn.Module
    method: Method = field(default_factory=AFD)
    attack: AttackFactory | None = None
    validation_attack: AttackFactory | None = None
    epochs: int = 1
    schedule: str | Schedule = "step"
    eps_warmup: float = 0.0
    ema: float | None = None
    execution: Execution = field(default_factory=Execution)
    feature_layer: str | None = None
    normalize: bool | None = None
    seed: int = 0
    callbacks: Sequence[Callback] = ()
    log_every: int = 50
    folder: Path | None = None
    save_every: int = 0
    resume: Path | str | None = None
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        at_least("epochs", self.epochs, 0)
        at_least("eps_warmup", self.eps_warmup, 0.0)
        at_least("log_every", self.log_every, 1)
        at_least("save_every", self.save_every, 0)
        if self.method.uses_attack and self.attack is None:
            raise InputError(f"attack is None; the method {type(self.method).__name__} trains against one")
        if self.resume == "auto" and self.folder is None:
            raise InputError("resume is 'auto'; it needs a folder to look for checkpoints in")
        self.factor = schedule_named(self.schedule)
        self.group = distributed.join()
        network = split(taken_in(self.model), self.feature_layer, self.normalize)
        self.device = device_of(network)
        with isolated(self.device):
            self.network = self.execution.prepare(network)
            self._build_round()
            self.average = None if self.ema is None else averaged(self.network, self.ema)
        # one for all epochs: what it has recorded stays
        self.judge = None if self.validation_attack is None else self.validation_attack(self.evaluated)
        self.keeper = None if self.folder is None else Keeper(Path(self.folder), self.warn)
        self.position, self.meter, self.history = Position(), Meter(self.group), list[EpochReport]()
        self._stopped = 0

    def _build_round(self) -> None:
        self.round = self.method.build(self.network, self.execution, self.group.wrap)
        self._built_for = self.network.num_classes

    @property
    def evaluated(self) -> nn.Module:
        """The network that validation looks at: the average of the weights where there is one."""
        network: nn.Module = self.network if self.average is None else self.average.module
        return network

    def stop(self, signal_number: int | None = None) -> None:
        """Asks to stop after the round in progress; `fit` then saves and returns (or, for a signal, raises)."""
        self._stopped = signal_number or BY_CALLBACK

    def fit(self, train: Loader, validation: Loader) -> list[EpochReport]:
        """Runs all epochs, or what is left of them.

        Args:
            train: training batches of this process, with a length.
            validation: batches that choose the best epoch, the same in all processes; never test images.

        Returns:
            One report an epoch, those before a resumed checkpoint included.

        Precision, gradients and inference mode are those of `execution`, whatever mode the caller is in. Nothing is
        trained before both loaders were looked at and, unless it is one of afd's own, the model was tried on images of
        validation: it may be found to have another number of classes than its layers' widths made believe, and then
        gets a new round.

        Raises:
            InputError, InputTypeError: images are not finite floats in [0, 1], labels not int64 classes of the model; a
                loader is empty or can be read only once; processes have different numbers of batches; the logits are
                not those of the feature layer.
            CheckpointError: a checkpoint cannot be written, read or gone on from.
            TrainingError: a loss stopped being finite.
            StoppedError: SIGTERM or SIGINT came; the round was finished and a checkpoint saved.
        """
        with guard(self.device), isolated(self.device):
            return self._fit(train, validation)

    def _fit(self, train: Loader, validation: Loader) -> list[EpochReport]:
        rounds = loaders.look(train, validation, self.epochs, partial(settle, self.network), self.group)
        if self.network.num_classes != self._built_for:
            self._build_round()
            if self.average is not None:
                self.average.module.num_classes = self.network.num_classes
        self.rates = Rates(self.round.optimizers, self.factor, max(1, self.epochs * rounds))
        self.stream = Stream(train, self.device, self.network.num_classes, rounds)
        resumed = run_state.resume(self)
        warmup = None
        if self.attack is not None and self.method.uses_attack:
            warmup = Warmup(unwatched(self.attack(self.network)), round(self.eps_warmup * rounds))
        self.plays = recording.plays(self, None if warmup is None else warmup.attack)
        with on_signals(self.stop):
            while self.position.epoch <= self.epochs and not self._stop_asked():
                speed = self._train_epoch(rounds, warmup, resumed)
                resumed = None
                if self._stop_asked():
                    break
                self._close_epoch(validation, speed)
        if self._stop_asked():
            self._end_early()
        if isinstance(self.network, FeatureSplit) and self.network.normalize:
            self.warn(
                f"the model now scales what enters {self.network.feature_layer!r} to length 1, as normalize=True "
                "asked; its weights load with afd.training.load_weights"
            )
        return self.history

    def _train_epoch(self, rounds: int, warmup: Warmup | None, generators: dict[str, Any] | None) -> float:
        """What is left of an epoch; returns images a second."""
        self.network.train()
        images, start, at = 0, time.perf_counter(), self.position
        for x, y in self.stream.epoch(at.epoch, at.batch, generators):
            try:
                self._play(x, y, warmup)
            except InputError:
                if self.group.size == 1:  # several would wait for each other
                    self._report_interval(rounds)  # a loss that is not finite explains it better
                raise
            at.batch, at.round, images = at.batch + 1, at.round + 1, images + len(y)
            at_report = at.round % self.log_every == 0 or at.batch == rounds
            if at_report:
                self._report_interval(rounds)
            if (at_report or self.group.size == 1) and self._stop_asked():
                break
            if self.save_every and at.round % self.save_every == 0 and at.batch < rounds:
                self._report_interval(rounds)
                self._save(best=False)
        self._report_interval(rounds)
        return self.group.size * images / (time.perf_counter() - start)

    def _play(self, x: Tensor, y: Tensor, warmup: Warmup | None) -> None:
        """One round, and the average."""
        played = self.position.round
        self.rates.set(played)
        attack = None if warmup is None else warmup.at(played)
        self.meter.add(self.plays(partial(self._attack_and_step, attack), attack, x, y, self.seed + played))
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _attack_and_step(self, attack: Attack | None, x: Tensor, y: Tensor, seed: Any) -> dict[str, Tensor]:
        """All of a round that a graph can record; the seed is a number, or a tensor that a recording reads."""
        x_adv = x
        if attack is not None:
            # the processes' batches are rows of one joint batch, and each row has its own start
            x_adv = attack(x, y, seed=seed, first_sample=self.group.rank * len(y))
        return self.round.step(x, y, x_adv)

    def _report_interval(self, rounds: int) -> None:
        """Reads the losses and tells of them; the only place in an epoch that waits for the device."""
        at, waiting = self.position, len(self.meter.waiting)
        try:
            losses = self.meter.read()
        except NotFiniteError as error:
            number = at.round - waiting + error.rounds_before + 1
            raise TrainingError(
                f"{error} in round {number} (epoch {at.epoch}); {self._where_it_stood(number)}"
            ) from None
        if losses:
            rates = self.rates.of_round(at.round)
            self._tell(IntervalReport(at.epoch, at.round, at.batch, rounds, losses, rates))

    def _close_epoch(self, validation: Loader, speed: float) -> None:
        """Validation, report and checkpoint after a whole epoch."""
        self.group.share_buffers(self.evaluated)
        measure = partial(
            shared_accuracy, self.evaluated, validation, group=self.group, device=self.device,
            num_classes=self.network.num_classes,
        )  # fmt: skip
        report = EpochReport(
            self.position.epoch,
            self.position.round,
            self.meter.means(),
            natural=measure(attack=None),
            robust=None if self.judge is None else measure(attack=self.judge),
            images_per_second=speed,
            learning_rates=self.rates.of_round(self.position.round),
        )
        best = all(report.score > earlier.score for earlier in self.history)
        self.history.append(report)
        self.position = Position(self.position.epoch + 1, 0, self.position.round)
        self.meter = Meter(self.group)
        self._tell(report)
        self._save(best=best)

    def _save(self, *, best: bool) -> None:
        if self.keeper is None:
            return
        self.group.share_buffers(self.network)
        if not run_state.finite(self.network, self.round.players):
            played = self.position.round
            raise TrainingError(f"a weight stopped being finite by round {played}; {self._where_it_stood(played)}")
        state, metadata = run_state.capture(self)
        if self.group.leads:
            self.keeper.save(state, metadata, best=best)

    def _end_early(self) -> None:
        if self.position.batch:
            self._save(best=False)
        if self._stopped == BY_CALLBACK:
            return
        at, file = self.position, self.keeper.newest if self.keeper else None
        raise StoppedError(self._stopped, f"stopped in epoch {at.epoch} after round {at.round}", file)

    def _stop_asked(self) -> bool:
        """Whether to stop now; all processes must ask, which several do at reports, where they wait anyway."""
        self._stopped = self.group.largest(self._stopped, self.device)
        return self._stopped > 0

    def _where_it_stood(self, number: int) -> str:
        shown = ", ".join(f"{name} {rate:g}" for name, rate in self.rates.of_round(number).items())
        newest = self.keeper.newest if self.keeper else None
        return f"learning rates were {shown}; last good checkpoint: {newest or 'none'}"

    def _tell(self, report: Report) -> None:
        if self.group.leads:
            for callback in self.callbacks:
                callback(report)

    def warn(self, message: str) -> None:
        """Says what the user should know, once."""
        if self.group.leads:
            print(f"afd: warning: {message}", file=sys.stderr)
