"""square_step: against a transcription for one sample in float64, the reference, and itself in other surroundings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.ops import backend, native, reference

USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []
RADII = {"Linf": 0.1, "L2": 1.0, "L1": 5.0}
NORMS = list(RADII)
BROKEN, STANDING, RESUMED = 0, 1, 2
LAYOUTS = {
    "plain": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last if t.dim() == 4 else torch.preserve_format),
    "transposed": lambda t: t.mT.clone(memory_format=torch.contiguous_format).mT,
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


class Search:
    """A search for a fixed linear model, step by step."""

    def __init__(self, shape, norm, *, layout="plain", loss="margin", each=False, device="cpu", rows=None, first=3):
        generator = torch.Generator().manual_seed(1)
        lay, n = LAYOUTS[layout], shape[0]
        self.x = lay(torch.rand(shape, generator=generator).to(device))
        self.rows = torch.randperm(n, generator=generator).to(device) if rows is None else rows
        self.y = torch.randint(4, (n,), generator=generator).to(device)
        self.weight = torch.randn(math.prod(shape[1:]), 4, generator=generator).double().to(device)
        self.x_best, self.x_tried = lay(self.x), lay(self.x[self.rows])
        self.loss_best, self.state = self.x.new_full((n,), -math.inf), torch.ones(n, dtype=torch.uint8, device=device)
        self.height, self.width = shape[2:] if len(shape) == 4 else (1, self.x[:1].numel())
        eps = RADII[norm] * torch.linspace(0.5, 1, n, device=device) if each else RADII[norm]
        self.settings = {"eps": eps, "norm": norm, "loss": loss, "seed": 5, "first_sample": first}
        self.last_side = 0

    def side(self, wanted: int) -> int:
        return min(wanted, self.height, self.width)

    def logits(self) -> Tensor:
        return (self.x_tried.double().flatten(1) @ self.weight).to(self.x.dtype)

    def step(self, query: int, side: int, logits: Tensor | None) -> None:
        norm = self.settings["norm"]
        pattern = ops.square_pattern(side, norm).to(self.x) if side and norm != "Linf" else None
        ops.square_step_(
            self.x_tried, self.x_best, self.x, logits, self.y, loss_best=self.loss_best, state=self.state,
            rows=self.rows, query=query, side=side, last_side=self.last_side, pattern=pattern, **self.settings,
        )  # fmt: skip
        self.last_side = side if logits is not None else 0

    def run(self, queries: int = 6, wanted: int = 3) -> list[Tensor]:
        """The tensors after each step; a broken sample goes on, now and then."""
        self.step(0, self.side(max(min(self.height, self.width) // 5, 1)), None)
        seen = [self.x_tried.clone()]
        for query in range(queries):
            self.step(query, self.side(wanted) if query < queries - 1 else 0, self.logits())
            if query == 2:
                self.state[(self.state == BROKEN) & (torch.arange(len(self.state), device=self.state.device) > 0)] = (
                    RESUMED
                )
            seen += [t.clone() for t in (self.x_tried, self.x_best, self.loss_best, self.state)]
        return seen


def agree(got: list[Tensor], want: list[Tensor], norm: str) -> None:
    tolerance = 0 if norm == "Linf" else 1e-5
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=tolerance)


SHAPES = [(5, 3, 7, 9), (4, 30), (3, 1, 8, 8), (2, 130, 5, 4), (3, 2, 33, 40), (3, 2, 3, 3, 2), (1, 3, 6, 6), (7, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_a_search_is_the_references(device, shape, norm, loss):
    for each, layout in ((False, "plain"), (True, "channels_last")):
        found = []
        for which in ("native", "reference"):
            with backend.use(which):
                found.append(Search(shape, norm, loss=loss, each=each, layout=layout, device=device).run())
        agree(*found, norm)


# --- One sample, transcribed from the papers ------------------------------------------------------------------------


def words(query: int, sample: int, block: int) -> list[int]:
    one = torch.tensor(sample)
    return reference.philox(5, one, torch.tensor(query), 2 + block).tolist()


def sign(query: int, sample: int, number: int) -> int:
    word = words(query, sample, 1 + number // 128)[number // 32 % 4]
    return 1 if word >> number % 32 & 1 else -1


def places(query: int, sample: int, side: int, height: int, width: int) -> list[int]:
    return [
        (word >> 1) * (length - side + 1) >> 31
        for word, length in zip(words(query, sample, 0), (height, width, height, width), strict=True)
    ]


def transcribed(best: Tensor, x: Tensor, eps: float, norm: str, query: int, sample: int, side: int) -> Tensor:
    """The proposal of a query for one image [C, H, W], float64, element by element."""
    channels, height, width = x.shape
    top, left, top_2, left_2 = places(query, sample, side, height, width)
    window, emptied = ((slice(t, t + side), slice(s, s + side)) for t, s in ((top, left), (top_2, left_2)))
    if norm == "Linf":
        tried = best.clone()
        for c in range(channels):
            tried[c][window] = (x[c][window] + sign(query, sample, c) * eps).clamp(0, 1)
        return tried
    p = 2 if norm == "L2" else 1
    pattern = ops.square_pattern(side, norm)
    if words(query, sample, 0)[0] & 1:
        pattern = pattern.T
    delta = best - x
    size, out = delta.norm(p), delta.clone()
    for c in range(channels):
        mask = torch.zeros(height, width)
        mask[window] = mask[emptied] = 1
        held = (delta[c] * mask).norm(p)
        u = delta[c][window] / delta[c][window].norm(p).clamp(min=1e-12) + sign(query, sample, c) * pattern
        u = u / u.norm(p).clamp(min=1e-12)
        if norm == "L2":
            u = u * ((eps**2 - size**2).clamp(min=0) / channels + held**2).sqrt()
        else:
            u = u * channels * ((eps - size).clamp(min=0) / channels + held)
        out[c][emptied] = 0
        out[c][window] = u
    if norm == "L2":
        return (x + eps * out / out.norm()).clamp(0, 1)
    return reference.project((x + out)[None], x[None], eps, 0.0, 1.0, norm="L1")[0]


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("side", [1, 3, 5])
def test_a_proposal_is_the_papers(device, which, norm, side):
    with backend.use(which):
        search = Search((6, 3, 7, 9), norm, device=device)
        search.run(4)
        search.state.fill_(RESUMED)
        before = search.x_best.clone()
        search.step(17, side, search.logits())
    for row, sample in enumerate(search.rows.tolist()):
        want = transcribed(
            before[sample].double().cpu(), search.x[sample].double().cpu(), RADII[norm], norm, 17, 3 + sample, side
        )
        torch.testing.assert_close(search.x_tried[row].double().cpu(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("which", ["native", "reference"])
def test_the_first_point_are_stripes_in_linf(device, which):
    with backend.use(which):
        search = Search((4, 3, 6, 7), "Linf", device=device)
        search.step(0, 1, None)
    change = search.x_tried - search.x[search.rows]
    inside = (search.x_tried > 0) & (search.x_tried < 1)
    assert torch.allclose(change[inside].abs(), torch.full_like(change[inside], 0.1), atol=1e-6)
    for row, sample in enumerate(search.rows.tolist()):
        for channel in range(3):
            for column in range(7):
                signs = change[row, channel, :, column].sign()
                assert bool((signs == sign(2**32 - 1, 3 + sample, 7 * channel + column)).all())


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize(("norm", "p"), [("L2", 2), ("L1", 1)])
def test_the_first_point_are_tiles_elsewhere(device, which, norm, p):
    with backend.use(which):
        search = Search((4, 2, 11, 16), norm, device=device)
        search.x.fill_(0.5)
        search.settings["eps"] = 0.01
        search.step(0, 3, None)
    change = (search.x_tried - 0.5).double()
    assert torch.allclose(change.flatten(1).norm(p, 1), change.new_full((4,), 0.01), rtol=1e-3)
    assert change[:, :, 0].abs().max() == 0  # 11 = 1 + 3 * 3 + 1
    assert change[:, :, 1:10, :15].abs().sum((1, 2, 3)).equal(change.abs().sum((1, 2, 3)))
    if norm == "L2":
        tiles = change[:, :, 1:10, :15].unfold(2, 3, 3).unfold(3, 3, 3)
        pattern = ops.square_pattern(3, norm).to(change)
        flat = torch.stack([pattern, -pattern, pattern.T, -pattern.T]).flatten(1)
        cosine = torch.nn.functional.normalize(tiles.flatten(4), dim=-1) @ flat.T / flat.norm(dim=1)
        assert torch.allclose(cosine.amax(-1), cosine.new_ones(()), atol=1e-4)


# --- Judgement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_proposal_counts_where_the_loss_grows_or_the_model_is_fooled(device, which, norm):
    """Of class 1: the margin grows to -1, does not grow from 0.5, is 1 (fooled) though it was 2, ties with class 0."""
    with backend.use(which):
        search = Search((6, 3, 8, 8), norm, device=device, rows=torch.arange(6, device=device))
        search.step(0, 1, None)
        search.step(0, 3, torch.zeros(6, 4, device=device).index_fill(1, torch.arange(1, device=device), -1.0))
        search.y.fill_(1)
        search.state.copy_(torch.tensor([1, 1, 1, 1, 0, 2]))
        search.loss_best.copy_(torch.tensor([-2.0, 0.5, 2.0, 5.0, -9.0, -9.0]))
        tried, best = search.x_tried.clone(), search.x_best.clone()
        logits = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [9, 1, 0, 0], [9, 1, 0, 0]])
        search.step(1, 0, logits.float().to(device))
    assert search.state.tolist() == [STANDING, STANDING, BROKEN, BROKEN, BROKEN, STANDING]
    assert search.loss_best.tolist() == [-1.0, 0.5, 1.0, 0.0, -9.0, -9.0]
    for row in (0, 2, 3):
        assert torch.equal(search.x_best[row], tried[row])
    for row in (1, 4, 5):
        assert torch.equal(search.x_best[row], best[row])
    for row in (0, 1, 2, 3):
        assert torch.equal(search.x_tried[row], search.x_best[row])


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_losses_and_what_fools_are_torchs(device, which, loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 7, generator=generator).mul(3).round().to(device)  # with ties
    logits[::9, 2], logits[::11, 4], logits[::13] = math.nan, math.nan, math.inf
    y = torch.randint(7, (400,), generator=generator).to(device)
    search = Search((400, 5), "Linf", device=device, rows=torch.arange(400, device=device), loss=loss)
    search.y = y
    with backend.use(which):
        search.step(0, 0, logits)
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    own = logits.gather(1, y[:, None]).squeeze(1)
    wanted = others - own if loss == "margin" else torch.nn.functional.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(search.loss_best, wanted, equal_nan=True)
    assert torch.equal(search.state == BROKEN, logits.argmax(1) != y)


@pytest.mark.parametrize("which", ["native", "reference"])
def test_a_class_or_a_sample_that_is_none_is_left_alone(device, which):
    with backend.use(which):
        search = Search((4, 5), "Linf", device=device, rows=torch.zeros(4, dtype=torch.int64, device=device))
        search.rows.copy_(torch.tensor([2, 9, -1, 0]))
        search.y.copy_(torch.tensor([-1, 0, 7, 0]))
        search.state.fill_(STANDING)
        tried, best = search.x_tried.clone(), search.x_best.clone()
        search.step(1, 0, torch.full((4, 4), 3.0, device=device))
    assert torch.equal(search.x_best, best)
    assert torch.equal(search.x_tried[1:3], tried[1:3])
    assert search.state.tolist() == [STANDING] * 4
    assert search.loss_best.tolist() == [-math.inf] * 4


# --- Same in all surroundings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_in_any_order_and_number_draw_the_same(device, which, norm):
    with backend.use(which):
        whole = Search((6, 3, 8, 8), norm, device=device, rows=torch.arange(6, device=device))
        seen = whole.run()[-4:]
        for rows in ([4], [5, 0, 2]):
            part = Search((6, 3, 8, 8), norm, device=device, rows=torch.tensor(rows, device=device))
            got = part.run()[-4:]
            assert torch.equal(got[0], seen[0][rows])
            for one, other in zip(got[1:], seen[1:], strict=True):
                assert torch.equal(one[rows], other[rows])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_layouts_change_nothing(device, layout, norm):
    with backend.use("native"):
        want, got = (Search((5, 3, 7, 9), norm, device=device, layout=one) for one in ("plain", layout))
        agree(got.run(), want.run(), norm)
    assert got.x_tried.stride() == LAYOUTS[layout](got.x).stride()


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, isa, norm):
    with backend.use("native"):
        want = Search((4, 3, 21, 17), norm).run()
        monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
        got = Search((4, 3, 21, 17), norm).run()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", NORMS)
def test_threads_change_no_bit(norm):
    with backend.use("native"):
        want = Search((9, 3, 40, 40), norm).run()
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            got = Search((9, 3, 40, 40), norm).run()
        finally:
            torch.set_num_threads(before)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_samples_may_be_told_their_places_in_the_data(device, which, norm):
    with backend.use(which):
        whole = Search((6, 3, 8, 8), norm, device=device, rows=torch.arange(6, device=device), first=11)
        told = Search((6, 3, 8, 8), norm, device=device, rows=torch.arange(6, device=device))
        told.settings["first_sample"] = torch.arange(11, 17, device=device)
        for one, other in zip(told.run(), whole.run(), strict=True):
            assert torch.equal(one, other)
        apart = Search((6, 3, 8, 8), norm, device=device, rows=torch.tensor([3, 1], device=device))
        apart.settings["first_sample"] = torch.tensor([0, 13, 0, 40, 0, 0], device=device)
        apart.step(0, 2, None)
        for row, place in enumerate((40, 13)):
            alone = Search((6, 3, 8, 8), norm, device=device, rows=torch.tensor([[3], [1]][row], device=device))
            alone.settings["first_sample"] = place - [3, 1][row]
            alone.step(0, 2, None)
            assert torch.equal(alone.x_tried[0], apart.x_tried[row])


@pytest.mark.parametrize("which", ["native", "reference"])
def test_a_seed_on_the_device_draws_as_a_number_does(device, which):
    with backend.use(which):
        searches = [Search((3, 3, 8, 8), "Linf", device=device) for _ in range(2)]
        searches[1].settings["seed"] = torch.tensor(5, device=device)
        assert torch.equal(searches[0].run()[-1], searches[1].run()[-1])
        assert torch.equal(searches[0].x_best, searches[1].x_best)
        searches[1].settings["seed"] = 6
        searches[0].step(40, 3, searches[0].logits())
        searches[1].step(40, 3, searches[1].logits())
    assert not torch.equal(searches[0].x_tried, searches[1].x_tried)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(2, 150_528), (2, 3, 224, 224), (0, 3, 8, 8), (2, 3, 0, 4)], ids=str)
def test_images_of_any_size(device, norm, shape):
    search = Search(shape, norm, device=device)
    with backend.use("native"):
        search.run(3, wanted=101)
    length = (search.x_best - search.x).double().flatten(1).norm({"Linf": math.inf, "L2": 2, "L1": 1}[norm], dim=1) if (
        search.x.numel()
    ) else torch.zeros(1)  # fmt: skip
    assert bool((length <= RADII[norm] * (1 + 1e-5)).all())
    assert not search.x.numel() or length.max() > 0.2 * RADII[norm]


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_stay_in_ball_and_bounds(device, which, norm, dtype):
    search = Search((8, 3, 9, 9), norm, device=device, each=True)
    search.x = search.x.to(dtype)
    for name in ("x_best", "x_tried", "loss_best"):
        setattr(search, name, getattr(search, name).to(dtype))
    search.settings["eps"] = search.settings["eps"].to(dtype)
    search.settings["eps"][0] = 0
    search.settings["bounds"] = (0.1, 0.9)
    search.x.clamp_(0.1, 0.9)
    search.x_best.copy_(search.x)
    with backend.use("auto" if dtype == torch.float64 else which):
        search.step(0, 1, None)
        for query in range(12):
            search.step(query, 3, search.logits())
            assert search.x_tried.min() >= search.x.new_tensor(0.1)
            assert search.x_tried.max() <= search.x.new_tensor(0.9)
            change = (search.x_tried.double() - search.x[search.rows].double()).flatten(1)
            length = change.norm({"Linf": math.inf, "L2": 2, "L1": 1}[norm], dim=1)
            assert bool((length <= search.settings["eps"][search.rows] * (1 + 1e-6) + 1e-7).all())
    assert torch.equal(search.x_best[0], search.x[0])


# --- Statistics: the seed is fixed, so these hold or fail for good ----------------------------------------------------


def test_windows_and_signs_are_uniform():
    n, side = 4000, 3
    search = Search((n, 2, 7, 6), "Linf", rows=torch.arange(n))
    search.x.fill_(0.5), search.x_best.fill_(0.5), search.x_tried.fill_(0.5)
    search.state.fill_(RESUMED)
    search.step(9, side, search.logits())
    change = search.x_tried - 0.5
    assert bool(((change != 0).sum((1, 2, 3)) == 2 * side * side).all())
    counts = torch.zeros(5, 4)
    first = (change[:, 0] != 0).flatten(1).float().argmax(1)
    counts.index_put_((first // 6, first % 6), torch.ones(n), accumulate=True)
    assert counts.sum() == n
    expected = n / 20
    assert ((counts - expected).square() / expected).sum() < 43.8  # chi-squared of 19 degrees, probability 0.001
    signs = change.flatten(2).sum(2).sign()
    assert signs.mean(0).abs().max() < 5 / math.sqrt(n)
    assert abs((signs[:, 0] * signs[:, 1]).mean()) < 5 / math.sqrt(n)


# --- Bad input, and torch's own checks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dlr"}, "loss is 'dlr'; allowed are margin, ce"),
        ({"side": 9}, r"side is 9; it must be in \[0, 8\]"),
        ({"last_side": -1}, "last_side is -1"),
        ({"query": -1}, "query is -1"),
        ({"norm": "L2", "pattern": None}, "pattern is None; in L2"),
        ({"norm": "L2", "pattern": torch.ones(2, 2)}, r"pattern has shape \[2, 2\]"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"state": torch.ones(4)}, "state is torch.float32"),
        ({"rows": torch.arange(3)}, r"rows has shape \[3\]"),
        ({"loss_best": torch.ones(8)[::2]}, "loss_best has stride"),
        ({"logits": torch.ones(4, 1)}, r"logits have shape \[4, 1\]"),
        ({"logits": torch.ones(4)}, r"logits have shape \[4\]"),
        ({"logits": None, "side": 0}, "side is 0, and logits are None"),
        ({"seed": -1}, "seed is -1"),
        ({"first_sample": torch.arange(3)}, r"first_sample has shape \[3\]"),
        ({"first_sample": torch.arange(4.0)}, "first_sample is torch.float32"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x = torch.rand(4, 3, 8, 8)
    given = {
        "x_tried": x.clone(), "x_best": x.clone(), "x": x, "logits": torch.ones(4, 5),
        "y": torch.zeros(4, dtype=torch.int64), "loss_best": torch.zeros(4),
        "state": torch.ones(4, dtype=torch.uint8), "rows": torch.arange(4), "query": 1, "side": 3, "last_side": 3,
        "eps": 0.1, "seed": 1, **change,
    }  # fmt: skip
    with pytest.raises((InputError, InputTypeError), match=message):
        ops.square_step_(**given)


def test_memory_that_is_shared_is_refused():
    search = Search((4, 3, 8, 8), "Linf", rows=torch.arange(4))
    for name, other in (("x_tried", "x_best"), ("x_best", "x"), ("x_tried", "x")):
        broken = Search((4, 3, 8, 8), "Linf", rows=torch.arange(4))
        setattr(broken, name, getattr(broken, other))
        with pytest.raises(InputError, match="shares memory"):
            broken.step(1, 3, search.logits())


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm):
    s = Search((3, 2, 6, 6), norm)
    pattern = None if norm == "Linf" else ops.square_pattern(3, norm).float()
    arguments = (s.x_tried, s.x_best, s.x, s.logits(), s.y, s.loss_best, s.state, s.rows, 0.1, 0.0, 1.0, 5, 0, 2, 3, 3)
    torch.library.opcheck(torch.ops.afd.square_step_.default, (*arguments, None, norm, "margin", pattern, None))
    places = torch.arange(3)
    torch.library.opcheck(torch.ops.afd.square_step_.default, (*arguments, None, norm, "margin", pattern, None, places))


def test_versions_of_what_is_written_count():
    search = Search((3, 2, 6, 6), "Linf")
    written = (search.x_tried, search.x_best, search.loss_best, search.state)
    before = [t._version for t in written]
    search.step(1, 3, search.logits())
    assert all(t._version > version for t, version in zip(written, before, strict=True))


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 3, 33, 31), (3, 1, 28, 28), (2, 150_528), (2, 3, 224, 224)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_gpu_and_cpu_agree(cuda, shape, norm):
    with backend.use("native"):
        on_gpu = [t.cpu() for t in Search(shape, norm, device=cuda, layout="channels_last").run(4)]
        agree(on_gpu, Search(shape, norm, layout="channels_last").run(4), norm)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_graph_capture_replays_a_query(cuda, norm):
    searches = [Search((4, 3, 16, 16), norm, device=cuda) for _ in range(2)]
    logits, graph = torch.zeros(4, 4, device=cuda), torch.cuda.CUDAGraph()
    pattern = None if norm == "Linf" else ops.square_pattern(3, norm).to(logits)

    def query(search):
        ops.square_step_(
            search.x_tried, search.x_best, search.x, logits, search.y, loss_best=search.loss_best, state=search.state,
            rows=search.rows, query=3, side=3, last_side=3, pattern=pattern, **search.settings,
        )  # fmt: skip

    with backend.use("native"):
        for search in searches:
            search.step(0, 3, None)
        query(searches[0])
        with torch.cuda.graph(graph):
            query(searches[1])
        graph.replay()
    assert torch.equal(searches[0].x_tried, searches[1].x_tried)
