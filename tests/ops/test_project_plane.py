"""project_plane: native and reference against float64 solvers by sorted bends written here, and every way to run it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.errors import InputError, InputTypeError
from afd.ops import backend, native

NORMS = ["Linf", "L2", "L1"]
ORDERS = {"Linf": np.inf, "L2": 2, "L1": 1}
WAYS = ["native", "reference"]
USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []


def project_plane(which: str, x: Tensor, w: Tensor, b: Tensor, **settings) -> tuple[Tensor, Tensor]:
    with backend.use(which):
        return ops.project_plane(x, w, b, **settings)


def exact(x, w, b, at, norm, low=0.0, high=1.0):
    """The distance of the plane from one point within the box (or of the nearest corner), and the value left there."""
    x, w, at = (np.asarray(one, dtype=np.float64) for one in (x, w, at))
    x = np.clip(x, low, high)
    value = float(b) + w @ (x - at)
    size = np.abs(w)
    room = np.where((w > 0) == (value > 0), x - low, high - x)[size > 0]
    size, need = size[size > 0], abs(value)
    left = need - (size * room).sum()
    if not need or not len(size):
        return 0.0, need
    if left >= 0:  # not even all of them
        return np.linalg.norm(room, ORDERS[norm]), left
    if norm == "L1":  # a knapsack: the cheapest first
        order = np.argsort(-size)
        spent = np.concatenate([[0.0], np.cumsum((size * room)[order])])
        last = np.searchsorted(spent, need) - 1
        return room[order][:last].sum() + (need - spent[last]) / size[order][last], 0.0
    pace = size if norm == "L2" else np.ones_like(size)

    def moved(t):
        return np.minimum(t * pace, room)

    bends = np.unique(np.concatenate([[0.0], room / pace]))
    first, last = 0, len(bends) - 1
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if size @ moved(bends[middle]) < need else (first, middle)
    start, end = (size @ moved(bends[i]) for i in (first, last))
    t = bends[first] + (bends[last] - bends[first]) * (need - start) / (end - start)
    return np.linalg.norm(moved(t), ORDERS[norm]), 0.0


def flat(x: Tensor) -> np.ndarray:
    return (x.double().flatten(1) if x.dim() > 1 else x.double()[:, None]).cpu().numpy()


def check(got, x, w, b, at, norm, bounds=(0.0, 1.0)) -> None:
    """Every point is in the box, on the plane (or as near as it gets), at the plane's distance, and that is told."""
    low, high = bounds
    points, told, rows, planes = flat(got[0]), got[1].tolist(), flat(x), flat(w)
    centres = np.zeros_like(planes) if at is None else flat(at)
    for i, (out, place) in enumerate(zip(points, rows, strict=True)):
        plane, centre, offset = planes[i % len(w)], centres[i % len(w)], float(b[i % len(w)])
        inside = np.clip(place, low, high)
        distance, left = exact(place, plane, offset, centre, norm, *bounds)
        assert (out >= low).all()
        assert (out <= high).all()
        # each element is rounded once, and weighed by its w
        rounding = 6.1e-8 * (np.abs(plane) @ np.maximum(np.abs(out), 1e-37)) + 1e-12 * (
            abs(offset) + np.abs(plane) @ np.abs(inside - centre)
        )
        assert abs(abs(offset + plane @ (out - centre)) - left) <= rounding
        moved = np.linalg.norm(out - inside, ORDERS[norm]) if len(out) else 0.0
        slack = np.linalg.norm(6.1e-8 * np.abs(out), ORDERS[norm]) if len(out) else 0.0
        assert moved <= distance * (1 + 1e-9) + slack
        assert moved >= distance * (1 - 1e-9) - slack
        assert told[i] == pytest.approx(moved, rel=1e-6, abs=1e-37)
        assert (out[plane == 0] == inside[plane == 0]).all()


def drawn(shape, seed=0, planes=None, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    of_plane = [planes or shape[0], *shape[1:]]
    w, b = torch.randn(of_plane, generator=generator), spread * torch.randn(of_plane[0], generator=generator)
    return x, w, b, torch.rand(of_plane, generator=generator)


# --- Against the solvers --------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4) | st.sampled_from([[1], [4, 3072], [2, 3, 33, 31]]),
    seed=st.integers(0, 2**32),
    norm=st.sampled_from(NORMS),
    spread=st.sampled_from([1e-6, 0.1, 3.0, 100.0]),
    ties=st.booleans(),
    counted=st.booleans(),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.25, 0.5)]),
)
def test_native_and_reference_find_the_nearest_point(device, shape, seed, norm, spread, ties, counted, bounds):
    x, w, b, at = drawn(shape, seed, spread=spread)
    x = (bounds[0] + (bounds[1] - bounds[0]) * x).clamp(*bounds)
    if ties:
        w, x = w.round(), (4 * x).round() / 4
    x, w, b, at = (one.to(device) for one in (x, w, b, at))
    for which in WAYS:
        settings = {"at": at if counted else None, "norm": norm, "bounds": bounds}
        check(project_plane(which, x, w, b, **settings), x, w, b, at if counted else None, norm, bounds)


