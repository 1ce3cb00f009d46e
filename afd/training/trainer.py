"""The loop, and only the loop: attack, step, report, save, validate."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from afd.attacks import AttackFactory
from afd.checkpoint import CheckpointManager
from afd.errors import InputError
from afd.execution import isolated, lay_out_plainly
from afd.graphs import guard
from afd.methods import AFD, Execution, Method
from afd.methods.base import Run
from afd.methods.inputs import device_of, settle, taken_in
from afd.methods.ramps import STEPS, Ramp, Ramps, check_ramps
from afd.nn import FeatureSplit, split
from afd.nn.modes import held
from afd.processes import all_or_none
from afd.runtime import join
from afd.training.alarms import Watch
from afd.training.callbacks import (
    UNSEEN,
    Callback,
    DivergedError,
    EpochReport,
    IntervalReport,
    LossTracker,
    NotFiniteError,
    Progress,
    Report,
)
from afd.training.data import Loader, check_loaders
from afd.training.mixing import Mixing
from afd.training.position import Position
from afd.training.recording import recorded
from afd.training.schedules import EpsWarmup, Rates, Schedule, averaged, schedule_named
from afd.training.settings import built, check_settings, differences, overridden
from afd.training.signals import BY_CALLBACK, LeftError, Stop, StoppedError, on_signals
from afd.training.validation import UndoneError, Validated


@dataclass
class Trainer(Validated):
    """Trains any image classifier with a method against an attack.

    Under torchrun, every process builds a trainer and they train one model together.

    Attributes:
        model: trained in place, on the device it is on; `afd.nn.split` says what it may be.
        method: settings of the training method, its attack among them.
        attack: deprecated: overrides the method's own, as a function of the model, e.g. ``PGD.partial(eps=0.3)``;
            robust accuracy is then not measured unless `validation_attack` says by what.
        validation_attack: deprecated: overrides the method's own, likewise.
        epochs: passes over the training images.
        schedule: of all learning rates: "step" (a tenth after 1/2 and 5/6 of the run), "cosine", "one-cycle", or a
            function from progress in [0, 1) to a factor.
        lr_warmup: epochs in which all learning rates grow linearly to what the schedule says.
        eps_warmup: epochs in which the training attack grows to its full radius.
        ramps: numbers of the method, or ``attack.`` and numbers of its attack, that go linearly to their own value in
            so many epochs, by name: ``{"beta": Ramp(first=0, epochs=5), "attack.steps": Ramp(2, 20)}``.
        ema: decay a step of the optimizer of an exponential average of the weights, which is then what is validated;
            None for none.
        ema_warmup: whether the decay grows to `ema`, as min(ema, (1 + t) / (10 + t)) after t steps.
        ema_buffers: what BatchNorm's statistics and other buffers of the average are: "averaged" like the weights;
            "copied" from the model at each step; or "recomputed": copied, and before each validation BatchNorm's are
            computed anew, by a pass of the averaged weights over the training images (`recompute_statistics`).
        mixing: of the training images and their labels, which are soft then: mixup, CutMix.
        execution: precision, memory layout and compilation of the training passes, and whether steps are recorded.
        feature_layer: the linear layer that features enter; by default the last one.
        normalize: whether the features of somebody's own model are scaled to length 1: None for the discriminator
            alone, so that the model stays the function that it is; True for the layer that they enter, too, which makes
            it another function, whose weights load with `load_weights` only; False for nowhere. A model that is split
            already, such as afd's own, says so itself.
        seed: of the attacks' random starts.
        callbacks: functions called with every report.
        log_every: steps between interval reports; losses are read, and checked, only then.
        folder: for checkpoints (`CheckpointManager`); None to keep none. While `fit` runs it is this trainer's alone.
        overwrite: whether the checkpoints of another run in `folder` may be discarded; else they are an error.
        save_every: steps between checkpoints within an epoch; 0 for one at its end only.
        resume: a checkpoint to go on from, or "auto": the newest whole one in `folder`, or none if there is none.
        config: kept in the checkpoints; a resumed run must have the same, but for `epochs`, which may grow. Default:
            what the settings above say.
        progress: told of every batch in one process, to show it; None to show nothing.
        on_alarm: what is done where a model collapses, hides its gradients, stays at chance or has gradients that
            explode (`afd.training.alarms`): "warn"; "stop" after that validation; "rollback", at most three times, to
            the last good epoch, and on with a stronger attack or a smaller learning rate; or "off": nobody looks.
        spent: seconds in `fit`, images and memory that the run has cost, those before a checkpoint included.
        best: the report of the epoch whose weights are in ``best.pt``: that of the highest score, of equals the last.
        history: the reports of all epochs.
        begun: whether `fit` has come as far as training.
    """

    model: nn.Module
    method: Method = field(default_factory=AFD)
    attack: AttackFactory | None = None
    validation_attack: AttackFactory | None = None
    epochs: int = 1
    schedule: str | Schedule = "step"
    eps_warmup: float = 0.0
    ema: float | None = None
    mixing: Mixing = field(default_factory=Mixing)
    execution: Execution = field(default_factory=Execution)
    feature_layer: str | None = None
    normalize: bool | None = None
    seed: int = 0
    callbacks: Sequence[Callback] = ()
    log_every: int = 50
    folder: Path | None = None
    overwrite: bool = False
    save_every: int = 0
    resume: Path | str | None = None
    config: dict[str, Any] | None = None
    progress: Progress | None = None
    lr_warmup: float = 0.0
    ema_warmup: bool = True
    ema_buffers: str = "averaged"
    ramps: Mapping[str, Ramp] = field(default_factory=dict)
    on_alarm: str = "warn"

    def __post_init__(self) -> None:
        check_settings(self.settings())
        self.method, self.judging = overridden(self.method, self.attack, self.validation_attack, self.seed)
        check_ramps(self.method, self.ramps, self.eps_warmup)
        self.factor = schedule_named(self.schedule)
        self.group = join()
        inner = taken_in(self.model)
        with held(inner.modules()):  # another thread that evaluates it has frozen its parameters
            network = split(inner, self.feature_layer, self.normalize)
            self.device = device_of(network)
            self.group = dataclasses.replace(self.group, device=self.device)
            with isolated(self.device):
                self.network = self.execution.prepare(network)
                self._build_step()
                self.average = (
                    None
                    if self.ema is None
                    else averaged(self.network, self.ema, warmup=self.ema_warmup, buffers=self.ema_buffers)
                )
        # one for all epochs: what it has recorded stays
        self.judge = None if self.judging is None else self.judging.build(self.evaluated)
        self.checkpoints = None if self.folder is None else CheckpointManager(Path(self.folder), self.warn)
        self.watch = None if self.on_alarm == "off" else Watch(self.method, self.group, self.seed, self.judging)
        self.stopping, self._built = Stop(self.group), built(self.settings())
        self._reset()

    def settings(self) -> dict[str, Any]:
        """What this was made with, by name."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.init}

    def _build_step(self) -> None:
        self.step = self.method.build(self.network, self.execution, self.group.wrap)
        self.step.looks = 0  # the loaders are looked at
        self._built_for = self.network.num_classes

    @property
    def shown(self) -> Progress:
        """Where progress is shown, if anywhere."""
        return self.progress if self.progress is not None and self.group.leads else UNSEEN

    def stop(self, signal_number: int | None = None) -> None:
        """Asks to stop after the step in progress; `fit` then saves and returns (or, for a signal, raises)."""
        self.stopping.ask(signal_number or BY_CALLBACK)

    def fit(self, train: Loader, validation: Loader) -> list[EpochReport]:
        """Runs all epochs, or what is left of them.

        It may be called again: after a stop, an error or Ctrl-C it goes on with the next batch; with `epochs` raised it
        trains on, and learning rates follow the schedule of the new number.

        Args:
            train: training batches of this process, with a length.
            validation: batches that choose the best epoch, the same in all processes; never test images.

        Returns:
            One report an epoch, those before a resumed checkpoint included.

        Precision, gradients and inference mode are those of `execution`, whatever mode the caller is in. Nothing is
        trained before both loaders were looked at, a checkpoint was found readable, and a model that is not afd's own
        was tried on images: one of another number of classes than its layers' widths made believe gets a new step.

        Raises:
            InputError, InputTypeError: images are not finite floats in [0, 1], labels not int64 classes of the model,
                or soft ones that sum to 1; the method, or `mixing`, does not take such batches; a loader is empty or
                can be read only once; processes have different numbers of batches; the logits are not those of the
                feature layer.
            FolderError: `folder` is used by another run, or holds one that is neither gone on with nor to be discarded.
            CheckpointError: a checkpoint cannot be written, read or gone on from.
            TrainingError: a loss stopped being finite.
            StoppedError: SIGTERM or SIGINT came; the step was finished and a checkpoint saved.
        """
        if self.fitting:
            raise InputError("fit was called while it runs; a callback may call stop")
        self.fitting = True
        self.spent.begin()
        try:
            with guard(self.device), isolated(self.device), all_or_none(StoppedError), self._claimed():
                return self._fit(train, validation)
        finally:
            self.spent.end()
            self.fitting = False

    def _fit(self, train: Loader, validation: Loader) -> list[EpochReport]:
        settings = self.settings()
        check_settings(settings)
        check_ramps(self.method, self.ramps, self.eps_warmup)
        changed = differences(self._built, built(settings))
        if changed:
            raise InputError(f"changed since the trainer was made: {'; '.join(changed)}; make another trainer for that")
        look_at = partial(settle, self.network, self.execution)
        told = None if self.checkpoints is None else self.warn
        steps = check_loaders(
            train, validation, self.epochs, look_at, self.group, told, self.method.labels, self._check_batch
        )
        steps *= self.method.repeats
        self._follow_what_was_found()
        self.rates = Rates(
            self.step.optimizers, self.factor, max(1, self.epochs * steps), round(self.lr_warmup * steps)
        )
        first, generators = not self.begun, self._begin(train, validation, steps)
        self._set_out()
        self._keep_at_first()
        self.stopping.begin()
        self._stay_stopped(first)
        try:
            with on_signals(self.stopping.by_signal), self._watched():
                while self.position.epoch <= self.epochs and not self.stopping.asked():
                    try:
                        self._train_epoch(generators)
                        generators = None
                        if self.stopping.asked() or not self._close_epoch(validation):
                            break
                    except (DivergedError, UndoneError) as error:
                        generators = self._go_back(error)
            self.stopping.settle()
            if self.stopping.asked():
                self._end_early()
        finally:
            self.generators = self._capture_generators()  # for the next call
        if isinstance(self.network, FeatureSplit) and self.network.normalize:
            self.warn(
                f"the model now scales what enters {self.network.feature_layer!r} to length 1, as normalize=True "
                "asked; its weights load with afd.training.load_weights"
            )
        return self.history

    def _set_out(self) -> None:
        """Makes ready for steps, with the numbers that grow and what rollbacks have changed."""
        method, self.rates.scale = self._now()
        steps, ramps = self.steps_per_epoch, self.ramps
        if method is not self.method:  # a ramp that leads nowhere any more
            ramps = {name: one for name, one in ramps.items() if name != STEPS}
        self.warmup = EpsWarmup(method, self.step, round(self.eps_warmup * steps))
        self.growing = Ramps(method, self.step, ramps, steps)
        self.run_step = recorded(self.network, self.step, self.device, self.group.size, self.execution)

    def _check_batch(self, x: Tensor, y: Tensor | None) -> None:
        """Raises InputError unless method and mixing take batches like this one; reads no value."""
        run = Run(self.group.size, self.execution.graph, y is not None and y.is_floating_point())
        self.method.check_run(run)
        self.mixing.check(x, y)
        if self.mixing.active:
            try:
                self.method.check_run(dataclasses.replace(run, soft=True))
            except InputError as error:
                raise InputError(f"{error} (mixup and cutmix make them soft)") from error

    def _follow_what_was_found(self) -> None:
        """Step and average as the model has turned out to be, when it was tried on images."""
        with held(self.modules()):
            if self.network.num_classes != self._built_for:
                self._build_step()
            if self.average is not None:
                self.average.module.num_classes = self.network.num_classes
                if self.network.plain_layout:
                    lay_out_plainly(self.average.module)

    def _train_epoch(self, generators: dict[str, Any] | None) -> None:
        """What is left of an epoch."""
        self._held = self.modules()
        with held(self._held):
            self.network.train()
        at, since, steps = self.position, time.perf_counter(), self.steps_per_epoch
        self.step.epoch = at.epoch
        self.shown.began("training", at.epoch, at.batch, steps, self.losses.peek)
        for x, y, index in self.loader.epoch(at.epoch, at.batch, generators):
            try:
                self._train_step(x, y, index)
            except InputError:
                if self.group.size == 1:  # several would wait for each other
                    self._report_interval()  # a loss that is not finite explains it better
                raise
            at.batch, at.global_step = at.batch + 1, at.global_step + 1
            since = self.losses.count(len(x), since)
            self.spent.images += self.group.size * len(x)
            self.shown.moved(self.group.size * len(x))
            at_report = at.global_step % self.log_every == 0 or at.batch == steps
            if at_report:
                self._report_interval()
            if self.stopping.after_step():
                break
            if self.save_every and at.global_step % self.save_every == 0 and at.batch < steps:
                self._report_interval()
                self.save(best=False)
        self._report_interval()

    @property
    def _done(self) -> int:
        """Steps until here, had all epochs had as many as this one: what schedules are asked with."""
        return (self.position.epoch - 1) * self.steps_per_epoch + self.position.batch

    def _train_step(self, x: Tensor, y: Tensor | None, index: Tensor | None) -> None:
        """One step, and the average."""
        self.rates.set(self._done)
        self.warmup.at(self._done)
        self.growing.at(self._done)
        # the processes' batches are rows of one joint batch, and each row has its own start
        seed, first = self.seed + self.position.global_step, self.group.rank * len(x)
        if self.mixing.active and y is not None:
            batch = self.position.global_step // self.method.repeats  # alike in all repeats of a batch
            classes = self.network.num_classes
            x, y = self.mixing(x, y, classes, seed=self.seed, step=batch, first_sample=first)
        with held(self._held):
            self.losses.add(self.run_step(x, y, index=index, seed=seed, first_sample=first))
            if self.average is not None:
                self.average.update_parameters(self.network)

    def _report_interval(self) -> None:
        """Reads the losses and tells of them; the only place in an epoch that waits for the device."""
        at, waiting = self.position, len(self.losses.waiting)
        try:
            losses = self.losses.read()
        except NotFiniteError as error:
            number = at.global_step - waiting + error.steps_before + 1
            raise DivergedError(
                f"{error} in step {number} (epoch {at.epoch}); {self._where_it_stood(number)}"
            ) from None
        if losses:
            rates = self.rates.of_step(self._done)
            self._tell(IntervalReport(at.epoch, at.global_step, at.batch, self.steps_per_epoch, losses, rates))

    def _close_epoch(self, validation: Loader) -> bool:
        """Validation, report and checkpoint after a whole epoch; False if it was stopped in validation."""
        generators = self.loader.capture()
        self.check_finite()
        self.group.share_buffers(self.evaluated)
        report = partial(
            EpochReport,
            self.position.epoch,
            self.position.global_step,
            self.losses.means(),
            images_per_second=self.group.size * self.losses.speed,
            learning_rates=self.rates.of_step(self._done),
        )
        try:
            found = self._validate(validation, report)
        except BaseException as error:
            self.loader.restore(generators)  # validation begins anew when training goes on
            if isinstance(error, LeftError):
                return False
            raise
        self._heed(found)
        good = not found.alarms and (self.watch is None or self.watch.learning)
        # what a rollback may undo is not the best
        best = self.best is None or (found.rank >= self.best.rank and (good or self.on_alarm != "rollback"))
        self.history.append(found)
        self.spent.epochs += 1
        self.best = found if best else self.best
        self.position = Position(found.epoch + 1, 0, found.global_step)
        self.losses = LossTracker(self.group)
        try:
            self._tell(found)  # first: what is in the checkpoint is in the log
        finally:
            self.save(best=best)
        if good:
            self._keep()
        return True

    def _end_early(self) -> None:
        if self.position.batch:
            self.save(best=False)
        if self.stopping.reason == BY_CALLBACK:
            return
        at, file = self.position, self.group.gather(self.checkpoints and self.checkpoints.newest)[0]
        raise StoppedError(self.stopping.reason, f"stopped in epoch {at.epoch} after step {at.global_step}", file)

    def _tell(self, report: Report) -> None:
        if self.group.leads:
            for callback in self.callbacks:
                callback(report)
