"""CUDA graphs of an attack: all its steps captured once and replayed, so that the host launches one thing, not many.

A graph reads the model's weights where they lie, so they may change between replays; weights that move elsewhere
(`model.to`, a new tensor in their place) make another capture, and so does another flag of torch, another hook, mode or
plain attribute of a module (`afd.python_state`). What cannot be seen there, a number in a closure, say, is found by its
effect: each replay is followed by one forward of the model as it is now, from the same start, and a graph that gave
other logits is dropped. (So what changes nothing but the gradient is not found.) A model whose logits differ time and
again, for it draws at random, is captured no more.

`afd.graphs.GraphCache` says when a shape is captured. What the host checks in a step, a replay does not: a label larger
than any before is met eagerly, once more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks.inputs import Chunk
from afd.graphs import Graph, GraphCache, Later, capturable
from afd.python_state import State, changed, flags, places, snapshot, state_of

StepsFn = Callable[[Chunk, Tensor], tuple[Tensor, ...]]
Logits = Callable[[Tensor], Tensor]
MOST_DROPS = 2  # in a row, after which nothing more is captured


@dataclass(frozen=True)
class CapturedSteps:
    """An attack's steps as a graph, with the tensors that it reads and writes."""

    graph: Graph
    chunk: Chunk
    x_adv: Tensor
    outputs: tuple[Tensor, ...]
    kept: object  # whose memory the graph uses

    @classmethod
    def of(
        cls, steps_fn: StepsFn, model: nn.Module, chunk: Chunk, x_adv: Tensor, memory: Callable[[], object]
    ) -> CapturedSteps:
        """Captures `steps_fn`, which runs the model, on copies of its arguments; `memory()` is kept as long."""
        chunk = chunk.cloned()
        x_adv, graph, restore = x_adv.clone(), Graph(x_adv.device), snapshot(model)
        try:
            with graph.capture():
                outputs = steps_fn(chunk, x_adv)
        finally:
            restore()  # a capture computes nothing: what a model keeps of it would be memory that nobody has written
        return cls(graph, chunk, x_adv, outputs, memory())

    def run(self, chunk: Chunk, x_adv: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Replays on other arguments of the same shapes; the outputs, and the model's at x_adv if any."""
        with self.graph.turn():
            for held, given in zip(_inputs(self.chunk, self.x_adv), _inputs(chunk, x_adv), strict=True):
                held.copy_(given)
            self.graph.replay()
            if chunk.counters is not None and self.chunk.counters is not None:
                chunk.counters.copy_(self.chunk.counters)
            return tuple(map(torch.clone, self.outputs)), list(map(torch.clone, self.chunk.first_outputs))


class AttackGraphs:
    """The graphs of one attack, each compared with the model after it was replayed.

    Attributes:
        cache: of the graphs.
        paused: whether graphs are neither captured nor replayed, for now.
    """

    def __init__(self) -> None:
        self.cache, self.paused = GraphCache[CapturedSteps]("the attack runs"), False
        self._moved_by_running: set[tuple[str, str]] = set()  # attributes: no reason for another capture
        self._compared: list[tuple[Hashable, Later]] = []
        self._drops_in_a_row = 0
        self._state: State | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of the attack: they begin anew."""
        return AttackGraphs, ()

    def begin(self) -> None:
        """A call of the attack begins: the model is asked for its state once in it, however many steps follow."""
        self._state = None
        self.cache.begin()

    def __call__(
        self,
        name: Hashable,
        model: nn.Module,
        steps_fn: StepsFn,
        chunk: Chunk,
        x_adv: Tensor,
        logits: Logits,
        tolerance: float,
        memory: Callable[[], object],
    ) -> tuple[Tensor, ...]:
        """steps_fn(chunk, x_adv), which may overwrite x_adv; on CUDA replayed once it has been captured.

        Args:
            name: of the steps_fn and of every setting it holds.
            model: that it runs.
            steps_fn: the steps, without host synchronisation.
            chunk: what it attacks; rows that are indices, which differ from call to call, are not captured.
            x_adv: where to start, like chunk.x.
            logits: of the model at a start (or its features), by the model's own code as it is now.
            tolerance: by how much they may differ from a replay's, as a share of a sample's largest, before it is
                dropped.
            memory: what else the steps_fn writes to.
        """
        cache = self.cache
        if cache.refused or self.paused or not capturable(x_adv) or not isinstance(chunk.rows, slice):
            return steps_fn(chunk, x_adv)
        state = self._state = self._state or state_of(model)
        forms = tuple((t.shape, t.stride(), t.dtype, t.device) for t in _inputs(chunk, x_adv))
        given = tuple(one is None for one in (chunk.y, chunk.loss_target, chunk.counters))
        fixed = (name, flags(), places(model), chunk.rows.start, chunk.rows.stop, forms, given)
        key = (fixed, self._lasting(state))
        known = cache.get(key)
        if known is None or chunk.largest_label > known.note:
            outcome = steps_fn(chunk, x_adv)  # raises if the model has no such class
            self._state = state_of(model)
            self._moved_by_running |= changed(state, self._state)
            cache.met((fixed, self._lasting(self._state)), note=chunk.largest_label)
            return outcome
        captured = cache.captured(known, lambda: CapturedSteps.of(steps_fn, model, chunk, x_adv, memory))
        if captured is None:
            return steps_fn(chunk, x_adv)
        outcome, first = captured.run(chunk, x_adv)
        self._compared += [(key, Later(differ(one, logits(x_adv), tolerance))) for one in first]
        return outcome

    def outdated(self, *, wait: bool) -> bool:
        """Whether a replay gave other logits than the model as it was then: its graph is dropped.

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
            self.cache.drop(key)
        if any(found.values()):
            self._drops_in_a_row += 1
        elif found:
            self._drops_in_a_row = 0
        if self._drops_in_a_row >= MOST_DROPS and not self.cache.refused:
            self.cache.refuse(
                "the model's logits are not those of its replay, time and again: it draws at random, or depends on "
                "something that changes outside of it"
            )
        return any(found.values())

    def _lasting(self, state: State) -> Hashable:
        return frozenset((name, value) for name, value in state if name not in self._moved_by_running)


@torch.no_grad()
def differ(logits: Tensor, other: Tensor, tolerance: float) -> Tensor:
    """Whether logits [N, K] differ from others by more than a share of a sample's largest: a bool [] on their device.

    NaN is like NaN only.
    """
    if logits.shape != other.shape:
        return torch.ones((), dtype=torch.bool, device=logits.device)
    gap, largest = (logits.double() - other).abs(), logits.double().nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
    return ((gap > tolerance * largest) | (logits.isnan() != other.isnan())).any()


def _inputs(chunk: Chunk, x_adv: Tensor) -> tuple[Tensor, ...]:
    return *chunk.tensors(), x_adv