def hard_cases() -> dict[str, tuple[Tensor, Tensor, float]]:
    """x, w and the plane's value at x, of one sample each."""
    generator = torch.Generator().manual_seed(0)

    def uniform(n):
        return torch.rand(n, generator=generator)

    def normal(n):
        return torch.randn(n, generator=generator)

    images = {"image": uniform(3072), "black and white": uniform(3072).round(), "black": torch.zeros(3072)}
    cases = {}
    for name, x in images.items():
        for value in (1e-7, -1e-3, 0.5, -20.0, 400.0):
            cases[f"{name}, {value}"] = x, normal(3072), value
    large = uniform(150_528)
    return cases | {
        "huge": (large, normal(150_528), 30.0),
        "huge, far": (large, normal(150_528), -3e4),
        "huge, heavy tails": (large, normal(150_528) / normal(150_528), 1e3),
        "huge, alike": (torch.full((150_528,), 0.5), torch.ones(150_528), 1e4),
        "huge, tied": (large, normal(150_528).sign(), -5e3),
        "tied": ((4 * uniform(3072)).round() / 4, normal(3072).round(), 30.0),
        "all tied": (uniform(3072), normal(3072).sign(), -100.0),
        "sparse": (uniform(3072), normal(3072) * (uniform(3072) < 0.02), 2.0),
        "one weight": (uniform(3072), (torch.arange(3072) == 1000).float(), 0.1),
        "one element": (torch.tensor([0.3]), torch.tensor([-2.0]), 0.5),
        "a weight far above the others": (uniform(99), torch.where(torch.arange(99) == 7, 1e30, 1.0), 40.0),
        "from tiny to huge weights": (uniform(250), 2.0 ** torch.arange(-125, 125) * normal(250).sign(), 1e-9),
        "rooms that halve": (0.5 ** torch.arange(100.0), 1.5 ** torch.arange(100.0), 1e3),
        "tiny weights": (uniform(999), 1e-42 * normal(999), 1e-41),
        "huge weights": (uniform(999), 1e38 * normal(999), 1e38),
        "on the plane": (uniform(999), normal(999), 0.0),
        "beyond the box": (uniform(999), normal(999), 1e6),
        "exactly at the far corner": (torch.full((64,), 0.5), torch.ones(64), 32.0),
        "no weights": (uniform(999), torch.zeros(999), 1.0),
        "no weights, on the plane": (uniform(999), -torch.zeros(999), 0.0),
    }


HARD = hard_cases()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(device, case, norm):
    x, w, value = HARD[case]
    x, w, b = x[None].to(device), w[None].to(device), torch.tensor([value], device=device)
    for which in WAYS:
        check(project_plane(which, x, w, b, at=x, norm=norm), x, w, b, x, norm)


