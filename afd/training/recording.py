"""A whole round as one CUDA graph: attack, passes, losses, backwards and optimizer steps, launched as one thing.

A graph repeats what it recorded with the numbers it recorded, so whatever changes from round to round lies on the
device, at a fixed place: the batch, the seed of the attack's starts, the learning rates (`make_recordable`). What
changes rarely makes another recording: the shape of a last, shorter batch, the attack's radius while it grows, the
rounds in which the features do not answer, weights or optimizer state that have moved in memory, and other flags of
torch, hooks, modes and plain attributes of the modules (`afd.attacks.python_state`). A module whose own code changes
such an attribute, a counter, say, is not recorded; a tensor that it replaces by one like it stays where it is.

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
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afd.attacks import Attack, CaptureWarning
from afd.attacks.base import GradientAttack
from afd.attacks.capture import Graph
from afd.attacks.python_state import State, changed, flags, in_place, key_of, named, places, snapshot, state_of
from afd.attacks.replay import forget
from afd.errors import warn_caller
from afd.methods import Round
from afd.methods.optimizers import RECORDABLE, being_recorded, make_recordable

if TYPE_CHECKING:
    from afd.training.trainer import Trainer

Losses = dict[str, Tensor]
Play = Callable[[Tensor, Tensor, Any], Losses]  # (images, labels, seed): attack and step
Plays = Callable[[Play, Attack | None, Tensor, Tensor, int], Losses]  # `Recordings.__call__`


def plays(trainer: Trainer, attack: Attack | None) -> Plays:
    """How a trainer's rounds are played: recorded, if that was asked for and can be, else one launch after the other.

    Warns:
        CaptureWarning: it was asked for and cannot be; the message says why.
    """
    if not trainer.execution.graph:
        return as_ever
    reason = obstacle(trainer.device, trainer.group.size, attack, trainer.round)
    if reason is None:
        return Recordings(trainer.network, trainer.round, trainer.device)
    warn(reason)
    return as_ever


def as_ever(play: Play, _attack: Attack | None, x: Tensor, y: Tensor, seed: int) -> Losses:
    """play(x, y, seed)."""
    return play(x, y, seed)


def obstacle(device: torch.device, processes: int, attack: Attack | None, round_: Round) -> str | None:
    """Why rounds cannot be recorded, or None if nothing is known to speak against it."""
    if device.type != "cuda":
        return f"the model is on {device}, and graphs are CUDA's"
    if processes > 1:
        return f"{processes} processes average their gradients in them"
    if attack is not None and not isinstance(attack, GradientAttack):
        return f"the attack is a {type(attack).__name__}, none of those in afd.attacks"
    for name, optimizer in round_.optimizers.items():
        if type(optimizer) not in RECORDABLE:
            allowed = ", ".join(kind.__name__ for kind in RECORDABLE)
            return f"the optimizer {name!r} is a {type(optimizer).__name__}; those that can be recorded are {allowed}"
    return None


@dataclass(frozen=True)
class Recording:
    """A recorded round with the tensors that it reads and writes."""

    graph: Graph
    x: Tensor
    y: Tensor
    seed: Tensor
    names: tuple[str, ...]
    losses: Tensor
    kept: tuple[object, ...]  # whose memory the graph uses

    @classmethod
    def of(cls, play: Play, attack: Attack | None, x: Tensor, y: Tensor, *modules: nn.Module) -> Recording:
        """Records `play`, which trains the modules on what `attack` makes, on batches like x and y, and any seed."""
        x, y, seed = x.clone(), y.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
        graph = Graph(x.device)
        with graph.capture(), in_place(*modules):
            losses = play(x, y, seed)
            table = torch.stack(list(losses.values()))
        memory = attack.memory() if isinstance(attack, GradientAttack) else ()
        return cls(graph, x, y, seed, tuple(losses), table, (play, memory))

    def play(self, x: Tensor, y: Tensor, seed: int) -> Losses:
        """The round on another batch."""
        with self.graph.turn():
            self.x.copy_(x)
            self.y.copy_(y)
            self.seed.fill_(seed)
            self.graph.replay()
            losses = self.losses.clone()
        return dict(zip(self.names, losses.unbind(), strict=True))


class Recordings:
    """The recordings of one run, those used last kept.

    Args:
        model: that is trained.
        round_: that trains it; its optimizers are made recordable.
        device: of both.
    """

    def __init__(self, model: nn.Module, round_: Round, device: torch.device) -> None:
        self.model, self.round, self.refused = model, round_, False
        self._known: OrderedDict[Hashable, Recording | None] = OrderedDict()
        for optimizer in round_.optimizers.values():
            make_recordable(optimizer, device)

    def __call__(self, play: Play, attack: Attack | None, x: Tensor, y: Tensor, seed: int) -> Losses:
        """play(x, y, seed), by a replay where this kind of round has been met before.

        Args:
            play: the round, which does not wait for the device; the same at every call but for the attack's settings.
            attack: that it makes, if any.
            x: images.
            y: labels.
            seed: of the attack's starts.
        """
        if isinstance(attack, GradientAttack):
            attack.own_graphs = self.refused  # where rounds are recorded, theirs would be in the way
        if self.refused:
            return play(x, y, seed)
        forms = tuple((t.shape, t.stride(), t.dtype) for t in (x, y))
        kind = (self._settings(attack), self.round.course(), forms, flags())
        key = (kind, self._places(), self._state())
        if key not in self._known:
            with in_place(*self._modules):
                losses = play(x, y, seed)
            # looked up again: a first step makes the optimizers' state and puts the players into their modes
            self._known[kind, self._places(), self._state()] = None
            forget(self._known, lambda recording: recording is not None)
            return losses
        self._known.move_to_end(key)
        recording = self._known[key]
        if recording is not None:
            self.round.rounds += 1
            return recording.play(x, y, seed)
        recording = self._record(play, attack, x, y)
        if recording is not None:
            self._known[key] = recording
            forget(self._known, lambda recording: recording is not None)
        return play(x, y, seed) if recording is None else recording.play(x, y, seed)

    def _record(self, play: Play, attack: Attack | None, x: Tensor, y: Tensor) -> Recording | None:
        played, before, restore = self.round.rounds, (self._state(), self._places()), snapshot(*self._modules)
        try:
            with being_recorded(self.round.optimizers.values()):
                recording = Recording.of(play, attack, x, y, *self._modules)
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
        self.round.rounds, self.refused = played, True
        for optimizer in self.round.optimizers.values():
            optimizer.zero_grad()
        self._known.clear()
        warn(reason)

    @property
    def _modules(self) -> tuple[nn.Module, ...]:
        return self.model, *self.round.players.values()

    def _settings(self, attack: Attack | None) -> Hashable:
        """Numbers that a graph bakes in: all that attack and optimizers hold but the rates, which are on the device."""
        groups = [group for optimizer in self.round.optimizers.values() for group in optimizer.param_groups]
        others = [{name: value for name, value in group.items() if name not in {"lr", "params"}} for group in groups]
        return tuple(attack.settings()) if isinstance(attack, GradientAttack) else None, key_of(others)

    def _state(self) -> State:
        """What the modules hold in Python, and where their tensors lie."""
        return state_of(*self._modules, tensors=True)

    def _places(self) -> tuple[int, ...]:
        """Where weights, buffers and the parts of the optimizers' state lie in memory."""
        return *places(*self._modules), *(tensor.data_ptr() for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for optimizer in self.round.optimizers.values():
            yield from (group["lr"] for group in optimizer.param_groups)
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def warn(reason: str) -> None:
    """Says, once a run, why its rounds are played without a graph."""
    warn_caller(f"rounds are played without a CUDA graph, because {reason}", CaptureWarning)
