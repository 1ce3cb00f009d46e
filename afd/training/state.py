"""What a run is at one moment, as plain content of a checkpoint, and a run that can be left and gone on with.

Going on from a state repeats no step and skips none.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.checkpoint import CheckpointError, CheckpointManager, packed
from afd.deprecated import with_new_keys
from afd.errors import InputError
from afd.methods import Method, Step
from afd.methods.inputs import device_of
from afd.methods.registry import spelled
from afd.nn import FeatureSplit
from afd.nn.classifier import unwrapped
from afd.nn.modes import held
from afd.runtime import Group, commit
from afd.training.alarms import Alarm, Watch
from afd.training.callbacks import DivergedError, EpochReport, LossTracker
from afd.training.data import Loader, ResumableLoader
from afd.training.position import Position, Spent
from afd.training.schedules import Average, Rates
from afd.training.settings import check_same_run, describe, facts
from afd.training.weights import NETWORK, facts_of

UNCOMPARED = {"lr", "params", "foreach", "fused", "capturable"}  # the schedule's, or how it is computed


# --- State_dicts ----------------------------------------------------------------------------------------------------


def state_dicts(network: nn.Module, average: Average | None, step: Step) -> dict[str, Any]:
    """State_dicts of the model, the average of its weights, the players and the optimizers."""
    kept = None
    if average is not None:
        weights = unwrapped(average.module).state_dict()
        kept = {"weights": weights, "steps": average.n_averaged, "wide": average.wide}
    return {
        "model": unwrapped(network).state_dict(),
        "average": kept,
        "players": {name: player.state_dict() for name, player in step.players.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in step.optimizers.items()},
    }


def load_state_dicts(
    source: str, state: Mapping[str, Any], network: nn.Module, average: Average | None, step: Step
) -> None:
    """Puts model, average, players and optimizers where `state_dicts` found them.

    Raises:
        CheckpointError: another run's step has left it; the message names the `source`, and what differs.
    """
    model = unwrapped(network)
    for name, tensor in model.state_dict().items():  # before anything is loaded: torch would load what fits
        given = state["model"].get(name)
        if isinstance(tensor, Tensor) and isinstance(given, Tensor) and given.shape != tensor.shape:
            raise CheckpointError(
                f"{source} is of another model: {name} is {list(given.shape)} there and {list(tensor.shape)} here"
            )
    model.load_state_dict(state["model"])
    if average is not None:
        kept = with_new_keys(state["average"])
        unwrapped(average.module).load_state_dict(kept["weights"])
        average.n_averaged.copy_(kept["steps"])
        for name, wide in kept.get("wide", {}).items():
            average.wide[name].copy_(wide)
    if state["players"].keys() != step.players.keys():
        told = [", ".join(sorted(names)) or "none" for names in (state["players"], step.players)]
        raise CheckpointError(
            f"{source} holds the players {told[0]}, and the method's step has {told[1]}; what a step keeps from batch "
            "to batch is a module in its players from when it is built"
        )
    for name, player in step.players.items():
        player.load_state_dict(state["players"][name])
    for name, optimizer in step.optimizers.items():
        _check_alike(
            f"{source} is of another run: optimizers.{name}", state["optimizers"][name], optimizer.state_dict()
        )
        # a copy: torch keeps the tensors that it is given, which then are those of whoever gave them, too
        optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))


def memory_of(step: Step, apart: bool) -> dict[str, Tensor]:
    """What this process's step remembers; `apart`: on the CPU, to be handed to other processes."""
    return {name: one.detach().cpu() if apart else one.detach() for name, one in step.memory.items()}


def load_memory(step: Step, kept: Mapping[str, Tensor]) -> None:
    """Has a step remember copies of tensors of any shape, on its model's device, and nothing else."""
    device = device_of(step.network)
    step.memory.clear()
    step.memory.update({name: one.to(device, copy=True) for name, one in kept.items()})


