"""CUDA graphs: all steps of an attack recorded once and replayed, so that the host launches one thing, not thousands.

A recording reads the model's weights where they lie, so they may change between replays; weights that move elsewhere
(`model.to`, a new tensor in their place) make a new recording. A shape is recorded when it is met for the second time:
its first run, made step by step, lets libraries choose their algorithms, and a last, shorter batch costs nothing. What
the host checks in a step, a replay does not: a label larger than any before is met step by step, once more.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from afd.attacks.capture import CaptureWarning, capturing, under_way
from afd.attacks.piece import Piece

Climb = Callable[[Piece, Tensor], tuple[Tensor, ...]]
KEPT = 4  # recordings, each with memory of its own


@dataclass(frozen=True)
class Recording:
    """A captured graph with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    piece: Piece
    x_adv: Tensor
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, climb: Climb, piece: Piece, x_adv: Tensor) -> Recording:
        """Captures `climb` on copies of its arguments."""
        piece = replace(piece, x=piece.x.clone(), y=piece.y.clone(), aim=piece.aim.clone(), trace=piece.trace.clone())
        x_adv, graph = x_adv.clone(), torch.cuda.CUDAGraph()
        with capturing(graph):
            outputs = climb(piece, x_adv)
        return cls(graph, piece, x_adv, outputs)

    def play(self, piece: Piece, x_adv: Tensor) -> tuple[Tensor, ...]:
        """Runs the graph on other arguments of the same shapes."""
        for held, given in zip(_inputs(self.piece, self.x_adv), _inputs(piece, x_adv), strict=True):
            held.copy_(given)
        self.graph.replay()
        piece.trace.copy_(self.piece.trace)
        return tuple(output.clone() for output in self.outputs)


@dataclass
class Known:
    """What is known of a climb on inputs of one form: the largest label that it took, and its graph, once recorded."""

    largest_label: int
    recording: Recording | None = None


class Replays:
    """The recordings of one attack, most recent last."""

    def __init__(self) -> None:
        self.refused = False
        self._known: OrderedDict[Hashable, Known] = OrderedDict()

    def __call__(
        self, name: Hashable, model: nn.Module, climb: Climb, piece: Piece, x_adv: Tensor
    ) -> tuple[Tensor, ...]:
        """climb(piece, x_adv), which may overwrite x_adv; on CUDA replayed once it has been recorded.

        Args:
            name: of the climb and of every setting it holds.
            model: that it runs.
            climb: the steps, without host synchronisation.
            piece: what it attacks; rows that are indices, which differ from call to call, are not recorded.
            x_adv: where to start, like piece.x.
        """
        if self.refused or not x_adv.is_cuda or under_way() or not isinstance(piece.rows, slice):
            return climb(piece, x_adv)
        forms = ((t.shape, t.stride(), t.dtype) for t in _inputs(piece, x_adv))
        key = (name, _where(model), piece.rows.start, piece.rows.stop, *forms)
        known = self._known.get(key)
        if known is None or piece.largest_label > known.largest_label:
            outcome = climb(piece, x_adv)  # raises if the model has no such class
            self._know(key, piece.largest_label)
            return outcome
        self._known.move_to_end(key)
        if known.recording is None:
            try:
                known.recording = Recording.of(climb, piece, x_adv)
            except RuntimeError as error:  # raised inside the capture: the step-by-step run before it went well
                self.refused = True
                warnings.warn(
                    f"the attack runs without a CUDA graph, because recording one failed: {error}",
                    CaptureWarning,
                    stacklevel=2,
                )
                return climb(piece, x_adv)
        return known.recording.play(piece, x_adv)

    def _know(self, key: Hashable, largest_label: int) -> None:
        self._known.setdefault(key, Known(largest_label)).largest_label = largest_label
        self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)


def _inputs(piece: Piece, x_adv: Tensor) -> tuple[Tensor, ...]:
    return piece.x, piece.y, piece.aim, piece.trace, x_adv


def _where(model: nn.Module) -> int:
    """Changes when a weight or buffer moves in memory."""
    return hash(tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())))