@given(seed=st.integers(0, 2**32), n=st.integers(1, 5000), norm=st.sampled_from(NORMS), power=st.integers(0, 8))
def test_weights_of_many_sizes(device, seed, n, norm, power):
    """Weights and rooms over many orders of magnitude, from everywhere towards anywhere."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, n, generator=generator) ** (1 + power)
    w = torch.randn(1, n, generator=generator) * torch.rand(1, n, generator=generator) ** (4 * power)
    b = (2 * torch.rand(1, generator=generator) - 1) * 0.6 * w.abs().sum()
    x, w, b = (one.to(device) for one in (x, w, b))
    check(project_plane("native", x, w, b, at=x, norm=norm), x, w, b, x, norm)


@pytest.mark.parametrize("which", WAYS)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_share_planes(device, norm, which):
    x, w, b, at = (one.to(device) for one in drawn([6, 3, 5, 7], planes=2))
    points, distance = project_plane(which, x, w, b, at=at, norm=norm)
    check((points, distance), x, w, b, at, norm)
    alone = project_plane(which, x[3:4], w[1:], b[1:], at=at[1:], norm=norm)
    assert torch.equal(points[3:4], alone[0])
    assert torch.equal(distance[3:4], alone[1])


# --- Degenerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", WAYS)
@pytest.mark.parametrize("norm", NORMS)
def test_where_the_box_does_not_reach_the_plane_its_nearest_corner_is_found(device, norm, which):
    x = torch.tensor([[0.2, 0.7, 0.4]] * 2, device=device)
    w, b = torch.tensor([[1.0, -2.0, 0.0]] * 2, device=device), torch.tensor([9.0, -9.0], device=device)
    points, distance = project_plane(which, x, w, b, norm=norm)
    assert points.tolist() == [[0, 1, x[0, 2].item()], [1, 0, x[0, 2].item()]]
    wanted = (points - x).double().norm(p=ORDERS[norm], dim=1)
    torch.testing.assert_close(distance.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("which", WAYS)
@pytest.mark.parametrize("norm", NORMS)
def test_without_weights_or_on_the_plane_points_stay(device, norm, which):
    x = torch.rand(2, 77, device=device)
    w, b = torch.zeros_like(x), torch.tensor([1.0, -1.0], device=device)
    points, distance = project_plane(which, x, w, b, norm=norm)
    assert torch.equal(points, x)
    assert not distance.any()
    points, distance = project_plane(which, x, torch.randn(2, 77, device=device), 0 * b, at=x, norm=norm)
    assert torch.equal(points, x)
    assert not distance.any()


@pytest.mark.parametrize("which", WAYS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("broken", ["x", "w", "b", "at"])
def test_what_is_not_finite_spoils_its_sample_alone(device, norm, broken, value, which):
    tensors = dict(zip(("x", "w", "b", "at"), (one.to(device) for one in drawn([3, 77])), strict=True))
    tensors["w"][1, 5] = 0.0
    tensors[broken].view(3, -1)[1, 0 if broken == "b" else 5] = value
    points, distance = project_plane(which, **tensors, norm=norm)
    assert points.isnan().all(1).tolist() == [False, True, False]
    assert points.isnan().any(1).tolist() == [False, True, False]
    assert distance.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("which", WAYS)
@pytest.mark.parametrize("norm", NORMS)
def test_points_outside_of_the_box_count_as_the_nearest_ones_inside(device, norm, which):
    x, w, b, _ = (one.to(device) for one in drawn([5, 60]))
    outside = 3 * x - 1
    got = project_plane(which, outside, w, b, norm=norm)
    for one, other in zip(got, project_plane(which, outside.clamp(0, 1), w, b, norm=norm), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("which", WAYS)
@pytest.mark.parametrize("norm", NORMS)
def test_in_all_of_space_the_plane_is_as_far_as_textbooks_say(device, norm, which):
    x, w, b, at = (one.to(device) for one in drawn([4, 50], spread=30.0))
    w[3] = w[3].sign()  # all tie
    points, distance = project_plane(which, x, w, b, at=at, bounds=(-float("inf"), float("inf")), norm=norm)
    value = b.double() + (w.double() * (x.double() - at)).sum(1)
    dual = w.double().norm(p={"Linf": 1, "L2": 2, "L1": np.inf}[norm], dim=1)
    torch.testing.assert_close(distance.double(), value.abs() / dual, rtol=1e-5, atol=1e-6)
    left = b.double() + (w.double() * (points.double() - at)).sum(1)
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_ties_do_not_depend_on_their_order(device, norm):
    x, w = torch.rand(1, 90, device=device), torch.ones(1, 90, device=device)
    b, turned = torch.tensor([7.0], device=device), torch.randperm(90, device=device)
    points, _ = project_plane("native", x, w, b, at=x, norm=norm)
    again, _ = project_plane("native", x[:, turned], w, b, at=x[:, turned], norm=norm)
    torch.testing.assert_close(again, points[:, turned], rtol=1e-6, atol=1e-7)


# --- Dtypes and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_dtype(device, norm, dtype):
    x, w, b, at = (one.to(device) for one in drawn([3, 3, 9, 11]))
    w = w.to(dtype)
    for which in WAYS:
        got = project_plane(which, x, w, b, at=at, norm=norm)
        if dtype == torch.float64:
            want = project_plane("reference", x.double(), w, b.double(), at=at.double(), norm=norm)
            torch.testing.assert_close([one.double() for one in got], list(want), rtol=1e-5, atol=1e-6)
        else:
            check(got, x, w, b, at, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_float64_weights_beyond_float32_are_the_same_planes(device, norm, scale):
    x, w, b, _ = (one.to(device) for one in drawn([2, 99]))
    w = w.double() * scale
    w[1] = 0.0
    points, distance = project_plane("native", x, w, torch.zeros_like(b), norm=norm)
    want = project_plane("reference", x.double(), w / scale, 0 * b.double(), norm=norm)
    torch.testing.assert_close(points.double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distance.double(), want[1], rtol=1e-5, atol=1e-6)
    w[0, 3] = float("nan")
    assert project_plane("native", x, w, b, norm=norm)[1].isnan().tolist() == [True, False]


def test_float64_points_are_served_in_float64():
    for norm in NORMS:
        x = torch.full((1, 100), 0.5, dtype=torch.float64)
        points, distance = ops.project_plane(x, torch.ones_like(x), torch.tensor([1e-10]).double(), at=x, norm=norm)
        assert points.dtype == distance.dtype == torch.float64
        assert (points - x).sum().item() == pytest.approx(-1e-10, rel=1e-5)


LAYOUTS = {
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("w_layout", LAYOUTS)
def test_layouts(device, x_layout, w_layout, norm):
    x, w, b, at = (one.to(device) for one in drawn([4, 3, 9, 11], planes=2))
    want = project_plane("native", x, w, b, at=at, norm=norm)
    laid = LAYOUTS[x_layout](x), LAYOUTS[w_layout](w), torch.stack([b, b], 1)[:, 0]
    for centre in (at, LAYOUTS[w_layout](at)):
        got = project_plane("native", *laid, at=centre, norm=norm)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert got[0].stride() == torch.empty_like(laid[0]).stride()


@pytest.mark.parametrize("shape", [[0, 3], [0], [2, 0], [0, 3, 4, 4], [1]])
@pytest.mark.parametrize("norm", NORMS)
def test_empty_batches_and_images(device, shape, norm):
    x = torch.full(shape, 0.25, device=device)
    for which in WAYS:
        points, distance = project_plane(which, x, torch.ones_like(x), x.new_ones(shape[0]), norm=norm)
        assert points.shape == x.shape
        assert distance.tolist() == [0.25 if x.numel() else 0.0] * shape[0]


# --- Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"w": torch.rand(4, 6)}, InputError, "w has shape"),
        ({"w": torch.rand(4, 5)}, InputError, "w has shape"),
        ({"w": torch.rand(0, 5)}, InputError, "w has shape"),
        ({"w": torch.rand(6)}, InputError, "w has shape"),
        ({"w": torch.ones(3, 5, dtype=torch.int64)}, InputTypeError, "w is torch.int64"),
        ({"b": torch.rand(6)}, InputError, r"b has shape \[6\]; beside w it must be \[3\]"),
        ({"b": torch.rand(3).double()}, InputTypeError, "b is torch.float64"),
        ({"b": 0.5}, InputTypeError, "b is a float; it must be a torch.Tensor"),
        ({"at": torch.rand(6, 5)}, InputError, "at has shape"),
        ({"at": torch.rand(3, 5).half()}, InputTypeError, "at is torch.float16"),
        ({"x": torch.rand(6, 5).half()}, InputTypeError, "x is torch.float16"),
        ({"norm": "L3"}, InputError, "norm is 'L3'"),
        ({"bounds": (1.0, 0.0)}, InputError, "bounds are"),
    ],
)
def test_bad_arguments_are_named(changed, error, words):
    good = {"x": torch.rand(6, 5), "w": torch.rand(3, 5), "b": torch.rand(3)}
    with pytest.raises(error, match=words):
        ops.project_plane(**{**good, **changed})


def test_no_gradient_goes_through():
    x, w, b, at = drawn([3, 4])
    points, distance = ops.project_plane(x.requires_grad_(), w.requires_grad_(), b, at=at)
    assert not points.requires_grad
    assert not distance.requires_grad
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.ops.afd.project_plane(x, w, b, None, 0.0, 1.0, "L2")[0].sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(device, norm):
    x, w, b, at = (one.to(device) for one in drawn([4, 3, 5, 5], planes=2))
    for centre in (at, None):
        torch.library.opcheck(torch.ops.afd.project_plane.default, (x, w, b, centre, 0.0, 1.0, norm))


# --- Every way to run on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("elements", [1, 77, 3079, 30_011])
def test_every_instruction_set_gives_the_same_bits(monkeypatch, isa, norm, elements):
    x, w, b, at = drawn([4, elements])
    want = project_plane("native", x, w, b, at=at, norm=norm)
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    for one, other in zip(project_plane("native", x, w, b, at=at, norm=norm), want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads, norm):
    x, w, b, at = drawn([7, 30_011])
    want = project_plane("native", x, w, b, at=at, norm=norm)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for one, other in zip(project_plane("native", x, w, b, at=at, norm=norm), want, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [[1], [5, 7], [3, 4096], [2, 3, 33, 31], [3, 150_528]], ids=str)
def test_gpu_and_cpu_agree(cuda, shape, norm):
    tensors = drawn(shape)
    x, w, b, at = (one.to(cuda) for one in tensors)
    on_gpu = project_plane("native", x, w, b, at=at, norm=norm)
    on_cpu = project_plane("native", *tensors[:3], at=tensors[3], norm=norm)
    torch.testing.assert_close([one.cpu() for one in on_gpu], list(on_cpu), rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_graph_capture_replays_the_projection(cuda, norm):
    x, w, b, at = (one.to(cuda) for one in drawn([8, 3072]))
    want = project_plane("native", x, w, b, at=at, norm=norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend.use("native"):
        got = ops.project_plane(x, w, b, at=at, norm=norm)
    graph.replay()
    assert torch.equal(got[0], want[0])
