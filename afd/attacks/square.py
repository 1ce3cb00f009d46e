"""Square (Andriushchenko et al. 2020): random search along squares, which asks a model for logits and for no gradient.

What it finds where gradient attacks find nothing, they were kept from finding: a sign of masked gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from afd.attacks import inputs, losses
from afd.attacks.ball import Ball
from afd.attacks.base import GradientAttack
from afd.attacks.inputs import Chunk, rows_of
from afd.attacks.losses import Value
from afd.attacks.settings import AttackSettings, LossName, takes
from afd.errors import InputError, one_of

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which squares have half the area


@dataclass(frozen=True, kw_only=True)
class SquareSettings(AttackSettings):
    """What `Square` can be told, beside `AttackSettings`; it is not targeted.

    Attributes:
        loss: what is to grow: "margin" or "ce".
        queries: of each image, beside that of the image itself and of the first point, >= 0.
        p_init: share of an image that the first squares cover, in (0, 1].
        seed: of all draws; the same seed gives the same result.
    """

    loss: LossName | Value = "margin"
    queries: int = 5000
    p_init: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss", self.loss, ("margin", "ce"))
        if self.targeted:
            raise InputError("targeted is True, and Square aims at no class; it must be False")
        if not 0 < self.p_init <= 1:
            raise InputError(f"p_init is {self.p_init}; it must be in (0, 1]")
        self._set(queries=inputs.count("queries", self.queries, 0), seed=inputs.counter("seed", self.seed))

    def _attack(self) -> Callable[..., Square]:
        return Square


class Square(GradientAttack):
    """Random search: a point moves along a square of random place and signs wherever that makes the loss grow.

    In Linf the first point are vertical stripes, and a square moves to a corner of the ball; in L2 and L1 two squares
    are drawn, and what the second one has of the ball's radius goes to the first. Squares shrink as the queries go on.
    Each image has draws of its own, by seed, sample and query, so that the result is the same for any split of the
    batch; it stays where it is once it is misclassified. Nothing waits for the device. In L1 it is as AutoAttack's
    (Croce & Hein 2021). Images that are no [C, H, W] count as one row of one channel.

    Args:
        model: classifier, images -> logits [N, classes], treated as `afd.attacks.PGD` treats it.
        settings: by keyword; `SquareSettings` says what they are.

    Raises:
        InputTypeError, InputError: as of `PGD`; the norm is another than Linf, L2 and L1.
    """

    known: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")

    @takes(SquareSettings)
    def __init__(self, model: nn.Module, settings: SquareSettings) -> None:
        super().__init__(model, settings, steps=settings.queries, seed=settings.seed)
        one_of("norm", self.norm, self.known)
        self.p_init = settings.p_init

    def _run(self, chunk: Chunk) -> Tensor:
        assert chunk.y is not None  # the loss asks for it
        x, y, ball = chunk.x, chunk.y, self._ball(chunk)
        shape = tuple(x.shape[1:]) if x.dim() == 4 else (1, 1, x[0].numel())
        draws = _Draws(x, shape, self.norm, self.steps, chunk.seed, chunk.first_sample)
        best = x.clone()
        standing, value = self._judged(self._clean(chunk), y)
        for query in range(-1, self.steps):
            if query < 0:
                tried = self._first(chunk, shape, draws) if chunk.start is None else chunk.start.clone()
            else:
                tried = self._moved(best, chunk, shape, draws, query)
            ball.project_(tried, x)
            stands, new = self._judged(self._as_written(tried), y)
            better = standing & ((new > value) | ~stands) if query >= 0 else standing  # the first one as it is
            best = torch.where(rows_of(better, x), tried, best)
            value, standing = torch.where(better, new, value), standing & stands
        return best

    def _judged(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Which images are classified correctly, bool [n], and the loss of each, [n]."""
        return losses.margin(logits, y) <= 0, self.loss.value(logits, y)

    def _side(self, query: int, height: int, width: int) -> int:
        """Of the square of a query."""
        share = self.p_init / 2 ** sum(query > after for after in HALVINGS)
        side = max(round(math.sqrt(share * height * width)), 1)
        if self.norm != "Linf":
            side = max(side, 3) // 2 * 2 + 1  # odd, as the paper has it
        return min(side, height, width)

    def _first(self, chunk: Chunk, shape: tuple[int, ...], draws: _Draws) -> Tensor:
        """Where the search begins: stripes in Linf, else tiles with a pyramid each."""
        x, (channels, height, width) = chunk.x.view(len(chunk.x), *shape), shape
        eps = _column(chunk.of(self.eps), x)
        if self.norm == "Linf":
            return (x + eps * draws.first.view(-1, channels, 1, width).sign()).view_as(chunk.x)
        side, delta = max(min(height, width) // 5, 1), torch.zeros_like(x)
        rows, columns = height // side, width // side
        drawn = draws.first.view(-1, rows * columns, channels + 1)
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        for tile in range(rows * columns):
            down, right = top + tile // columns * side, left + tile % columns * side
            eta = _turned(draws.eta(side), drawn[:, tile, -1])
            delta[:, :, down : down + side, right : right + side] = eta * drawn[:, tile, :-1, None, None].sign()
        return (x + eps * _unit(delta, self.norm, (1, 2, 3))).view_as(chunk.x)

    def _moved(self, best: Tensor, chunk: Chunk, shape: tuple[int, ...], draws: _Draws, query: int) -> Tensor:
        """A point beside the best one, before it is projected."""
        x, best = chunk.x.view(len(best), *shape), best.view(len(best), *shape)
        channels, height, width = shape
        drawn, side = draws.queries[:, query], self._side(query, height, width)
        eps, signs = _column(chunk.of(self.eps), x), drawn[:, :channels, None, None].sign()
        inside = _window(drawn[:, channels : channels + 2], side, height, width)
        if self.norm == "Linf":
            return (best + 2 * eps * signs * inside[0]).view_as(chunk.x)
        delta, (mask, rows, columns) = best - x, inside
        emptied = _window(drawn[:, channels + 2 : channels + 4], side, height, width)[0]
        size = _size(delta, self.norm, (1, 2, 3))
        held = _size(delta * (mask | emptied), self.norm, (2, 3))  # [n, channels, 1, 1]
        at = torch.arange(len(x), device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]
        old = delta.permute(0, 2, 3, 1)[at].permute(0, 3, 1, 2)
        eta = _turned(draws.eta(side), drawn[:, channels + 4])
        new = _unit(_unit(old, self.norm, (2, 3)) + eta * signs, self.norm, (2, 3))
        if self.norm == "L2":
            new = new * ((eps.square() - size.square()).clamp(min=0) / channels + held.square()).sqrt()
        else:
            new = new * ((eps - size).clamp(min=0) / channels + held) * channels
        moved = (delta * ~emptied).permute(0, 2, 3, 1).contiguous()
        moved[at] = new.permute(0, 2, 3, 1)
        delta = moved.permute(0, 3, 1, 2)
        if self.norm == "L2":
            delta = eps * _unit(delta, self.norm, (1, 2, 3))
        return (x + delta).reshape(chunk.x.shape)


class _Draws:
    """All that is drawn for the images of a chunk, uniform in (-1, 1): for the first point, and for each query.

    And the paper's pattern of a square, of size 1: a pyramid up and one down, made once for each side.
    """

    def __init__(
        self, x: Tensor, shape: tuple[int, ...], norm: str, queries: int, seed: int | Tensor, first_sample: int
    ) -> None:
        channels, height, width = shape
        side = max(min(height, width) // 5, 1)
        linf = norm == "Linf"
        begin = channels * width if linf else (height // side) * (width // side) * (channels + 1)
        each = channels + (2 if linf else 5)  # signs; places of squares, and whether the pattern is turned
        ball = Ball("Linf", 1.0, (-1.0, 1.0))
        drawn = ball.start(x.new_zeros(len(x), begin + queries * each), seed=seed, first_sample=first_sample)
        self.first, self.queries = drawn[:, :begin], drawn[:, begin:].view(len(x), queries, each)
        self._like, self._norm, self._made = x, norm, dict[int, Tensor]()

    def eta(self, side: int) -> Tensor:
        """The pattern, [side, side]."""
        if side not in self._made:
            self._made[side] = _pattern(side, self._norm).to(self._like)
        return self._made[side]


def _column(eps: float | Tensor, x: Tensor) -> Tensor:
    """A radius for each image, [n, 1, 1, 1]."""
    return rows_of(eps if isinstance(eps, Tensor) else x.new_full((len(x),), eps), x)


def _window(drawn: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squares at places drawn in (-1, 1), [n, 2]: a mask [n, 1, H, W], and their rows and columns, each [n, side]."""
    places = []
    for number, length in enumerate((height, width)):
        room = length - side + 1
        first = ((drawn[:, number] + 1) / 2 * room).long().clamp(max=room - 1)
        places.append(first[:, None] + torch.arange(side, device=drawn.device))
    rows, columns = places
    down, right = (torch.arange(length, device=drawn.device) for length in (height, width))
    in_rows = (down >= rows[:, :1]) & (down <= rows[:, -1:])
    in_columns = (right >= columns[:, :1]) & (right <= columns[:, -1:])
    return in_rows[:, None, :, None] & in_columns[:, None, None, :], rows, columns


def _size(delta: Tensor, norm: str, over: tuple[int, ...]) -> Tensor:
    """‖delta‖ over some dimensions, which are kept."""
    found: Tensor = torch.linalg.vector_norm(delta, 2 if norm == "L2" else 1, dim=over, keepdim=True)
    return found


def _unit(delta: Tensor, norm: str, over: tuple[int, ...]) -> Tensor:
    return delta / _size(delta, norm, over).clamp(min=1e-12)


def _turned(eta: Tensor, drawn: Tensor) -> Tensor:
    """The pattern [side, side] of each image, transposed for half of them: [n, 1, side, side]."""
    return torch.where((drawn > 0)[:, None, None, None], eta.T, eta)


def _pattern(side: int, norm: str) -> Tensor:
    half = side // 2
    return _unit(torch.cat([_pyramid(half, side, norm), -_pyramid(side - half, side, norm)]), norm, (0, 1))


def _pyramid(height: int, width: int, norm: str) -> Tensor:
    """At distance d of the middle, in steps of a king, the sum of (k + 1)^-power over all k >= d that there are."""
    middle, across = height // 2, width // 2
    down = (torch.arange(height, device="cpu") - middle).abs()
    distance = torch.maximum(down[:, None], (torch.arange(width, device="cpu") - across).abs())
    steps = torch.arange(1, max(middle, across) + 2, device="cpu").double() ** (-2 if norm == "L2" else -4)
    return _unit(steps.flip(0).cumsum(0).flip(0)[distance], norm, (0, 1))
