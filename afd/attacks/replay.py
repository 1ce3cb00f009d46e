"""CUDA graphs: all steps of an attack recorded once and replayed, so that the host launches one thing, not thousands.

A recording reads the model's weights where they lie, so they may change between replays; weights that move elsewhere
(`model.to`, a new tensor in their place) make a new recording, and so does another flag of torch, another hook, mode or
plain attribute of a module (`afd.attacks.python_state`). What cannot be seen there, a number in a closure, say, is
found by its effect: each replay is followed by one forward of the model as it is now, from the same start, and a
recording that gave other logits is dropped. (So what changes nothing but the gradient is not found.) A model whose
logits differ time and again, for it draws at random, is recorded no more.

A shape is recorded when it is met for the second time: its first run, made step by step, lets libraries choose their
algorithms, and a last, shorter batch costs nothing. What the host checks in a step, a replay does not: a label larger
than any before is met step by step, once more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks.capture import CaptureWarning, Graph, Later, recordable
from afd.attacks.piece import Piece
from afd.attacks.python_state import State, changed, flags, places, snapshot, state_of
from afd.errors import warn_caller

Climb = Callable[[Piece, Tensor], tuple[Tensor, ...]]
Logits = Callable[[Tensor], Tensor]
KEPT, REMEMBERED = 4, 64  # recordings, each with memory of its own; and kinds of climbs that were met
MOST_DROPS = 2  # in a row, after which no more recordings are made


@dataclass(frozen=True)
class Recording:
    """A captured graph with the tensors it reads and writes."""

    graph: Graph
    piece: Piece
    x_adv: Tensor
    outputs: tuple[Tensor, ...]
    kept: object

    @classmethod
    def of(cls, climb: Climb, model: nn.Module, piece: Piece, x_adv: Tensor, memory: Callable[[], object]) -> Recording:
        """Captures `climb`, which runs the model, on copies of its arguments; `memory()` is kept as long."""
        piece = piece.cloned()
        x_adv, graph, restore = x_adv.clone(), Graph(x_adv.device), snapshot(model)
        try:
            with graph.capture():
                outputs = climb(piece, x_adv)
        finally:
            restore()  # a capture computes nothing: what a model keeps of it would be memory that nobody has written
        return cls(graph, piece, x_adv, outputs, memory())

    def play(self, piece: Piece, x_adv: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Runs the graph on other arguments of the same shapes; its outputs, and the model's at x_adv if any."""
        with self.graph.turn():
            for held, given in zip(_inputs(self.piece, self.x_adv), _inputs(piece, x_adv), strict=True):
                held.copy_(given)
            self.graph.replay()
            if piece.trace is not None and self.piece.trace is not None:
                piece.trace.copy_(self.piece.trace)
            return tuple(map(torch.clone, self.outputs)), list(map(torch.clone, self.piece.first_outputs))


@dataclass
class Known:
    """What is known of a climb on inputs of one form: the largest label that it took, and its graph, once recorded."""

    largest_label: int
    recording: Recording | None = None


