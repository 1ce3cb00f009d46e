"""apgd_update: whole runs against a slow transcription of Auto-PGD's rules that keeps every loss, sample by sample."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.ops import backend, native

CPU = torch.device("cpu")
USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []
GRAD_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HUNDRED = (22, 19, 16, 13, 10, 7, 6)  # the intervals of a run of 100 iterations, as the paper gives them


# --- The rules, one sample at a time --------------------------------------------------------------------------------


@dataclass
class Kept:
    """What the bookkeeping holds after an iteration; points are named by the iteration that made them."""

    moves: int
    now: int
    best: int
    fooling: int | None
    loss_best: float
    step: float
    increases: int
    reduced: bool


def transcribed(losses: list[float], fooled: list[bool], intervals: list[int], rho: float) -> list[Kept]:
    """Algorithm 1 of Croce & Hein (2020) for one sample, its history kept and searched anew at every checkpoint."""
    kept, step, reduced, best_at_check, last_check, fooling = [], 1.0, True, None, 0, None
    best = None
    for i, loss in enumerate(losses):
        moves, now = 0, i
        if best is None or loss > losses[best]:
            best, moves = i, 1
        if fooled[i]:
            fooling, moves = i, moves + 2
        rises = sum(later > earlier for earlier, later in itertools.pairwise(losses[last_check : i + 1]))
        if intervals[i]:
            assert i - last_check == intervals[i]
            oscillates = not rises > rho * intervals[i]
            stuck = not reduced and losses[best] == losses[best_at_check]
            reduced = oscillates or stuck
            if reduced:
                step, now, moves = step / 2, best, moves + 4
            best_at_check, last_check, rises = best, i, 0
        kept.append(Kept(moves, now, best, fooling, losses[best], step, rises, reduced))
    return kept


def transcribed_batch(losses, fooled, intervals: list[int], rho: float) -> list[list[Kept]]:
    """One history a sample, from losses and flags listed by iteration."""
    by_sample = ([list(column) for column in zip(*rows, strict=True)] for rows in (losses, fooled))
    return [transcribed(*both, intervals, rho) for both in zip(*by_sample, strict=True)]


# --- The op ---------------------------------------------------------------------------------------------------------


def fresh(like: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """State before the start point is known. Rows hold -1, which no iteration writes."""
    samples = like.shape[0]

    def full(value, dtype=like.dtype):
        return torch.full((samples,), value, dtype=dtype, device=like.device)

    return {
        "x_best": torch.full_like(like, -1), "grad_best": torch.full_like(grad, -1),
        "x_best_adv": torch.full_like(like, -1), "loss_best": full(-math.inf), "loss_last": full(math.inf),
        "loss_at_check": full(0.0), "step": full(1.0), "increases": full(0, torch.int32),
        "reduced": full(True, torch.bool), "broken": full(False, torch.bool), "moves": full(99, torch.uint8),
    }  # fmt: skip


def named(i: float | Tensor, like: Tensor) -> Tensor:
    """Rows that carry the number of an iteration, differing from sample to sample and element to element."""
    rows = torch.as_tensor(i, device=like.device).view(-1, *[1] * (like.dim() - 1))
    pattern = torch.arange(like.numel(), device=like.device).view(like.shape) % 5
    return (rows + 128 * pattern).to(like.dtype)


def check_run(which, losses, fooled, intervals, rho, shape, device=CPU, dtype=torch.float32, grad_dtype=None, **layout):
    """Runs the op over all iterations and compares everything it keeps, exactly."""
    x_adv = torch.zeros(len(losses[0]), *shape, dtype=dtype, device=device)
    grad = x_adv.to(grad_dtype or dtype, copy=True)
    if layout:
        x_adv, grad = x_adv.to(**layout), grad.to(**layout)
    state = fresh(x_adv, grad)
    want = transcribed_batch(losses, fooled, intervals, rho)
    for i, (loss, fools) in enumerate(zip(losses, fooled, strict=True)):
        x_adv.copy_(named(i, x_adv))
        grad.fill_(i)  # exact in every dtype
        at_x_adv = torch.tensor(loss, dtype=dtype, device=device), torch.tensor(fools, dtype=torch.bool, device=device)
        with backend.use(which):
            ops.apgd_update_(x_adv, grad, *at_x_adv, **state, interval=intervals[i], rho=rho)
        now = [kept[i] for kept in want]
        for name, column in {"moves": "moves", "step": "step", "increases": "increases", "reduced": "reduced",
                             "loss_best": "loss_best"}.items():  # fmt: skip
            assert state[name].tolist() == [getattr(kept, column) for kept in now], (name, i)
        assert state["broken"].tolist() == [kept.fooling is not None for kept in now]
        assert state["loss_last"].tolist() == list(loss)
        assert torch.equal(x_adv, named(torch.tensor([kept.now for kept in now]), x_adv))
        assert torch.equal(state["x_best"], named(torch.tensor([kept.best for kept in now]), x_adv))
        broken = state["broken"]
        fooling = named(torch.tensor([kept.fooling or 0 for kept in now]), x_adv)
        assert torch.equal(state["x_best_adv"][broken], fooling[broken])
        assert bool((state["x_best_adv"][~broken] == -1).all())
        for tensor, point in ((grad, "now"), (state["grad_best"], "best")):
            assert torch.equal(tensor, torch.zeros_like(tensor) + column_of(now, point, tensor))


def column_of(now: list[Kept], point: str, like: Tensor) -> Tensor:
    rows = torch.tensor([getattr(kept, point) for kept in now], device=like.device, dtype=like.dtype)
    return rows.view(-1, *[1] * (like.dim() - 1))


def schedule(intervals, iterations: int) -> list[int]:
    """Intervals, the last of them repeated, as one number an iteration: 0, or the interval that ends there."""
    marks, at, left = [0] * (iterations + 1), 0, itertools.chain(intervals, itertools.repeat(intervals[-1]))
    while (interval := next(left)) + at <= iterations:
        at += interval
        marks[at] = interval
    return marks


def walk(samples: int, iterations: int, seed: int) -> tuple[list, list]:
    """Losses that climb, wander and stall, with ties; and now and then a point that fools the model."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(-0.5, 2.5, samples).expand(iterations + 1, samples)
    moves = (drift + torch.randn(iterations + 1, samples, generator=generator)).round() / 4
    fooled = torch.rand(iterations + 1, samples, generator=generator) < torch.linspace(0, 0.2, samples)
    return moves.cumsum(0).tolist(), fooled.tolist()


