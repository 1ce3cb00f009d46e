"""CUDA graphs of whole training steps: attack, passes, losses, backwards and optimizers, launched as one thing.

A graph repeats what was captured with the numbers it had then, so whatever changes from step to step lies on the
device, at a fixed place: the batch, the seed of the attack's starts, its radius while that grows, the learning rates
(`make_recordable`). What changes rarely makes another capture: the shape of a last, shorter batch, the steps in which
the features do not answer, weights, optimizer state or what a step remembers (`Step.memory`) that have moved in memory,
and other flags of torch, hooks, modes and plain attributes of the modules (`afd.python_state`). A module whose own code
changes such an attribute, a counter, say, is not captured; a tensor that it replaces by one like it stays where it is.

What is NOT seen, and stays as it was captured: whatever else Python code reads, such as a number in a closure, a global
or a class, a draw from Python's or NumPy's generator, the time; and what it writes or prints. (An attack that is
captured by itself compares its logits at every call; here nothing is compared.)

`afd.graphs.GraphCache` says when a kind of step is captured. A capture computes nothing, so where it fails, what it has
left in the modules' attributes is put back, and steps run eagerly. Averages of losses and weights, and schedules, stay
outside of the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks.base import GradientAttack
from afd.errors import warn_caller
from afd.graphs import CaptureWarning, Graph, GraphCache, NotCapturableError
from afd.methods import Execution, Step
from afd.methods.optimizers import RECORDABLE, being_recorded, make_recordable
from afd.python_state import State, changed, flags, in_place, key_of, named, places, snapshot, state_of

USER = "steps run"  # without a graph, in messages
Losses = dict[str, Tensor]
Inputs = dict[str, Any]  # tensors of a step, by the names of its arguments; those that are None are left out


def recorded(
    model: nn.Module, step: Step, device: torch.device, processes: int, execution: Execution
) -> Step | GraphedStep:
    """A training step by CUDA graphs, if that was asked for and can be, else as it is, one launch after the other.

    Args:
        model: that is trained.
        step: that trains it.
        device: of both.
        processes: that train together.
        execution: says whether graphs are asked for.

    Warns:
        CaptureWarning: they are and cannot be; the message says why.
    """
    if not execution.graph:
        return step
    reason = obstacle(device, processes, step)
    if reason is None:
        return GraphedStep(model, step, device)
    warn_caller(f"{USER} without a CUDA graph, because {reason}", CaptureWarning)
    return step


def obstacle(device: torch.device, processes: int, step: Step) -> str | None:
    """Why steps cannot be captured, or None if nothing is known to speak against it."""
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
            return f"the optimizer {name!r} is a {type(optimizer).__name__}; those that can be captured are {allowed}"
    return None


@dataclass(frozen=True)
class CapturedStep:
    """A training step as a graph, with the tensors that it reads and writes."""

    graph: Graph
    inputs: Inputs
    seed: Tensor
    names: tuple[str, ...]
    losses: Tensor
    kept: tuple[object, ...]  # whose memory the graph uses

    @classmethod
    def of(cls, step: Step, inputs: Inputs, device: torch.device, *modules: nn.Module) -> CapturedStep:
        """Captures a step that trains the modules, on batches like `inputs`, and any seed."""
        inputs = {name: one.clone() for name, one in inputs.items()}
        seed = torch.zeros((), dtype=torch.int64, device=device)
        graph = Graph(device)
        with graph.capture(), in_place(*modules):
            losses = step(**inputs, seed=seed)
            table = torch.stack(list(losses.values()))
        memory = [attack.memory() for attack in step.attacks if isinstance(attack, GradientAttack)]
        return cls(graph, inputs, seed, tuple(losses), table, (step, memory, list(step.memory.values())))

    def run(self, inputs: Inputs, seed: int) -> Losses:
        """Replays the step on another batch."""
        with self.graph.turn():
            for name, one in inputs.items():
                self.inputs[name].copy_(one)
            self.seed.fill_(seed)
            self.graph.replay()
            losses = self.losses.clone()
        return dict(zip(self.names, losses.unbind(), strict=True))


class GraphedStep:
    """A training step by CUDA graphs: captured for each kind of step, and replayed.

    Args:
        model: that is trained.
        step: that trains it, and does not wait for the device; its optimizers are made recordable.
        device: of both.

    Attributes:
        cache: of the graphs.
    """

    def __init__(self, model: nn.Module, step: Step, device: torch.device) -> None:
        self.model, self.step, self.device = model, step, device
        self.cache = GraphCache[CapturedStep](USER)
        step.looks = 0  # which would wait for the device
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
            ValueError: `first_sample` is not 0, of several processes, which are not captured.
        """
        if first_sample:
            raise ValueError(f"first_sample is {first_sample}; a captured step has all rows")
        # where whole steps are captured, the attack's own graphs would be in the way
        self.step.attacks.own_graphs = self.cache.refused
        given = {"x": x, "y": y, "index": index, "x_adv": x_adv}
        inputs: Inputs = {name: one for name, one in given.items() if one is not None}
        if self.cache.refused:
            return self.step(**inputs, seed=seed)
        forms = tuple((name, t.shape, t.stride(), t.dtype) for name, t in inputs.items())
        kind = (self.step.kind(), forms, flags())
        self.cache.begin()
        key = self._key(kind)
        known = self.cache.get(key)
        if known is None:
            with in_place(*self._modules):
                losses = self.step(**inputs, seed=seed)
            # a first step builds attacks, makes the optimizers' state and sets the players' modes
            self.cache.met(self._key(kind))
            return losses
        captured = self.cache.captured(known, lambda: self._capture(inputs))
        if captured is None:
            return self.step(**inputs, seed=seed)
        self.step.steps += 1
        return captured.run(inputs, seed)

    def _capture(self, inputs: Inputs) -> CapturedStep:
        """The step on such inputs as a graph; steps, gradients and modules' attributes stay as they were.

        Raises:
            RuntimeError: something in it cannot be captured, or a module would go on from what a replay does not do.
        """
        steps, before, restore = self.step.steps, (self._state(), self._places()), snapshot(*self._modules)
        remembered = dict(self.step.memory)
        try:
            with being_recorded(self.step.optimizers.values()):
                captured = CapturedStep.of(self.step, inputs, self.device, *self._modules)
            if (self._state(), self._places()) != before:
                moved = [named(one) for one in sorted(changed(before[0], self._state()))]
                moved.append("a buffer, an optimizer's state or what the step remembers")
                raise NotCapturableError(f"each changes {moved[0]}, which a graph leaves as it is")
        except RuntimeError:
            restore()
            self.step.memory.clear()
            self.step.memory.update(remembered)
            for optimizer in self.step.optimizers.values():
                optimizer.zero_grad()
            raise
        finally:
            self.step.steps = steps
        return captured

    @property
    def _modules(self) -> tuple[nn.Module, ...]:
        return self.model, *self.step.players.values()

    def _key(self, kind: Hashable) -> Hashable:
        """Of a step of this kind, as modules, attacks and optimizers are now."""
        return kind, self._settings(), self._places(), self._state()

    def _settings(self) -> Hashable:
        """Numbers that a graph bakes in: all that method, attack and optimizers hold but what is on the device."""
        groups = [group for optimizer in self.step.optimizers.values() for group in optimizer.param_groups]
        others = [{name: value for name, value in group.items() if name not in {"lr", "params"}} for group in groups]
        # of several, in no order: which was used last, is no matter
        attacks = {tuple(attack.settings()) for attack in self.step.attacks if isinstance(attack, GradientAttack)}
        return frozenset(attacks), key_of(others), _told(self.step.method)

    def _state(self) -> State:
        """What the modules hold in Python, and where their tensors lie."""
        return state_of(*self._modules, tensors=True)

    def _places(self) -> tuple[int, ...]:
        """Where weights, buffers, the parts of the optimizers' state and what the step remembers lie in memory."""
        return *places(*self._modules), *(tensor.data_ptr() for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.step.memory.values()
        for optimizer in self.step.optimizers.values():
            yield from (group["lr"] for group in optimizer.param_groups)
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _told(settings: Any) -> Hashable:
    """A method's settings, and those within them: values, and the places of tensors and of other objects."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        fields = dataclasses.fields(settings)
        return type(settings), tuple(_told(getattr(settings, one.name)) for one in fields)
    if isinstance(settings, Tensor):
        return settings.data_ptr(), settings.shape
    return settings if isinstance(settings, bool | int | float | str | tuple | None) else id(settings)
