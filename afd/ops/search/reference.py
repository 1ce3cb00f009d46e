"""The ops of attacks without gradients as their formulas in plain PyTorch: see `afd.ops.reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.ops.reference import philox, plus_towards, project

BROKEN, STANDING = 0, 1
SQUARE_STREAM = 2  # and all behind it
FIRST_POINT = 2**32 - 1  # query -1
_TINY = 1e-12


def square_step(
    x_tried: Tensor,
    x_best: Tensor,
    x: Tensor,
    logits: Tensor | None,
    y: Tensor,
    loss_best: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float,
    low: float,
    high: float,
    seed: int,
    first_sample: int,
    query: int,
    side: int,
    last_side: int,
    epsilons: Tensor | None = None,
    norm: str = "Linf",
    loss: str = "margin",
    pattern: Tensor | None = None,
    key: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    """Judges x_tried[i], a proposal for the sample rows[i], and writes the next one: `afd.ops.square_step_`."""
    named = ((rows >= 0) & (rows < len(x))).nonzero().squeeze(1)
    rows = rows[named]
    shape = (len(rows), *channels_and_size(x))
    clean, tried, best = (of.reshape(shape) for of in (x[rows], x_tried[named], x_best[rows]))
    index = rows + first_sample if places is None else places[rows]
    draws = _Draws(seed if key is None else key, index, shape)
    judged, accepted, broken = torch.zeros_like(rows).bool(), torch.zeros_like(rows).bool(), state[rows] == BROKEN
    if logits is not None:
        value, fooled = judged_by(logits[named], y[rows], loss)
        judged = state[rows] == STANDING
        accepted = judged & (fooled | (value > loss_best[rows]) | (query == 0))
        broken = broken | (judged & fooled)
        loss_best[rows] = torch.where(accepted, value, loss_best[rows])
    state[rows] = torch.where(broken, BROKEN, STANDING).to(state.dtype)
    touched = (
        draws.window(query - 1, last_side) if norm == "Linf" and query else torch.ones_like(clean, dtype=torch.bool)
    )
    best = torch.where(_rows_of(accepted, clean) & touched, tried, best)
    tried = torch.where(_rows_of(judged, clean) & touched, best, tried)
    if side and clean.numel():
        radius = x.new_full((len(rows),), eps) if epsilons is None else epsilons[rows]
        if norm == "Linf":
            signs = draws.stripes() if logits is None else draws.signs(query)
            touched = draws.window(query, side) if logits is not None else torch.ones_like(touched)
            proposed = (clean + _rows_of(radius, clean) * signs.to(x.dtype)).clamp(low, high)
        else:
            assert pattern is not None
            change = best - clean  # in the images' own precision
            if logits is None:
                change = draws.tiles(pattern.double())
            else:
                change = moved(change.double(), radius.double(), pattern.double(), draws, query, norm)
            proposed = placed(change.to(x.dtype), clean, radius, low, high, norm)
            touched = torch.ones_like(touched)
        tried = torch.where(_rows_of(~broken, clean) & touched, proposed, tried)
    x_best[rows], x_tried[named] = best.reshape(x[rows].shape), tried.reshape(x[rows].shape)


def channels_and_size(x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of images [N, C, H, W]; of others, one row of one channel."""
    if x.dim() == 4:
        return x.shape[1], x.shape[2], x.shape[3]
    return 1, 1, x.shape[1:].numel()