@pytest.mark.parametrize("rho", [0.75, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("which", ["native", "reference"])
def test_a_hundred_iterations(device, which, rho):
    losses, fooled = walk(31, 100, seed=1)
    intervals = schedule(HUNDRED, 100)
    kinds = {kept.moves for run in transcribed_batch(losses, fooled, intervals, rho) for kept in run}
    assert rho not in (0.5, 0.75) or kinds == set(range(8))  # every combination of moves occurs
    check_run(which, losses, fooled, intervals, rho, (3, 5), device)


@given(
    samples=st.integers(0, 9),
    shape=st.sampled_from([(), (1,), (7,), (3, 4, 4), (0,)]),
    iterations=st.integers(0, 40),
    intervals=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rho=st.sampled_from([0.75, 0.7, 0.1, 0.0, 1.0]) | st.floats(0, 1),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    which=st.sampled_from(["native", "reference"]),
    seed=st.integers(0, 2**32),
)
def test_any_run(device, samples, shape, iterations, intervals, rho, grad_dtype, which, seed):
    losses, fooled = walk(samples, iterations, seed)
    check_run(which, losses, fooled, schedule(intervals, iterations), rho, shape, device, grad_dtype=grad_dtype)


@given(
    losses=st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, 2.0**100, -(2.0**100), math.inf]), min_size=1, max_size=30),
    interval=st.integers(1, 6),
    which=st.sampled_from(["native", "reference"]),
)
def test_ties_and_extremes(device, losses, interval, which):
    rows, iterations = [[loss] for loss in losses], len(losses) - 1
    check_run(which, rows, [[False]] * len(rows), schedule([interval], iterations), 0.75, (2,), device)