@torch.no_grad()
def finite(model: nn.Module, players: Mapping[str, nn.Module]) -> bool:
    """Whether all weights are; waits for the device once."""
    everything = (p for module in (model, *players.values()) for p in module.parameters())
    weights: list[Tensor] = [p for p in everything if p.is_floating_point()]
    norms: list[Tensor] = list(torch._foreach_norm(weights))
    return bool(torch.isfinite(torch.stack([norm.double().to(norms[0].device) for norm in norms]).sum()))


def _check_alike(told: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises CheckpointError where an optimizer has other settings than it had; its rates now are the schedule's."""
    groups = zip(there["param_groups"], here["param_groups"], strict=False)
    for number, (old, new) in enumerate(groups):
        for setting in sorted((old.keys() & new.keys()) - UNCOMPARED):
            one, other = describe(old[setting]), describe(new[setting])
            if one != other:
                raise CheckpointError(f"{told}.param_groups.{number}.{setting} is {one} there and {other} here")


# --- A run that can be left and gone on with ------------------------------------------------------------------------


class Resumable(ABC):
    """A trainer as far as its run can be left and gone on with: its state_dict, and its checkpoints."""

    method: Method
    epochs: int
    folder: Path | None
    overwrite: bool
    resume: Path | str | None
    config: dict[str, Any] | None
    judging: Any  # the attack that it is validated by
    group: Group
    network: Any
    average: Average | None
    step: Step
    rates: Rates
    watch: Watch | None
    checkpoints: CheckpointManager | None
    loader: ResumableLoader  # since `fit` has begun

    def _reset(self) -> None:
        """As before a run."""
        self.position, self.losses, self.history = Position(), LossTracker(self.group), list[EpochReport]()
        self.spent = Spent()
        self.best: EpochReport | None = None
        self.steps_per_epoch = 0  # of the epoch in progress
        self.generators: dict[str, Any] | None = None  # where they stood when `fit` ended
        self.rollbacks: list[dict[str, Any]] = []  # the epoch, alarms and remedy of each
        self.stopped_by: Alarm | None = None
        self._good: dict[str, Any] | None = None  # what `state_dict` said where all was well
        self.owed: bool | None = None  # a checkpoint that could not be written, and whether it is the best
        self.begun = self.fitting = False

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the trainer was made with, by name."""

    @property
    def evaluated(self) -> nn.Module:
        """The network that validation looks at: the average of the weights where there is one."""
        network: nn.Module = self.network if self.average is None else self.average.module
        return network

    def modules(self) -> list[nn.Module]:
        """All that a step reads or writes: held at once, so that no two threads wait for each other."""
        others = [getattr(attack, "model", None) for attack in self.step.attacks]
        models = (self.network, None if self.average is None else self.average.module, *others)
        return [module for model in models if isinstance(model, nn.Module) for module in model.modules()]

    @abstractmethod
    def _check_batch(self, x: Tensor, y: Tensor | None) -> None:
        """Raises InputError unless batches like this one can be trained on."""

    @abstractmethod
    def _follow_what_was_found(self) -> None:
        """Step and average as the model is."""

    def note(self, message: str) -> None:
        """Says what the user may want to know."""
        if self.group.leads:
            print(f"afd: {message}", file=sys.stderr)

    def warn(self, message: str) -> None:
        """Says what the user should know, once."""
        self.note(f"warning: {message}")

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The folder for this trainer alone, and free for it; all processes raise together."""
        with ExitStack() as stack:
            with self.group.together():
                if self.checkpoints is not None and self.group.leads:
                    stack.enter_context(self.checkpoints.lock.held())
                    if self.begun:
                        self.checkpoints.check_untouched()
                    else:
                        self.checkpoints.check_free(self.resume, self.overwrite)
            yield

    def _begin(self, train: Loader, validation: Loader, steps: int) -> dict[str, Any] | None:
        """Opens the loaders where the run begins or goes on; returns the random generators' state there, if any."""
        at, before = self.position.batch, self.steps_per_epoch
        if at and steps != before:
            raise InputError(
                f"train has {steps} {self._counted}, but the epoch in progress has {before}, of which {at} are done; "
                "go on with as many"
            )
        earlier = self.loader if self.begun else None
        classes, self.steps_per_epoch = self.network.num_classes, steps
        self.loader = ResumableLoader(
            train,
            self.group.device,
            classes,
            steps,
            validation,
            earlier,
            labels=self.method.labels,
            taken=self._check_batch,
            repeats=self.method.repeats,
        )
        if not self.begun and self.resume is not None:
            self._resume(steps)
        if self.generators is not None:
            self.loader.at_start, self.loader.serving = self.generators["at_start"], self.generators.get("serving")
        if not self.begun and self.checkpoints is not None:
            content = self._content()
            with self.group.together():
                if self.group.leads:
                    packed(*content)  # what cannot be kept is told now, and not after the first epoch
                    if self.overwrite:
                        self.checkpoints.discard()
                    self.best = self.checkpoints.settle_best(self.history, EpochReport.read)
            self.best = self.group.gather(self.best)[0]
        elif self.owed is not None:
            self.save(best=self.owed)
        self.begun = True
        return None if self.generators is None else self.generators["now"]

    @property
    def _counted(self) -> str:
        """What an epoch is counted in, for messages."""
        return "batches" if self.method.repeats == 1 else f"steps, {self.method.repeats} on each batch"

    def _resume(self, steps: int) -> None:
        """Goes on from the checkpoint that `resume` says, if there is one."""
        assert self.resume is not None
        source = self.checkpoints or CheckpointManager(Path(self.resume).parent, self.warn)
        content = source.load_named(self.resume, self.group.device)
        if content is None:
            self.note(f"there is nothing to go on from in {self.folder}; the run begins anew")
        else:
            self._load({**content[0], "metadata": content[1]}, str(source.newest), steps)
            self.spent.load_state_dict(content[1].get("spent", {}))

    def state_dict(self) -> dict[str, Any]:
        """All that the run is at this moment, for another trainer of the same arguments to go on from.

        Between calls of `fit`, or in a callback::

            torch.save(trainer.state_dict(), "run.pt")

        and later, or elsewhere, to the same weights bit for bit, as if nothing had come between::

            trainer = Trainer(model, method, epochs=90)  # with all settings as they were; epochs may grow
            trainer.load_state_dict(torch.load("run.pt"))
            trainer.fit(train, validation)

        It holds the model, the average of its weights, the method's players, the optimizers, what each process's step
        remembers, the random generators (those of the loaders, too), the position within the epoch, losses and reports;
        "metadata" is plain JSON. Tensors are the trainer's own, as in any state_dict. All processes must ask.
        """
        generators = self._capture_generators() if self.fitting else self.generators
        self.group.share_buffers(self.network)
        with held(self.modules()):
            kept = state_dicts(self.network, self.average, self.step)
        metadata = {
            "method": spelled(self.method),
            "run": facts(self.settings(), self.judging, self.group.size, self.network),
            "config": self.config,
            NETWORK: facts_of(self.network),
            "report": dataclasses.asdict(self.history[-1]) if self.history else None,
            "commit": commit(),
            "position": dataclasses.asdict(self.position),
            "spent": self.spent.state_dict(self.group.device),
            "losses": self.losses.state_dict(),
            "batches": self.steps_per_epoch,
            "history": [dataclasses.asdict(report) for report in self.history],
            "watch": self.watch and self.watch.state_dict(),
            "rollbacks": self.rollbacks,
        }
        # of each process, by rank
        own = self.group.gather((generators, memory_of(self.step, apart=self.group.size > 1)))
        generators_of_all, memories = map(list, zip(*own, strict=True))
        return {**kept, "memory": memories, "generators": generators_of_all, "metadata": metadata}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` said, in this process or another one; `fit` trains what is left of it.

        Raises:
            InputError: `fit` is running, or the trainer is to go on from a checkpoint.
            CheckpointError: another run has said it; the message says what differs.
        """
        if self.fitting or self.resume is not None:
            why = "while fit runs" if self.fitting else f"of a trainer that goes on from resume={str(self.resume)!r}"
            raise InputError(f"load_state_dict was called {why}; call it before fit, of a trainer without resume")
        if "metadata" not in saved:
            raise CheckpointError(f"what is loaded is no state_dict of a Trainer; it holds {', '.join(saved)[:200]}")
        self._load(saved, "the state_dict")
        self.spent.load_state_dict(saved["metadata"].get("spent", {}))
        self.best = max(self.history, key=lambda report: report.rank, default=None)

    def _load(self, saved: Mapping[str, Any], source: str, steps: int | None = None) -> None:
        """Goes on from a state, of an epoch of so many steps, where that is known."""
        metadata = with_new_keys(saved["metadata"])
        here = facts(self.settings(), self.judging, self.group.size, self.network)
        grows = check_same_run(source, saved, metadata, here, self.network)
        batches, done = metadata.get("batches", steps or 0), metadata["position"]["batch"]
        if done and steps not in (None, batches):
            raise CheckpointError(
                f"{source} lies in an epoch of {batches} {self._counted}, of which {done} are done; train has {steps}"
            )
        if grows:
            self.note(
                f"{source} is of a run of {metadata['run']['epochs']} epochs; learning rates follow the schedule of "
                f"{self.epochs} from here on"
            )
        if steps is None and isinstance(self.network, FeatureSplit):  # a look at images may have found other classes
            self.network.num_classes = (metadata.get(NETWORK) or {}).get("num_classes", self.network.num_classes)
            self._follow_what_was_found()
        with held(self.modules()):
            load_state_dicts(source, saved, self.network, self.average, self.step)
            load_memory(self.step, saved["memory"][self.group.rank] if "memory" in saved else {})  # not in earlier ones
        self.position.load_state_dict(metadata["position"])
        self.losses.load_state_dict(metadata["losses"])
        self.history[:] = map(EpochReport.read, metadata["history"])
        self.rollbacks = list(metadata.get("rollbacks", ()))  # not in earlier ones
        if self.watch is not None:
            self.watch.load_state_dict(metadata.get("watch") or {})
        self.step.steps, self.step.epoch = self.position.global_step, self.position.epoch
        self.steps_per_epoch = batches if steps is None else steps
        self.generators = saved["generators"][self.group.rank]

    def _capture_generators(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "at_start": self.loader.at_start if self.position.batch else None,
            "now": self.loader.capture(),
        }
        if self.position.batch % self.method.repeats and self.loader.serving is not None:
            found["serving"] = tuple(None if one is None else one.cpu() for one in self.loader.serving)
        return found

    def save(self, *, best: bool) -> None:
        """Writes the checkpoint of this moment, if there is a folder; all processes must ask."""
        if self.checkpoints is None:
            return
        self.owed = best
        self.check_finite()
        content = self._content()
        with self.group.together():
            if self.group.leads:
                self.checkpoints.save(*content, best=best)
        self.owed = None

    def check_finite(self) -> None:
        """Raises DivergedError unless all weights are; waits for the device."""
        step = self.position.global_step
        if not finite(self.network, self.step.players):
            raise DivergedError(f"a weight stopped being finite by step {step}; {self._where_it_stood(step)}")

    def _content(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """State and metadata of a checkpoint."""
        content = self.state_dict()
        return content, content.pop("metadata")

    def _where_it_stood(self, number: int) -> str:
        """What helps after a step in which something was not finite."""
        shown = ", ".join(f"{name} {rate:g}" for name, rate in self.rates.of_step(number).items())
        good = self.checkpoints and self.checkpoints.newest
        return f"learning rates were {shown}; last good checkpoint: {good or 'none'}"
