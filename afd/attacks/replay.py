"""CUDA graphs: all steps of an attack recorded once and replayed, so that the host launches one thing, not thousands.

A recording reads the model's weights where they lie, so they may change between replays; weights that move elsewhere
(`model.to`, a new tensor in their place) make a new recording. A shape is recorded when it is met for the second time:
its first run, made step by step, lets libraries choose their algorithms, and a last, shorter batch costs nothing.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from afd.attacks.piece import Piece

Climb = Callable[[Piece, Tensor], tuple[Tensor, ...]]
KEPT = 4  # recordings, each with memory of its own


class CaptureWarning(UserWarning):
    """An attack cannot be recorded in a CUDA graph and runs step by step instead."""


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
        with torch.cuda.graph(graph):
            outputs = climb(piece, x_adv)
        return cls(graph, piece, x_adv, outputs)

    def play(self, piece: Piece, x_adv: Tensor) -> tuple[Tensor, ...]:
        """Runs the graph on other arguments of the same shapes."""
        for held, given in zip(self._inputs(self.piece, self.x_adv), self._inputs(piece, x_adv), strict=True):
            held.copy_(given)
        self.graph.replay()
        piece.trace.copy_(self.piece.trace)
        return tuple(output.clone() for output in self.outputs)

    @staticmethod
    def _inputs(piece: Piece, x_adv: Tensor) -> tuple[Tensor, ...]:
        return piece.x, piece.y, piece.aim, piece.trace, x_adv


class Replays:
    """The recordings of one attack, most recent last."""

    def __init__(self) -> None:
        self.refused = False
        self._recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()

    def __call__(
        self, name: Hashable, model: nn.Module, climb: Climb, piece: Piece, x_adv: Tensor
    ) -> tuple[Tensor, ...]:
        """climb(piece, x_adv), which may overwrite x_adv; on CUDA replayed once it has been recorded.

        Args:
            name: of the climb and of every setting it holds.
            model: that it runs.
            climb: the steps, without host synchronisation.
            piece: the whole batch.
            x_adv: where to start, like piece.x.
        """
        if self.refused or not x_adv.is_cuda:
            return climb(piece, x_adv)
        key = (name, _where(model), *((t.shape, t.stride(), t.dtype) for t in (piece.x, piece.aim, x_adv)))
        if key not in self._recordings:
            self._recordings[key] = None
            while len(self._recordings) > KEPT:
                self._recordings.popitem(last=False)
            return climb(piece, x_adv)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        if recording is None:
            try:
                recording = self._recordings[key] = Recording.of(climb, piece, x_adv)
            except RuntimeError as error:  # raised inside the capture: the step-by-step run before it went well
                self.refused = True
                warnings.warn(
                    f"the attack runs without a CUDA graph, because recording one failed: {error}",
                    CaptureWarning,
                    stacklevel=2,
                )
                return climb(piece, x_adv)
        return recording.play(piece, x_adv)


def _where(model: nn.Module) -> int:
    """Changes when a weight or buffer moves in memory."""
    return hash(tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())))
