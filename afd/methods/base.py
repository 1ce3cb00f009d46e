"""What the trainer asks of a training method: settings that build a round, and a round that takes one step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from afd.methods.execution import Execution, Wrap
from afd.nn import Split


class Round(Protocol):
    """One method at work on one model: its extra networks, its optimizers and the step itself."""

    players: dict[str, nn.Module]  # trained beside the model, saved with it
    optimizers: dict[str, Optimizer]
    rounds: int  # played so far

    def step(self, x: Tensor, y: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        """Updates everything once from images [N, C, H, W], labels [N] and attacked images; returns detached losses."""

    def course(self) -> Hashable:
        """Which way the next step goes: those that go the same way do the same work, whatever the batch holds."""


class Method(Protocol):
    """The settings of a training method."""

    uses_attack: ClassVar[bool]  # whether `step` wants attacked images (else it is given x again)

    def build(self, model: Split, execution: Execution = ..., wrap: Wrap = ...) -> Round:
        """A round that trains `model`, its passes run by `execution`, each trained module handed through `wrap`."""


@dataclass(frozen=True)
class Part:
    """Rows of a batch whose gradients are taken together: what share of the batch, and whether first or last of it."""

    x: Tensor
    y: Tensor
    x_adv: Tensor
    share: float
    first: bool
    last: bool


def parts(x: Tensor, y: Tensor, x_adv: Tensor, count: int) -> Iterator[Part]:
    """The batch in at most `count` parts of nearly equal size, whose gradients add up to the batch's."""
    if count < len(y) and len(y.chunk(count)[-1]) == 1:  # which BatchNorm could not be shown
        count = max(1, min(count, len(y) // 2))
        pieces = list(zip(*(tensor.tensor_split(count) for tensor in (x, y, x_adv)), strict=True))
    else:
        pieces = list(zip(x.chunk(count), y.chunk(count), x_adv.chunk(count), strict=True))
    for i, (rows, labels, attacked) in enumerate(pieces):
        yield Part(rows, labels, attacked, len(labels) / len(y), first=i == 0, last=i + 1 == len(pieces))


def unwrapped(module: nn.Module) -> nn.Module:
    """The `Wrap` of a single process: the module itself."""
    return module
