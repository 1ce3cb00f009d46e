"""project: native and reference against exact float64 solvers written here, feasibility, and every way to run it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.ops import backend, native

NORMS = ["Linf", "L2", "L1"]
USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []
shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4) | st.sampled_from([[1], [3, 3072], [2, 3, 33, 31]])


def project(which: str, x_adv: Tensor, x: Tensor, **settings) -> Tensor:
    with backend.use(which):
        return ops.project(x_adv, x, **settings)


def length(u: np.ndarray, norm: str) -> float:
    size = np.abs(u)
    return {"Linf": size.max(initial=0.0), "L2": np.sqrt((size**2).sum()), "L1": size.sum()}[norm]


def exact(x_adv: np.ndarray, x: np.ndarray, eps: float, norm: str, low=0.0, high=1.0) -> np.ndarray:
    """The projection of one sample in float64."""
    u = x_adv.astype(np.float64) - x
    if norm == "Linf":
        return np.clip(x + np.clip(u, -eps, eps), low, high)
    if norm == "L2":
        return np.clip(x + u * (eps / max(length(u, norm), eps) if eps else 0.0), low, high)
    return x + np.sign(u) * l1_kept(np.abs(u), np.where(u > 0, high - x.astype(np.float64), x - low), eps)


def l1_kept(size: np.ndarray, room: np.ndarray, eps: float) -> np.ndarray:
    """min(max(size - lam, 0), room) with the sum eps: bisection over the sorted bends, then one linear equation."""

    def kept(lam: float) -> np.ndarray:
        return np.minimum(np.maximum(size - lam, 0.0), room)

    if kept(0.0).sum() <= eps:
        return kept(0.0)
    bends = np.unique(np.concatenate([[0.0], size, np.maximum(size - room, 0.0)]))
    first, last = 0, len(bends) - 1  # kept(bends[first]).sum() > eps >= kept(bends[last]).sum()
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if kept(bends[middle]).sum() > eps else (first, middle)
    above, below = kept(bends[first]).sum(), kept(bends[last]).sum()
    return kept(bends[last] - (bends[last] - bends[first]) * (eps - below) / (above - below))


def check_rows(got: Tensor, x_adv: Tensor, x: Tensor, eps, norm: str, bounds=(0.0, 1.0)) -> None:
    """Every row is the exact projection, in the ball and in the box."""
    rows = [t.double().cpu().flatten(1).numpy() if t.dim() > 1 else t.double().cpu()[:, None].numpy()
            for t in (got, x_adv, x)]  # fmt: skip
    radii = eps.tolist() if isinstance(eps, Tensor) else [eps] * x.shape[0]
    for out, point, image, radius in zip(*rows, radii, strict=True):
        want = exact(point, image, radius, norm, *bounds)
        rounding = 2e-7 + 1.2e-7 * np.abs(point - image)  # of the result, and of the difference of two floats
        share = 0 if norm == "Linf" else 1e-6 * radius  # what the length may be off by, as it may fall on one element
        assert (np.abs(out - want) <= 1e-5 * np.abs(want) + rounding + share).all()
        assert length(out - image, norm) <= radius + (1e-7 if norm == "Linf" else 1e-6 * radius)
        assert (out >= bounds[0]).all()
        assert (out <= bounds[1]).all()


@example(shape=[1, 3, 3, 4], seed=0, norm="L1", spread=30.0, eps=16.0, per_sample=False, bounds=(0.0, 1.0))
@given(
    shape=shapes,
    seed=st.integers(0, 2**32),
    norm=st.sampled_from(NORMS),
    spread=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    eps=st.just(0.0) | st.floats(1e-3, 50),
    per_sample=st.booleans(),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.25, 0.5)]),
)
def test_native_and_reference_are_the_projection(device, shape, seed, norm, spread, eps, per_sample, bounds):
    generator = torch.Generator().manual_seed(seed)
    x = (bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)).clamp(*bounds).to(device)
    x_adv = x + (spread * torch.randn(shape, generator=generator)).to(device)
    radius = eps * torch.rand(shape[0], generator=generator).to(device) if per_sample else eps
    for which in ("native", "reference"):
        got = project(which, x_adv, x, eps=radius, norm=norm, bounds=bounds)
        check_rows(got, x_adv, x, radius, norm, bounds)
    if norm == "Linf":
        assert torch.equal(project("native", x_adv, x, eps=radius, bounds=bounds), got)


# --- L1, where it is hard -------------------------------------------------------------------------------------------


def hard_cases() -> dict[str, tuple[Tensor, Tensor, float]]:
    """x_adv, x, eps of one sample each."""
    generator = torch.Generator().manual_seed(0)

    def uniform(n: int) -> Tensor:
        return torch.rand(1, n, generator=generator)

    def normal(n: int) -> Tensor:
        return torch.randn(1, n, generator=generator)

    middle = torch.full((1, 3072), 0.5)
    corner = (uniform(3072) < 0.5).float()
    heavy = 0.01 * normal(3072) / normal(3072)
    return {
        "random": (uniform(3072), uniform(3072), 12.0),
        "small eps": (uniform(3072), uniform(3072), 0.01),
        "sparse": (middle + normal(3072) * (uniform(3072) < 0.02), middle, 3.0),
        "tied": (middle + (8 * normal(3072)).round() / 16, middle, 5.0),
        "all equal": (middle + 0.25, middle, 1.0),
        "all equal, huge": (torch.full((1, 150_528), 0.5), torch.zeros(1, 150_528), 1.0),
        "huge": (uniform(150_528) + normal(150_528), uniform(150_528), 255.0),
        "corners, outwards": (corner + (2 * corner - 1), corner, 5.0),
        "corners, inwards": (corner - (2 * corner - 1) * uniform(3072), corner, 5.0),
        "corners, both": (corner + normal(3072), corner, 40.0),
        "heavy tails": (middle + heavy, middle, 1.0),
        "far away": (middle + 1e6 * normal(3072), middle, 20.0),
        "one far away": (middle + torch.where(torch.arange(3072) == 7, 1e30, 0.01), middle, 5.0),
        "barely outside": (middle + 1.000001 * 12 / 3072, middle, 12.0),
        "one element": (torch.tensor([[0.9]]), torch.tensor([[0.1]]), 0.3),
        "dust": (1e-30 * normal(1000), torch.zeros(1, 1000), 1e-29),
    }


HARD = hard_cases()


def excerpt(n: int) -> Tensor:
    """Where the CPU kernel looks first (csrc/cpu/l1_search.h), 0 and 1 [1, n]."""
    vectors = min(n // 128, 32)
    seen = torch.zeros(1, n)
    for i in range(vectors):
        first = n // 16 * i // vectors * 16
        seen[0, first : first + 16] = 1
    return seen


def misleading_cases() -> dict[str, tuple[Tensor, Tensor, float]]:
    """x_adv, x, eps of one sample each, where an excerpt or what is packed says little about the whole."""
    generator = torch.Generator().manual_seed(1)
    cases = {}
    for n in (767, 768, 3072, 150_528):
        middle, seen = torch.full((1, n), 0.5), excerpt(n)
        noise = torch.rand(1, n, generator=generator) - 0.5
        eps = n / 256
        cases[f"{n}: nothing in the excerpt"] = middle + noise * (1 - seen), middle, eps
        cases[f"{n}: all in the excerpt"] = middle + noise * seen, middle, eps
        cases[f"{n}: more in the excerpt, feasible"] = middle + noise * seen + 1e-4 * noise, middle, float(n)
        cases[f"{n}: less in the excerpt"] = middle + noise * (1 - 0.9 * seen), middle, eps
        cases[f"{n}: more in the excerpt"] = middle + noise * (0.01 + 0.99 * seen), middle, eps
        cases[f"{n}: tied outside the excerpt"] = middle + 0.25 * (1 - seen) + 0.3 * seen, middle, eps
    for n in (1, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 8191, 8192, 8193, 8207, 8208, 8209, 16_385):
        x = torch.rand(1, n, generator=generator)
        cases[f"{n}: all of it packed"] = x + 0.01 * torch.randn(1, n, generator=generator), x, 0.007 * n
        cases[f"{n}: dense"] = torch.rand(1, n, generator=generator), x, n / 256
    return cases


HARD |= misleading_cases()


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("case", HARD)
def test_l1_projection_of_hard_cases(device, case, which):
    x_adv, x, eps = HARD[case]
    got = project(which, x_adv.to(device), x.to(device), eps=eps, norm="L1")
    check_rows(got, x_adv, x, eps, "L1")
    again = project(which, got, x.to(device), eps=eps, norm="L1")
    assert torch.equal(again, got)


@pytest.mark.parametrize("which", ["native", "reference"])
def test_l1_keeps_its_precision_where_little_is_left_of_much(device, which):
    """0.5 falls to 1 / 150528, far below what a float threshold near 0.5 could resolve."""
    x_adv, x, eps = HARD["all equal, huge"]
    got = project(which, x_adv.to(device), x.to(device), eps=eps, norm="L1")
    np.testing.assert_allclose(got.cpu().numpy(), 1 / 150_528, rtol=1e-5)


@pytest.mark.parametrize("n", [3072, 150_528])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_l1_finds_what_is_not_finite_wherever_it_is(device, n, value):
    x_adv, x = drawn(device, 8, n)
    for row, place in enumerate([0, 15, 16, 1000, n // 2, n - 17, n - 1]):
        (x_adv if row % 2 else x)[row, place] = value
    out = project("native", x_adv, x, eps=12.0, norm="L1")
    assert bool(out[:7].isnan().all())
    assert not bool(out[7].isnan().any())


@given(seed=st.integers(0, 2**32), n=st.integers(1, 20_000), spread=st.sampled_from([1e-3, 0.03, 0.3]))
def test_l1_projection_of_a_mixture_is_exact(device, seed, n, spread):
    """Sizes that differ from stretch to stretch, so that an excerpt errs. Of larger ones the search knows less."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, n, generator=generator)
    scale = torch.rand(1, n // 64 + 1, generator=generator).pow(8).repeat_interleave(64, dim=1)[:, :n]
    x_adv = x + spread * scale * torch.randn(1, n, generator=generator)
    eps = float((x_adv - x).abs().sum()) * float(torch.rand(1, generator=generator)) ** 3
    got = project("native", x_adv.to(device), x.to(device), eps=eps, norm="L1")
    check_rows(got, x_adv, x, eps, "L1")
    assert torch.equal(project("native", got, x.to(device), eps=eps, norm="L1"), got)


# --- Properties of every norm ---------------------------------------------------------------------------------------


def drawn(device: torch.device, *shape: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    return (x + spread * torch.randn(shape, generator=generator)).to(device), x.to(device)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_feasible_points_keep_every_bit_and_results_are_feasible(device, norm, which):
    x_adv, x = drawn(device, 16, 3, 17, 19)
    once = project(which, x_adv, x, eps=4.0, norm=norm)
    assert torch.equal(project(which, once, x, eps=4.0, norm=norm), once)
    assert torch.equal(project(which, x, x, eps=0.0, norm=norm), x)
    assert torch.equal(project(which, x_adv, x, eps=0.0, norm=norm), x)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("broken", ["x_adv", "x", "eps"])
def test_nan_stays_visible_and_in_its_sample(device, norm, broken, which):
    x_adv, x = drawn(device, 3, 77)
    eps = torch.full((3,), 0.1, device=device)
    {"x_adv": x_adv, "x": x, "eps": eps[:, None]}[broken][1, 0] = float("nan")
    out = project(which, x_adv, x, eps=eps, norm=norm)
    assert bool(out[1, 0].isnan())
    assert not bool(out[::2].isnan().any())
    if norm != "Linf" or broken == "eps":
        assert bool(out[1].isnan().all())


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_infinite_point_has_no_projection(device, norm, which):
    x_adv, x = drawn(device, 2, 77)
    x_adv[1, 5] = float("inf")
    out = project(which, x_adv, x, eps=0.1, norm=norm)
    assert bool(out[1].isnan().all())
    assert not bool(out[0].isnan().any())


@pytest.mark.parametrize("norm", NORMS)
def test_rows_do_not_depend_on_their_batch(device, norm):
    x_adv, x = drawn(device, 5, 1003)
    eps = torch.linspace(0, 2, 5, device=device)
    together = project("native", x_adv, x, eps=eps, norm=norm)
    for i in range(5):
        alone = project("native", x_adv[i : i + 1], x[i : i + 1], eps=eps[i].item(), norm=norm)
        assert torch.equal(together[i : i + 1], alone)


LAYOUTS = {
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("x_adv_layout", LAYOUTS)
def test_layouts(device, x_adv_layout, x_layout, norm):
    x_adv, x = drawn(device, 2, 3, 9, 11)
    want = project("native", x_adv, x, eps=1.0, norm=norm)
    laid = LAYOUTS[x_adv_layout](x_adv), LAYOUTS[x_layout](x)
    torch.testing.assert_close(project("native", *laid, eps=1.0, norm=norm), want, rtol=0, atol=1e-7)
    with backend.use("native"):
        torch.testing.assert_close(ops.project_(*laid, eps=1.0, norm=norm), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_in_place_writes_and_returns_its_first_argument(device, norm, which):
    x_adv, x = drawn(device, 3, 111)
    want = project(which, x_adv, x, eps=0.5, norm=norm)
    before, kept = x_adv._version, x.clone()
    with backend.use(which):
        assert ops.project_(x_adv, x, eps=0.5, norm=norm) is x_adv
    assert torch.equal(x_adv, want)
    assert x_adv._version == before + 1
    assert torch.equal(x, kept)


def test_float64_is_served_in_float64():
    x = torch.full((1, 100), 0.5, dtype=torch.float64)
    for norm in NORMS:
        out = ops.project(x + 1e-9, x, eps=1e-12, norm=norm)
        assert out.dtype == torch.float64
        assert 0 < length((out - x).numpy(), norm) <= 1.001e-12


# --- Every way to run on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("elements", [77, 3079, 30_011])
def test_every_instruction_set_gives_the_same_bits(monkeypatch, isa, norm, elements):
    x_adv, x = drawn(torch.device("cpu"), 4, elements)
    want = project("native", x_adv, x, eps=3.0, norm=norm)
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    assert torch.equal(project("native", x_adv, x, eps=3.0, norm=norm), want)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads, norm):
    x_adv, x = drawn(torch.device("cpu"), 7, 30_011)
    want = project("native", x_adv, x, eps=3.0, norm=norm)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(project("native", x_adv, x, eps=3.0, norm=norm), want)
    finally:
        torch.set_num_threads(before)


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [[1], [5, 7], [3, 4096], [2, 3, 33, 31], [3, 150_528]], ids=str)
def test_gpu_and_cpu_agree(cuda, shape, norm):
    x_adv, x = drawn(torch.device("cpu"), *shape)
    on_gpu = project("native", x_adv.to(cuda), x.to(cuda), eps=1.0, norm=norm)
    torch.testing.assert_close(on_gpu.cpu(), project("native", x_adv, x, eps=1.0, norm=norm), rtol=1e-5, atol=1e-7)
    assert torch.equal(on_gpu, project("native", x_adv.to(cuda), x.to(cuda), eps=1.0, norm=norm))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [[8, 3072], [2, 150_528]], ids=str)
def test_graph_capture_replays_the_projection(cuda, shape, norm):
    x_adv, x = drawn(cuda, *shape)
    want = project("native", x_adv, x, eps=1.0, norm=norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend.use("native"):
        ops.project_(x_adv, x, eps=1.0, norm=norm)
    graph.replay()
    assert torch.equal(x_adv, want)


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("which", ["native", "reference"])
def test_a_negative_radius_of_a_sample_has_no_answer(device, norm, which):
    """It is not looked for, since that would wait; it spoils its own sample and no other."""
    x, x_adv = torch.rand(4, 9, device=device), torch.rand(4, 9, device=device)
    found = project(which, x_adv, x, eps=torch.tensor([0.1, -0.1, 0.0, -0.0], device=device), norm=norm)
    assert found.isnan().all(1).tolist() == [False, True, False, False]
    assert torch.equal(found.isnan().any(1), found.isnan().all(1))
    torch.testing.assert_close(found[2:], x[2:])
