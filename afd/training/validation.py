"""After an epoch: validation images classified, BatchNorm statistics of averaged weights computed anew, ways back.

An average of running statistics lags behind the averaged weights, and the live model's are of other weights; what the
averaged model itself meets is known by a pass of it (Izmailov et al. 2018, `torch.optim.swa_utils.update_bn`).
"""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from afd.attacks import Attack
from afd.attacks.diagnostics import COULD_NOT_AIM
from afd.attacks.inputs import outside_inference
from afd.data.items import images_and_labels
from afd.errors import InputError, ModelWarning, warn_caller
from afd.methods import Method
from afd.methods.ramps import remedied, told_of, with_stronger_attack
from afd.metrics import accuracy
from afd.nn.modes import evaluating, held
from afd.runtime import Group
from afd.training import loader_state
from afd.training.alarms import COLLAPSE, GRADIENTS, MASKED, Alarm, RollbackReport
from afd.training.callbacks import DivergedError, EpochReport, Progress, Report
from afd.training.data import Loader, ResumableLoader, Sample, checked
from afd.training.signals import Stop
from afd.training.state import Resumable

ROLLBACKS = 3  # of a run, at most


def shared_accuracy(
    model: nn.Module,
    batches: Loader,
    attack: Attack | None,
    group: Group,
    num_classes: int | None = None,
    each: Callable[[int], None] | None = None,
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> float:
    """Share of images classified correctly, batches dealt out to the processes one by one.

    An attack starts at each image as it would in one process. All processes must ask.

    Args:
        model: images [N, ...] -> logits.
        batches: as described in `Loader`, the same in all processes.
        attack: on the model; None for clean images.
        group: of the processes; its device is the model's.
        num_classes: labels are below it; None if nobody knows.
        each: called after each batch, in every process, with the number of its images.
        look: called with each batch, in every process.

    Raises:
        InputError, InputTypeError: there are no images, or a batch is not as described in `Loader`.
        ModelError: the model returned NaN.

    Warns:
        ModelWarning: images at which the attack could not aim, and which count as robust for that.
    """
    correct, seen, blind = 0.0, 0, 0
    for number, item in enumerate(batches):
        x, y = checked("validation", item, num_classes, batches)
        if look is not None:
            look(x, y)
        if number % group.size == group.rank:
            started = None if attack is None else partial(_shifted, attack, seen)
            with warnings.catch_warnings():  # said once for all batches, below
                warnings.filterwarnings("ignore", f".*{COULD_NOT_AIM}", ModelWarning)
                correct += accuracy(model, [(x.to(group.device), y.to(group.device))], started) * len(y)
            blind += _blind(attack)
        seen += len(y)
        if each is not None:
            each(len(y))
    if not seen:
        raise InputError("validation holds no images")
    counts = torch.tensor([round(correct), blind], dtype=torch.float64, device=group.device)
    right, blind = map(int, group.sum(counts).tolist())
    if blind and group.leads:
        warn_caller(
            f"for {blind} of {seen} images the gradient of the loss was exactly zero or NaN wherever the attack "
            f"looked, so {COULD_NOT_AIM}: that they withstand it shows no robustness",
            ModelWarning,
        )
    return right / seen


def _blind(attack: Attack | None) -> int:
    """At how many images an attack of ours could not aim in its last call."""
    report = getattr(attack, "report", None)
    return 0 if report is None else int(report.blind.sum())


def _shifted(
    attack: Attack,
    offset: int,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    seed: int | None = None,
    first_sample: int = 0,
) -> torch.Tensor:
    return attack(x, y, seed=seed, first_sample=offset + first_sample)


# --- BatchNorm statistics of an average ---------------------------------------------------------------------------


def tracking(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    loader: ResumableLoader,
    group: Group,
    each: Callable[[int], None] = lambda _images: None,
    followed: nn.Module | None = None,
) -> None:
    """Has BatchNorm layers keep the mean of the statistics of all training batches, instead of what they keep.

    One pass over the batches of the epoch, in evaluation mode but for these layers, which normalise by each batch: the
    arithmetic of `torch.optim.swa_utils.update_bn`. Each of several processes passes its own batches, and all keep the
    mean of their means and variances: as many batches each, so that it is the mean over all parts of batches (or, with
    synchronised layers, over joint batches). The loader is as if nobody had looked.

    Args:
        model: images [N, ...] -> anything; all else in it stays as it is.
        loader: of the training batches.
        group: of the processes, which all ask.
        each: called after each batch with the number of its images.
        followed: the model that this is the average of, in training mode; what is frozen there stays as it is.
    """
    layers = tracking(model)
    if followed is not None:
        trains = {name for name, layer in followed.named_modules() if layer.training}
        layers = [layer for name, layer in model.named_modules() if layer in layers and name in trains]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    with evaluating(model, keep=layers), loader_state.untouched(loader.loader):
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.train()
                layer.momentum = None  # a cumulative mean
            loader_state.begin_anew({"train": loader.loader})
            for item in islice(loader.loader, loader.steps // loader.repeats):
                x = images_and_labels(item, loader.labels)[0]
                model(outside_inference(x.to(loader.device, non_blocking=True)))
                each(len(x))
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    for layer in layers:
        for kept in (layer.running_mean, layer.running_var):
            assert isinstance(kept, Tensor)
            kept.copy_(group.mean(kept))


# --- What is done about it ------------------------------------------------------------------------------------------


def remedy_for(alarms: Sequence[Alarm], method: Method) -> str:
    """What is to be changed: "attack" where that helps and can be made stronger, else "rates"."""
    aimed = any(alarm.kind in (COLLAPSE, MASKED) for alarm in alarms)
    return "attack" if aimed and with_stronger_attack(method) is not method else "rates"


class UndoneError(Exception):
    """An epoch after which something is so wrong that it is to be undone."""

    def __init__(self, report: EpochReport) -> None:
        super().__init__(", ".join(map(str, report.alarms)))
        self.report = report


class Validated(Resumable):
    """A trainer as far as it looks at what an epoch has come to: accuracies, alarms, and what is done about these."""

    on_alarm: str
    ema_buffers: str
    judge: Attack | None
    stopping: Stop

    @property
    @abstractmethod
    def shown(self) -> Progress:
        """Where progress is shown, if anywhere."""

    @abstractmethod
    def _tell(self, report: Report) -> None:
        """Hands a report to the callbacks."""

    @abstractmethod
    def _set_out(self) -> None:
        """Makes ready for steps, as the method is by now."""

    @property
    def alarms(self) -> list[Alarm]:
        """All that have gone off, those of epochs that were undone included."""
        found = [Alarm(**one) for back in self.rollbacks for one in back["alarms"]]
        found += [alarm for report in self.history for alarm in report.alarms]
        return sorted(found, key=lambda alarm: alarm.epoch)

    def _recompute(self) -> None:
        """BatchNorm's statistics of the average, where they are to be; LeftError where somebody asks to stop."""
        if self.average is None or self.ema_buffers != "recomputed":
            return
        self.shown.began("statistics", self.position.epoch, 0, self.steps_per_epoch // self.method.repeats)

        def each(images: int) -> None:
            self.shown.moved(self.group.size * images)
            self.stopping.leave()

        with held(self.modules()):
            recompute_statistics(self.average.module, self.loader, self.group, each, self.network)
        self.average.take_buffers()

    def _measure(self, validation: Loader, attack: Attack | None, sample: Sample | None = None) -> float:
        """Accuracy on the validation images; LeftError where somebody asks to stop meanwhile."""
        work = "validation" if attack is None else "validation under attack"
        total = len(validation) if isinstance(validation, Sized) else None
        self.shown.began(work, self.position.epoch, 0, total)

        def each(images: int) -> None:
            self.shown.moved(images)
            self.stopping.leave()

        classes, look = self.network.num_classes, None if sample is None else sample.look
        return shared_accuracy(self.evaluated, validation, attack, self.group, classes, each, look)

    def _validate(self, validation: Loader, report: Callable[..., EpochReport]) -> EpochReport:
        """What an epoch came to, alarms included; LeftError where somebody asks to stop meanwhile."""
        began, sample = time.perf_counter(), Sample(self.position.epoch)
        self._recompute()
        natural = self._measure(validation, None, None if self.watch is None else sample)
        robust = None if self.judge is None else self._measure(validation, self.judge)
        if self.watch is None:
            return report(natural=natural, robust=robust)
        self.watch.state.seconds += self.losses.seconds + time.perf_counter() - began
        generators = loader_state.global_generators()
        try:  # a model of somebody's own may draw in evaluation mode, too
            judged = 0 if self.judge is None else 1 + 2 * getattr(self.judge, "steps", 1)
            passes = sample.seen * (1 + judged) + 3 * self.group.size * self.losses.images
            looked = self.watch.under_one_step(self.evaluated, sample, passes)
            found = report(natural=natural, robust=robust, one_step=looked)
            self.watch.probe(self.evaluated, sample, found.epoch, robust)
        finally:
            loader_state.set_global_generators(generators)
        return dataclasses.replace(found, alarms=self.watch.alarms(self.history, found, found.epoch, sample))

    def _heed(self, report: EpochReport) -> None:
        """Does about alarms what is to be done about them.

        Raises:
            UndoneError: the epoch is to be undone.
        """
        if not report.alarms:
            return
        if self.on_alarm == "rollback" and len(self.rollbacks) < ROLLBACKS:
            raise UndoneError(report)
        known = {alarm.kind for alarm in self.history[-1].alarms} if self.history else set()
        for alarm in report.alarms:
            if alarm.kind not in known or self.on_alarm != "warn":
                self.warn(str(alarm))
        if self.on_alarm != "warn":
            self.stopped_by = report.alarms[0]
            self.stopping.ask()

    def _stay_stopped(self, first: bool) -> None:
        """A run that an alarm has stopped, and that is gone on with, stays so until it is asked for something else."""
        self.stopped_by, stops = None, self.on_alarm == "stop"
        stops |= self.on_alarm == "rollback" and len(self.rollbacks) >= ROLLBACKS
        if first and stops and self.history and self.history[-1].alarms:
            self.stopped_by = self.history[-1].alarms[0]
            self.stopping.ask()

    # --- The way back -------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Remembers this moment as one to go back to, if that may be asked for: on the CPU, and beside checkpoints."""
        if self.on_alarm == "rollback":
            self._good = _copied(self.state_dict())
            with self.group.together():
                if self.checkpoints is not None and self.group.leads:
                    self.checkpoints.keep_good()

    def _keep_at_first(self) -> None:
        """Has a moment to go back to where a run begins or goes on: the last good one that is known, else this one."""
        if self.on_alarm != "rollback" or self._good is not None:
            return
        state = self.state_dict()
        if self.generators is not None:
            state["generators"] = self.group.gather(self.generators)
        self._good = _copied(state)
        with self.group.together():
            kept = None if self.checkpoints is None or not self.history else self.checkpoints.load_good()
        if kept is not None and kept[1]["position"]["global_step"] <= self.position.global_step:
            self._good = _copied({**kept[0], "metadata": kept[1]})
        elif self.history and self.history[-1].alarms:
            self.note("no good epoch of this run is kept: a rollback goes to where it goes on now")

    def _watched(self) -> AbstractContextManager[None]:
        """Inside, gradients are looked at, as far as the optimizer is one of torch's in full."""
        optimizer: Any = self.step.optimizers.get("task")
        if self.watch is None or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            return nullcontext()
        return self.watch.gradients.of(optimizer)

    def _go_back(self, error: DivergedError | UndoneError) -> dict[str, Any]:
        """Undoes what came since the last good epoch, and goes on otherwise; returns the generators' state there.

        Raises:
            DivergedError: it has done so often enough, or is not to.
        """
        if self._good is None or len(self.rollbacks) >= ROLLBACKS:
            assert isinstance(error, DivergedError)
            raise error
        undone = error.report if isinstance(error, UndoneError) else None
        epoch = self.position.epoch if undone is None else undone.epoch
        alarms = (Alarm.of(GRADIENTS, epoch, str(error).split("; ")[0]),) if undone is None else undone.alarms
        losses = self.losses.means() if undone is None else undone.losses
        before, _ = self._now()
        remedy = remedy_for(alarms, before)
        entry = {"epoch": epoch, "remedy": remedy, "alarms": [dataclasses.asdict(alarm) for alarm in alarms]}
        rollbacks = [*self.rollbacks, entry]
        self._load(self._good, "the last good epoch", self.steps_per_epoch)
        self.rollbacks = rollbacks
        self.best = max(self.history, key=lambda report: report.rank, default=None)
        self._set_out()
        after, rates = self._now()
        told, at = told_of(before, after, rates), self.position
        entry["told"] = told
        for alarm in alarms:
            self.warn(str(alarm))
        self.note(f"gone back to step {at.global_step}, before epoch {at.epoch}, and on with {told}")
        accuracies = {} if undone is None else {n: getattr(undone, n) for n in ("natural", "robust", "one_step")}
        done = (at.epoch - 1) * self.steps_per_epoch + at.batch
        assert self.generators is not None
        now: dict[str, Any] = self.generators["now"]
        self.loader.at_start, self.loader.serving = self.generators["at_start"], self.generators.get("serving")
        self.loader.restore(now)  # first: whoever stops here, and the checkpoint, goes on from there
        rates_next = self.rates.of_step(done + 1)
        self._tell(RollbackReport(epoch, at.global_step, losses, rates_next, alarms, told, **accuracies))
        self.save(best=False)
        return now

    def _now(self) -> tuple[Method, float]:
        """The method as it is after all rollbacks, and a factor of its rates."""
        return remedied(self.method, [back["remedy"] for back in self.rollbacks])


def _copied(value: Any) -> Any:
    """A state that nobody writes to, its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)