class Replays:
    """The recordings of one attack, most recent last.

    Attributes:
        refused: whether no more recordings are made.
        paused: whether recordings are neither made nor replayed, for now.
    """

    def __init__(self) -> None:
        self.refused = self.paused = False
        self._known: OrderedDict[Hashable, Known] = OrderedDict()
        self._moved_by_running: set[tuple[str, str]] = set()  # attributes: no reason for another recording
        self._compared: list[tuple[Hashable, Later]] = []
        self._drops_in_a_row = 0
        self._state: State | None = None
        self._used: set[Hashable] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of the attack: they begin anew."""
        return Replays, ()

    def begin(self) -> None:
        """A call of the attack begins: the model is asked for its state once in it, however many climbs follow."""
        self._state, self._used = None, set()

    def __call__(
        self,
        name: Hashable,
        model: nn.Module,
        climb: Climb,
        piece: Piece,
        x_adv: Tensor,
        logits: Logits,
        tolerance: float,
        memory: Callable[[], object],
    ) -> tuple[Tensor, ...]:
        """climb(piece, x_adv), which may overwrite x_adv; on CUDA replayed once it has been recorded.

        Args:
            name: of the climb and of every setting it holds.
            model: that it runs.
            climb: the steps, without host synchronisation.
            piece: what it attacks; rows that are indices, which differ from call to call, are not recorded.
            x_adv: where to start, like piece.x.
            logits: of the model at a start (or its features), by the model's own code as it is now.
            tolerance: by how much they may differ from a replay's, as a share of a sample's largest, before it is
                dropped.
            memory: what else the climb writes to.
        """
        if self.refused or self.paused or not recordable(x_adv) or not isinstance(piece.rows, slice):
            return climb(piece, x_adv)
        state = self._state = self._state or state_of(model)
        forms = tuple((t.shape, t.stride(), t.dtype, t.device) for t in _inputs(piece, x_adv))
        given = tuple(one is None for one in (piece.y, piece.aim, piece.trace))
        fixed = (name, flags(), places(model), piece.rows.start, piece.rows.stop, forms, given)
        key = (fixed, self._lasting(state))
        known = self._known.get(key)
        if known is None or piece.largest_label > known.largest_label:
            outcome = climb(piece, x_adv)  # raises if the model has no such class
            self._state = state_of(model)
            self._moved_by_running |= changed(state, self._state)
            self._know((fixed, self._lasting(state)), piece.largest_label)
            return outcome
        self._known.move_to_end(key)
        if known.recording is None:
            if (
                self._in_use() >= KEPT
            ):  # one more would drive out what this very call has replayed, and so on in the next
                return climb(piece, x_adv)
            try:
                known.recording = Recording.of(climb, model, piece, x_adv, memory)
            except RuntimeError as error:  # raised inside the capture: the step-by-step run before it went well
                self._refuse(f"recording one failed: {error}")
                return climb(piece, x_adv)
            forget(self._known, lambda known: known.recording is not None)
        self._used.add(key)
        outcome, recorded = known.recording.play(piece, x_adv)
        self._compared += [(key, Later(differ(one, logits(x_adv), tolerance))) for one in recorded]
        return outcome

    def outdated(self, *, wait: bool) -> bool:
        """Whether a replay gave other logits than the model as it was then: its recording is dropped.

        Args:
            wait: for the device, where it has not compared them yet; else those are left for the next time.
        """
        found: dict[Hashable, bool] = {}
        waiting = []
        for key, differs in self._compared:
            if wait or differs.there:
                found[key] = differs.read() or found.get(key, False)
            else:
                waiting.append((key, differs))
        self._compared = waiting
        for key in [key for key, differs in found.items() if differs]:
            self._known.pop(key, None)
        if any(found.values()):
            self._drops_in_a_row += 1
        elif found:
            self._drops_in_a_row = 0
        if self._drops_in_a_row >= MOST_DROPS and not self.refused:
            self._refuse(
                "the model's logits are not those of its recording, time and again: it draws at random, or depends on "
                "something that changes outside of it"
            )
        return any(found.values())

    def _in_use(self) -> int:
        """How many recordings this call has replayed."""
        return sum(known.recording is not None for key, known in self._known.items() if key in self._used)

    def _lasting(self, state: State) -> Hashable:
        return frozenset((name, value) for name, value in state if name not in self._moved_by_running)

    def _know(self, key: Hashable, largest_label: int) -> None:
        self._known.setdefault(key, Known(largest_label)).largest_label = largest_label
        self._known.move_to_end(key)
        forget(self._known, lambda known: known.recording is not None)

    def _refuse(self, reason: str) -> None:
        self.refused = True
        self._known.clear()
        warn_caller(f"the attack runs without a CUDA graph, because {reason}", CaptureWarning)


def forget(known: OrderedDict[Hashable, Any], recorded: Callable[[Any], bool]) -> None:
    """Lets go of what was used longest ago: of recordings, which have memory of their own, and of all that is known."""
    held = [key for key, one in known.items() if recorded(one)]
    for key in held[: max(0, len(held) - KEPT)]:
        del known[key]
    while len(known) > REMEMBERED:
        known.popitem(last=False)


@torch.no_grad()
def differ(logits: Tensor, other: Tensor, tolerance: float) -> Tensor:
    """Whether logits [N, K] differ from others by more than a share of a sample's largest: a bool [] on their device.

    NaN is like NaN only.
    """
    if logits.shape != other.shape:
        return torch.ones((), dtype=torch.bool, device=logits.device)
    gap, largest = (logits.double() - other).abs(), logits.double().nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
    return ((gap > tolerance * largest) | (logits.isnan() != other.isnan())).any()


def _inputs(piece: Piece, x_adv: Tensor) -> tuple[Tensor, ...]:
    return *piece.tensors(), x_adv