def test_float64_is_served_by_the_reference():
    losses, fooled = walk(5, 30, seed=2)
    check_run("auto", losses, fooled, schedule([4, 3], 30), 0.75, (6,), dtype=torch.float64)


def test_channels_last_rows(device):
    losses, fooled = walk(6, 30, seed=3)
    layout = {"memory_format": torch.channels_last}
    check_run("native", losses, fooled, schedule([4, 3], 30), 0.75, (3, 4, 5), device, **layout)


@pytest.mark.parametrize("which", ["native", "reference"])
def test_a_nan_loss_is_never_the_best(device, which):
    x_adv, grad = torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device)
    state, nothing = fresh(x_adv, grad), torch.zeros(2, dtype=torch.bool, device=device)
    with backend.use(which):
        for i, loss in enumerate([[math.nan, 1.0], [2.0, math.nan], [math.nan, 3.0]]):
            x_adv.fill_(i)
            ops.apgd_update_(x_adv, grad, torch.tensor(loss, device=device), nothing, **state)
    assert state["loss_best"].tolist() == [2.0, 3.0]
    assert state["x_best"][:, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("odd", ["x_adv", "grad", "x_best", "grad_best", "x_best_adv"])
def test_mixed_layouts_change_no_value(device, odd):
    def run(which, change):
        generator = torch.Generator().manual_seed(4)
        rows = {name: torch.rand(4, 3, 5, 5, generator=generator).to(device)
                for name in ("x_adv", "grad", "x_best", "grad_best", "x_best_adv")}  # fmt: skip
        rows[odd] = change(rows[odd])
        loss, fooled = (
            torch.tensor([0.0, 1.0, 0.0, 1.0]).to(device),
            torch.tensor([True, True, False, False]).to(device),
        )
        state = fresh(rows["x_adv"], rows["grad"]) | {"loss_best": torch.full((4,), 0.5, device=device)}
        state |= {name: rows[name] for name in ("x_best", "grad_best", "x_best_adv")}
        with backend.use(which):
            ops.apgd_update_(rows["x_adv"], rows["grad"], loss, fooled, **state, interval=3)
        return {**rows, **state}

    want = run("reference", lambda t: t)
    changes = [lambda t: t.to(memory_format=torch.channels_last), lambda t: torch.stack([t, t], -1)[..., 0],
               lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)]  # fmt: skip
    for change in changes:
        got = run("native", change)
        assert all(torch.equal(got[name], want[name]) for name in want)


# --- What it refuses, and what it marks as changed ------------------------------------------------------------------


def good() -> dict:
    x_adv, grad = torch.rand(3, 4), torch.rand(3, 4)
    return {"x_adv": x_adv, "grad": grad, "loss": torch.rand(3), "fooled": torch.ones(3, dtype=torch.bool),
            **fresh(x_adv, grad)}  # fmt: skip


