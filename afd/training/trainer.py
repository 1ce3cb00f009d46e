"""The loop, and only the loop: attack, round, report, save, validate."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from afd.attacks import Attack, AttackFactory
from afd.attacks.base import GradientAttack
from afd.attacks.capture import guard
from afd.errors import InputError
from afd.evaluation.robustness import attacked_by
from afd.evaluation.target import inside
from afd.methods import AFD, Execution, Method
from afd.methods.execution import isolated, lay_out_plainly
from afd.nn import FeatureSplit, split
from afd.nn.modes import held
from afd.training import distributed, loaders, recording, run_state
from afd.training.average import averaged
from afd.training.foreign import device_of, settle, taken_in
from afd.training.given import check_settings, made
from afd.training.keeper import Keeper
from afd.training.loaders import Loader
from afd.training.meter import Meter, NotFiniteError
from afd.training.reports import UNSEEN, Callback, EpochReport, IntervalReport, Progress, Report, TrainingError
from afd.training.schedule import Rates, Schedule, schedule_named
from afd.training.signals import StoppedError, on_signals
from afd.training.stream import Stream
from afd.training.validation import shared_accuracy
from afd.training.warmup import Warmup, unwatched

LOOKS = 3  # rounds in which the values of somebody else's attacked images are looked at
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
        progress: told of every batch in one process, to show it; None to show nothing.
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
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        self.factor = schedule_named(self.schedule)
        self.group = distributed.join()
        inner = taken_in(self.model)
        with held(inner.modules()):  # another thread that evaluates it has frozen its parameters
            network = split(inner, self.feature_layer, self.normalize)
            self.device = device_of(network)
            with isolated(self.device):
                self.network = self.execution.prepare(network)
                self._build_round()
                self.average = None if self.ema is None else averaged(self.network, self.ema)
        # one for all epochs: what it has recorded stays
        made_judge = self.validation_attack
        self.judge = None if made_judge is None else made("validation_attack", made_judge(self.evaluated))
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

    @property
    def shown(self) -> Progress:
        """Where progress is shown, if anywhere."""
        return self.progress if self.progress is not None and self.group.leads else UNSEEN

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
        look_at = partial(settle, self.network, self.execution)
        rounds = loaders.look(train, validation, self.epochs, look_at, self.group)
        self._follow_what_was_found()
        self.rates = Rates(self.round.optimizers, self.factor, max(1, self.epochs * rounds))
        self.stream = Stream(train, self.device, self.network.num_classes, rounds)
        with held(self._modules()):
            resumed = run_state.resume(self)
        warmup = None
        if self.attack is not None and self.method.uses_attack:
            attack = made("attack", self.attack(self.network))
            warmup = Warmup(unwatched(attack), round(self.eps_warmup * rounds))
        self.looked_at = 0  # rounds whose attacked images were looked at
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

    def _follow_what_was_found(self) -> None:
        """Round and average as the model has turned out to be, when it was tried on images."""
        with held(self._modules()):
            if self.network.num_classes != self._built_for:
                self._build_round()
            if self.average is not None:
                self.average.module.num_classes = self.network.num_classes
                if self.network.plain_layout:
                    lay_out_plainly(self.average.module)

    def _modules(self, attack: Any = None) -> list[nn.Module]:
        """All that a round reads or writes: held at once, so that no two threads wait for each other."""
        other = getattr(attack, "model", None)
        models = (self.network, None if self.average is None else self.average.module, other)
        return [module for model in models if isinstance(model, nn.Module) for module in model.modules()]

    def _train_epoch(self, rounds: int, warmup: Warmup | None, generators: dict[str, Any] | None) -> float:
        """What is left of an epoch; returns images a second."""
        self._held = self._modules(None if warmup is None else warmup.attack)
        with held(self._held):
            self.network.train()
        images, start, at = 0, time.perf_counter(), self.position
        self.shown.began("training", at.epoch, at.batch, rounds, self.meter.peek)
        for x, y in self.stream.epoch(at.epoch, at.batch, generators):
            try:
                self._play(x, y, warmup)
            except InputError:
                if self.group.size == 1:  # several would wait for each other
                    self._report_interval(rounds)  # a loss that is not finite explains it better
                raise
            at.batch, at.round, images = at.batch + 1, at.round + 1, images + len(y)
            self.shown.moved(self.group.size * len(y))
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
        with held(self._held):
            self.meter.add(self.plays(partial(self._attack_and_step, attack), attack, x, y, self.seed + played))
            if self.average is not None:
                self.average.update_parameters(self.network)

    def _attack_and_step(self, attack: Attack | None, x: Tensor, y: Tensor, seed: Any) -> dict[str, Tensor]:
        """All of a round that a graph can record; the seed is a number, or a tensor that a recording reads."""
        x_adv = x
        if attack is not None:
            # the processes' batches are rows of one joint batch, and each row has its own start
            first = self.group.rank * len(y)
            if isinstance(attack, GradientAttack):
                x_adv = attack(x, y, seed=seed, first_sample=first)
            else:
                x_adv = attacked_by(attack, x, y, seed=seed, first_sample=first)
                self._look_at_attacked(x_adv)
        return self.round.step(x, y, x_adv)

    def _look_at_attacked(self, x_adv: Tensor) -> None:
        """Checks the values that somebody else's attack made; in the first rounds, as it waits for the device."""
        if self.looked_at >= LOOKS:
            return
        self.looked_at += 1
        wrong = int((~inside(x_adv)).sum())
        if wrong:
            raise InputError(
                f"the attack returned {wrong} of {len(x_adv)} images out of [0, 1] or not finite; it must return "
                "images like x"
            )

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

        def measure(attack: Attack | None) -> float:
            work = "validation" if attack is None else "validation under attack"
            total = len(validation) if isinstance(validation, Sized) else None
            self.shown.began(work, self.position.epoch, 0, total)
            return shared_accuracy(
                self.evaluated, validation, attack, self.group, self.device, self.network.num_classes,
                each=self.shown.moved,
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
        best = all(report.rank > earlier.rank for earlier in self.history)
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
        with held(self._modules()):
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
