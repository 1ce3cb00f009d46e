"""A whole round as one CUDA graph: attack, passes, losses, backwards and optimizer steps, launched as one thing.

A graph repeats what it recorded with the numbers it recorded, so whatever changes from round to round lies on the
device, at a fixed place: the batch, the seed of the attack's starts, its radius while that grows, the learning rates
(`make_recordable`). What changes rarely makes another recording: the shape of a last, shorter batch, the rounds in
which the features do not answer, weights or optimizer state that have moved in memory, and other flags of torch, hooks,
modes and plain attributes of the modules (`afd.attacks.python_state`). A module whose own code changes such an
attribute, a counter, say, is not recorded; a tensor that it replaces by one like it stays where it is.

What is NOT seen, and stays as it was recorded: whatever else Python code reads, such as a number in a closure, a global
or a class, a draw from Python's or NumPy's generator, the time; and what it writes or prints. (An attack that is
recorded by itself compares its logits at every call; here nothing is compared.)

A kind of round is recorded when it is met for the second time: its first one, played as ever, lets libraries choose
their algorithms and optimizers make their state. Recording computes nothing, so where it fails, what it has left in the
modules' attributes is put back, and the rounds are played as ever. Meter, schedule and average of the weights stay
outside of the graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afd.attacks import CaptureWarning
from afd.attacks.base import GradientAttack
from afd.attacks.capture import Graph
from afd.attacks.python_state import State, changed, flags, in_place, key_of, named, places, snapshot, state_of
from afd.attacks.replay import forget
from afd.errors import warn_caller
from afd.methods import Step
from afd.methods.optimizers import RECORDABLE, being_recorded, make_recordable

if TYPE_CHECKING:
    from afd.training.trainer import Trainer

Losses = dict[str, Tensor]
Inputs = dict[str, Any]  # tensors of a step, by the names of its arguments; those that are None are left out


def recorded(trainer: Trainer) -> Step | Recordings:
    """A trainer's step, recorded if that was asked for and can be, else as it is, one launch after the other.

    Warns:
        CaptureWarning: it was asked for and cannot be; the message says why.
    """
    if not trainer.execution.graph:
        return trainer.step
    reason = obstacle(trainer.device, trainer.group.size, trainer.step)
    if reason is None:
        return Recordings(trainer.network, trainer.step, trainer.device)
    warn(reason)
    return trainer.step


def obstacle(device: torch.device, processes: int, step: Step) -> str | None:
    """Why steps cannot be recorded, or None if nothing is known to speak against it."""
    if device.type != "cuda":
        return f"the model is on {device}, and graphs are CUDA's"
    if processes > 1:
        return f"{processes} processes average their gradients in them"
    attack = None if step.method.attack is None else step.attacks.of(step.method.attack)
    if attack is not None and not isinstance(attack, GradientAttack):
        return f"the attack is a {type(attack).__name__}, none of those in afd.attacks"
    for name, optimizer in step.optimizers.items():
        if type(optimizer) not in RECORDABLE:
            allowed = ", ".join(kind.__name__ for kind in RECORDABLE)
            return f"the optimizer {name!r} is a {type(optimizer).__name__}; those that can be recorded are {allowed}"
    return None


@dataclass(frozen=True)
class Recording:
    """A recorded step with the tensors that it reads and writes."""

    graph: Graph
    inputs: Inputs
    seed: Tensor
    names: tuple[str, ...]
    losses: Tensor
    kept: tuple[object, ...]  # whose memory the graph uses

    @classmethod
    def of(cls, step: Step, inputs: Inputs, device: torch.device, *modules: nn.Module) -> Recording:
        """Records a step that trains the modules, on batches like `inputs`, and any seed."""
        inputs = {name: one.clone() for name, one in inputs.items()}
        seed = torch.zeros((), dtype=torch.int64, device=device)
        graph = Graph(device)
        with graph.capture(), in_place(*modules):
            losses = step(**inputs, seed=seed)
            table = torch.stack(list(losses.values()))
        memory = [attack.memory() for attack in step.attacks if isinstance(attack, GradientAttack)]
        return cls(graph, inputs, seed, tuple(losses), table, (step, memory))

    def play(self, inputs: Inputs, seed: int) -> Losses:
        """The step on another batch."""
        with self.graph.turn():
            for name, one in inputs.items():
                self.inputs[name].copy_(one)
            self.seed.fill_(seed)
            self.graph.replay()
            losses = self.losses.clone()
        return dict(zip(self.names, losses.unbind(), strict=True))


class Recordings:
    """The recordings of one run, those used last kept.

    Args:
        model: that is trained.
        step: that trains it, and does not wait for the device; its optimizers are made recordable.
        device: of both.
    """

    def __init__(self, model: nn.Module, step: Step, device: torch.device) -> None:
        self.model, self.step, self.device, self.refused = model, step, device, False
        step.looks = 0  # which would wait for the device
        self._known: OrderedDict[Hashable, Recording | None] = OrderedDict()
        for optimizer in step.optimizers.values():
            make_recordable(optimizer, device)

    def __call__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        seed: int = 0,
        first_sample: int = 0,
        x_adv: Tensor | None = None,
    ) -> Losses:
        """As `Step.__call__`, by a replay where this kind of step has been met before.

        Raises:
            ValueError: `first_sample` is not 0, of several processes, which are not recorded.
        """
        if first_sample:
            raise ValueError(f"first_sample is {first_sample}; a recorded step has all rows")
        # where whole steps are recorded, the attack's own graphs would be in the way
        self.step.attacks.own_graphs = self.refused
        given = {"x": x, "y": y, "index": index, "x_adv": x_adv}
        inputs: Inputs = {name: one for name, one in given.items() if one is not None}
        if self.refused:
            return self.step(**inputs, seed=seed)
        forms = tuple((name, t.shape, t.stride(), t.dtype) for name, t in inputs.items())
        kind = (self.step.kind(), forms, flags())
        key = (kind, self._settings(), self._places(), self._state())
        if key not in self._known:
            with in_place(*self._modules):
                losses = self.step(**inputs, seed=seed)
            # looked up again: a first step builds attacks, makes the optimizers' state and sets the players' modes
            self._known[kind, self._settings(), self._places(), self._state()] = None
            forget(self._known, lambda recording: recording is not None)
            return losses
        self._known.move_to_end(key)
        recording = self._known[key]
        if recording is not None:
            self.step.steps += 1
            return recording.play(inputs, seed)
        recording = self._record(inputs)
        if recording is not None:
            self._known[key] = recording
            forget(self._known, lambda recording: recording is not None)
        return self.step(**inputs, seed=seed) if recording is None else recording.play(inputs, seed)

    def _record(self, inputs: Inputs) -> Recording | None:
        played, before, restore = self.step.steps, (self._state(), self._places()), snapshot(*self._modules)
        try:
            with being_recorded(self.step.optimizers.values()):
                recording = Recording.of(self.step, inputs, self.device, *self._modules)
        except RuntimeError as error:  # raised inside the capture: rounds played as ever went well
            restore()
            self._give_up(played, f"recording one failed: {error}")
            return None
        if (self._state(), self._places()) == before:
            return recording
        moved = [named(one) for one in sorted(changed(before[0], self._state()))] or [
            "a buffer or an optimizer's state"
        ]
        restore()
        self._give_up(played, f"each changes {moved[0]}, which a graph leaves as it is")
        return None

    def _give_up(self, played: int, reason: str) -> None:
        self.step.steps, self.refused = played, True
        for optimizer in self.step.optimizers.values():
            optimizer.zero_grad()
        self._known.clear()
        warn(reason)

    @property
    def _modules(self) -> tuple[nn.Module, ...]:
        return self.model, *self.step.players.values()

    def _settings(self) -> Hashable:
        """Numbers that a graph bakes in: all that attack and optimizers hold but the rates, which are on the device."""
        groups = [group for optimizer in self.step.optimizers.values() for group in optimizer.param_groups]
        others = [{name: value for name, value in group.items() if name not in {"lr", "params"}} for group in groups]
        attacks = [tuple(attack.settings()) for attack in self.step.attacks if isinstance(attack, GradientAttack)]
        return tuple(attacks), key_of(others)

    def _state(self) -> State:
        """What the modules hold in Python, and where their tensors lie."""
        return state_of(*self._modules, tensors=True)

    def _places(self) -> tuple[int, ...]:
        """Where weights, buffers and the parts of the optimizers' state lie in memory."""
        return *places(*self._modules), *(tensor.data_ptr() for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for optimizer in self.step.optimizers.values():
            yield from (group["lr"] for group in optimizer.param_groups)
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def warn(reason: str) -> None:
    """Says, once a run, why its rounds are played without a graph."""
    warn_caller(f"rounds are played without a CUDA graph, because {reason}", CaptureWarning)