def judged_by(logits: Tensor, y: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """The loss of each sample, [n], and whether the model is fooled, which it is not about a class it does not have."""
    known = (y >= 0) & (y < logits.shape[1])
    own = torch.where(known, y, 0)
    if loss == "margin":
        others = logits.scatter(1, own[:, None], float("-inf"))
        value = others.amax(1) - logits.gather(1, own[:, None]).squeeze(1)
    else:
        value = F.cross_entropy(logits.double(), own, reduction="none").to(logits.dtype)
    return torch.where(known, value, torch.nan), known & (logits.argmax(1) != y)


def moved(change: Tensor, radius: Tensor, pattern: Tensor, draws: _Draws, query: int, norm: str) -> Tensor:
    """The change [n, C, H, W] with one window emptied and what it held given to another one, in a new direction."""
    side = len(pattern)
    window, emptied = draws.window(query, side), draws.window(query, side, second=True)
    radius, channels = _rows_of(radius, change), change.shape[1]
    size, held = _length(change, norm, (1, 2, 3)), _length(change * (window | emptied), norm, (2, 3))
    old = change * window / _length(change * window, norm, (2, 3)).clamp(min=_TINY)
    new = old + draws.signs(query) * draws.placed_pattern(pattern, query)
    new = new / _length(new, norm, (2, 3)).clamp(min=_TINY)
    if norm == "L2":
        new = new * ((radius.square() - size.square()).clamp(min=0) / channels + held.square()).sqrt()
    else:
        new = new * ((radius - size).clamp(min=0) + channels * held)
    return torch.where(window, new, change * ~emptied)


def placed(change: Tensor, x: Tensor, radius: Tensor, low: float, high: float, norm: str) -> Tensor:
    """x + change, scaled to the radius and clamped in L2, projected in L1."""
    if norm == "L1":
        return project(x + change, x, 0.0, low, high, radius, norm)
    length = _length(change.double(), norm, (1, 2, 3)).clamp(min=_TINY)
    return plus_towards(x, change.double() * _rows_of(radius.double(), x) / length).clamp(low, high)


class _Draws:
    """What is drawn for samples of these indices, [n], and images of this shape, (n, C, H, W)."""

    def __init__(self, seed: int | Tensor, index: Tensor, shape: tuple[int, ...]) -> None:
        self.seed, self.index = seed, index
        _, self.channels, self.height, self.width = shape

    def words(self, query: int, blocks: Tensor) -> Tensor:
        """Blocks [m] of a query: [n, m, 4]. The first one places windows; of the others, each bit is a sign."""
        number = torch.full_like(blocks, query)
        return philox(self.seed, self.index[:, None], number, SQUARE_STREAM + blocks)

    def bits(self, query: int, count: int) -> Tensor:
        """The first of a query, [n, count]."""
        blocks = torch.arange((count + 127) // 128, device=self.index.device)
        places = torch.arange(32, device=self.index.device)
        return (self.words(query, 1 + blocks)[..., None] >> places & 1).flatten(1)[:, :count]

    def signs(self, query: int) -> Tensor:
        """One for each channel, int64 [n, C, 1, 1]."""
        return (2 * self.bits(query, self.channels) - 1)[:, :, None, None]

    def stripes(self) -> Tensor:
        """One for each column of each channel, [n, C, 1, W]."""
        drawn = 2 * self.bits(FIRST_POINT, self.channels * self.width) - 1
        return drawn.view(-1, self.channels, 1, self.width)

    def places(self, query: int, side: int) -> tuple[Tensor, Tensor]:
        """First rows and columns of a query's two windows, each [n, 2]; the lowest bit of the first is `turned`."""
        drawn = self.words(query, torch.zeros_like(self.index[:1]))[:, 0] if len(self.index) else self.index.view(0, 1)
        drawn = (drawn >> 1).expand(-1, 4)
        return drawn[:, ::2] * (self.height - side + 1) >> 31, drawn[:, 1::2] * (self.width - side + 1) >> 31

    def turned(self, query: int) -> Tensor:
        """Whether a query's pattern is transposed, bool [n, 1, 1, 1]."""
        drawn = self.words(query, torch.zeros_like(self.index[:1]))[:, 0, :1] & 1 == 1
        return drawn[:, :, None, None]

    def window(self, query: int, side: int, *, second: bool = False) -> Tensor:
        """The first window of a query, or the second one: a mask [n, 1, H, W]."""
        top, left = (place[:, int(second), None, None, None] for place in self.places(query, side))
        down = torch.arange(self.height, device=top.device)[:, None]
        across = torch.arange(self.width, device=top.device)
        return (down >= top) & (down < top + side) & (across >= left) & (across < left + side)

    def placed_pattern(self, pattern: Tensor, query: int) -> Tensor:
        """The pattern in the first window of a query, transposed for half of the samples, elsewhere 0: [n, 1, H, W]."""
        side = len(pattern)
        top, left = (place[:, 0] for place in self.places(query, side))
        row = (torch.arange(self.height, device=top.device) - top[:, None]).clamp(0, side - 1)[:, None, :, None]
        column = (torch.arange(self.width, device=top.device) - left[:, None]).clamp(0, side - 1)[:, None, None, :]
        shown = torch.where(self.turned(query), pattern[column, row], pattern[row, column])
        return shown * self.window(query, side)

    def tiles(self, pattern: Tensor) -> Tensor:
        """As many patterns as fit, in the middle, each turned or not and with a sign for each channel: [n, C, H, W]."""
        side, channels = len(pattern), self.channels
        down, across = self.height // side, self.width // side
        drawn = self.bits(FIRST_POINT, down * across * (channels + 1)).view(-1, down, across, channels + 1)
        shown = torch.where(drawn[..., -1, None, None] == 1, pattern.T, pattern)  # [n, down, across, side, side]
        tiles = (2 * drawn[..., :-1, None, None] - 1) * shown[..., None, :, :]  # [n, down, across, C, side, side]
        change = tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, down * side, across * side)
        top, left = (self.height - down * side) // 2, (self.width - across * side) // 2
        below, right = self.height - down * side - top, self.width - across * side - left
        return F.pad(change, (left, right, top, below))


def _rows_of(values: Tensor, images: Tensor) -> Tensor:
    """One value per sample, [n], in a shape that broadcasts against images [n, C, H, W]."""
    return values.view(-1, *[1] * (images.dim() - 1))


def _length(change: Tensor, norm: str, over: tuple[int, ...]) -> Tensor:
    """‖change‖ over some dimensions, which are kept."""
    found: Tensor = torch.linalg.vector_norm(change, 2 if norm == "L2" else 1, dim=over, keepdim=True)
    return found