SHARED = torch.rand(3, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_adv": torch.rand(3, 4).half()}, TypeError, "x_adv is torch.float16; allowed are torch.float32"),
        ({"grad": torch.ones(3, 4).int()}, TypeError, "grad is torch.int32; allowed are torch.float32, torch.float16"),
        ({"grad": torch.ones(3, 4).half()}, TypeError, "grad_best is torch.float32; it must be torch.float16"),
        ({"x_best": torch.rand(2, 4)}, ValueError, "x_best has shape [2, 4]; beside x_adv it must be [3, 4]"),
        ({"loss": torch.tensor(1.0)}, ValueError, "loss has shape []; beside x_adv it must be [3]"),
        ({"loss": torch.rand(3).double()}, TypeError, "loss is torch.float64; it must be torch.float32"),
        ({"loss": torch.rand(6)[::2]}, ValueError, "loss has stride (2,); per-sample values must be contiguous"),
        ({"fooled": torch.ones(3)}, TypeError, "fooled is torch.float32; it must be torch.bool"),
        ({"increases": torch.ones(3)}, TypeError, "increases is torch.float32; it must be torch.int32"),
        ({"moves": torch.ones(3).bool()}, TypeError, "moves is torch.bool; it must be torch.uint8"),
        ({"x_best": SHARED, "x_best_adv": SHARED}, ValueError, "x_best_adv shares memory with x_best"),
        ({"x_adv": SHARED, "grad": SHARED}, ValueError, "grad shares memory with x_adv"),
        ({"loss": SHARED[0, :3], "loss_best": SHARED[0, :3]}, ValueError, "loss shares memory with loss_best"),
        ({"interval": -1}, ValueError, "interval is -1; it must be 0 (no checkpoint) or the iterations since"),
        ({"rho": 1.5}, ValueError, "rho is 1.5; it must be in [0, 1]"),
        ({"rho": math.nan}, ValueError, "rho is nan; it must be in [0, 1]"),
    ],
)
@pytest.mark.parametrize("which", ["native", "reference"])
def test_refuses(which, change, error, words):
    with backend.use(which), pytest.raises(error, match=re.escape(words)):
        ops.apgd_update_(**(good() | change))


def test_neighbours_in_one_buffer_are_fine():
    buffer = torch.zeros(6, 3)
    per_sample = ("loss", "loss_best", "loss_last", "loss_at_check", "step")
    ops.apgd_update_(**(good() | {name: buffer[i] for i, name in enumerate(per_sample)}))


@pytest.mark.parametrize("which", ["native", "reference"])
def test_everything_but_loss_and_fooled_counts_as_changed(which):
    call = good()
    before = {name: tensor._version for name, tensor in call.items()}
    with backend.use(which):
        ops.apgd_update_(**call, interval=1)
    for name, tensor in call.items():
        assert (tensor._version > before[name]) == (name not in ("loss", "fooled")), name


@pytest.mark.parametrize("interval", [0, 3])
def test_opcheck(device, interval):
    arguments = [tensor.to(device) for tensor in good().values()]
    torch.library.opcheck(torch.ops.afd.apgd_update_.default, (*arguments, interval, 0.75))


# --- Every way to run on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_every_instruction_set_decides_alike(monkeypatch, isa):
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    losses, fooled = walk(12, 60, seed=5)
    check_run("native", losses, fooled, schedule(HUNDRED, 60), 0.75, (1000,))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    losses, fooled = walk(7, 30, seed=6)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_run("native", losses, fooled, schedule([5, 4, 3], 30), 0.75, (20_011,))
    finally:
        torch.set_num_threads(before)


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graph_capture_replays_an_iteration(cuda):
    x_adv, grad = torch.rand(8, 3, 32, 32, device=cuda), torch.rand(8, 3, 32, 32, device=cuda)
    state, loss = fresh(x_adv, grad), torch.rand(8, device=cuda)
    fooled = torch.zeros(8, dtype=torch.bool, device=cuda)
    others = fresh(x_adv, grad)
    ops.apgd_update_(x_adv, grad, loss, fooled, **others, interval=2)  # kernels are loaded by their first launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend.use("native"):
        ops.apgd_update_(x_adv, grad, loss, fooled, **state, interval=2)
    graph.replay()
    assert state["moves"].tolist() == [5] * 8  # a new best, and a step halved: the loss never rose
    loss += 1
    fooled[3] = True
    graph.replay()
    assert state["moves"].tolist() == [5, 5, 5, 7, 5, 5, 5, 5]
    assert torch.equal(state["x_best_adv"][3], x_adv[3])
