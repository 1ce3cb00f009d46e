"""pgd_step in L2 and L1: the direction against NumPy in float64, gradients of every scale, and every way to run it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.ops import backend, native

GRAD_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []
FREE = {"eps": 1e6, "bounds": (-1e6, 1e6)}  # nothing to project
shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4) | st.sampled_from([[1], [3, 3072], [2, 3, 33, 31]])


def drawn(shape: list[int], seed: int, grad_dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x_adv, x and a gradient; no two gradient sizes are equal, whatever the dtype keeps of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    x_adv = (x + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x_adv.to(device), x.to(device), grad.to(grad_dtype).to(device)


def step(which: str, *tensors: Tensor, **settings) -> Tensor:
    with backend.use(which):
        return ops.pgd_step(*tensors, **settings)


def direction(which: str, grad: Tensor, norm: str, **settings) -> Tensor:
    """Where a step of length 1 from the origin leads if nothing is in its way."""
    origin = torch.zeros(grad.shape, device=grad.device)
    return step(which, origin, origin, grad, alpha=1.0, norm=norm, **FREE, **settings)


def largest(grad: np.ndarray, count: int) -> np.ndarray:
    """The L1 direction of one sample."""
    size = np.where(np.isnan(grad), 0.0, np.abs(grad))
    moves = (size >= np.sort(size)[::-1][count - 1]) & (size > 0)
    return np.where(moves, np.sign(grad) / max(moves.sum(), 1), 0.0)


both = pytest.mark.parametrize("which", ["native", "reference"])


@given(
    shape=shapes,
    seed=st.integers(0, 2**32),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    norm=st.sampled_from(["L2", "L1"]),
    alpha=st.floats(-2, 2),
    eps=st.just(0.0) | st.floats(1e-3, 20),
    per_sample=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    sparsity=st.sampled_from([0.01, 0.05, 0.3, 1.0]),
)
def test_native_agrees_with_the_reference(device, shape, seed, grad_dtype, norm, alpha, eps, per_sample, sparsity):
    tensors = drawn(shape, seed, grad_dtype, device)
    settings = {"alpha": alpha, "eps": eps, "sparsity": sparsity, "norm": norm}
    for name, by_sample in zip(("alpha", "eps", "sparsity"), per_sample, strict=True):
        if by_sample:
            settings[name] = settings[name] * torch.linspace(0.25, 1, shape[0], device=device)
    got = step("native", *tensors, **settings)
    torch.testing.assert_close(got, step("reference", *tensors, **settings), rtol=1e-5, atol=3e-7)
    assert bool(((got >= 0) & (got <= 1)).all())


# --- L2 -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("scale", [1.0, 1e-44, 1e-38, 1e-20, 1e20, 5e37])
def test_l2_step_has_full_length_whatever_the_gradient_s_scale(device, which, scale):
    grad = torch.tensor([[3.0, -4.0, 0.0], [1.0, 0.0, 0.0]], device=device) * scale
    want = grad.double() / grad.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(direction(which, grad, "L2").double(), want, rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_l2_step_of_the_smallest_and_largest_gradients(device, which, grad_dtype):
    finfo = torch.finfo(grad_dtype)
    grad = torch.tensor([[finfo.smallest_normal * finfo.eps], [finfo.max]], dtype=grad_dtype).repeat(1, 4).to(device)
    torch.testing.assert_close(direction(which, grad, "L2"), torch.full((2, 4), 0.5, device=device))


@both
@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_zero_gradient_gives_no_step(device, which, norm):
    x_adv, x, grad = drawn([3, 50], 0, torch.float32, device)
    grad[1] = 0
    out = step(which, x_adv, x, grad, alpha=0.5, eps=100.0, norm=norm)
    assert torch.equal(out[1], x_adv[1])
    assert not torch.equal(out[0], x_adv[0])


@both
def test_l2_nan_counts_as_zero_and_infinity_as_the_largest(device, which):
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([[nan, 3.0, 4.0], [inf, -inf, 5.0], [nan, nan, nan]], device=device)
    root = 0.5**0.5
    want = torch.tensor([[0.0, 0.6, 0.8], [root, -root, 0.0], [0.0, 0.0, 0.0]], device=device)
    torch.testing.assert_close(direction(which, grad, "L2"), want, rtol=1e-6, atol=1e-7)


@both
def test_l2_step_ends_in_the_ball(device, which):
    x_adv, x, grad = drawn([8, 3072], 1, torch.float32, device)
    out = step(which, x_adv, x, grad, alpha=3.0, eps=0.5, norm="L2")
    lengths = (out.double() - x.double()).norm(dim=1)
    assert 0.4 < lengths.min().item() <= lengths.max().item() <= 0.5


# --- L1 -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("elements", "sparsity", "count"),
    [(1, 0.05, 1), (10, 0.05, 1), (10, 0.35, 4), (30, 0.05, 2), (3072, 0.05, 154), (3072, 1.0, 3072), (1000, 0.5, 500)],
)
def test_l1_step_moves_the_largest_share(device, which, elements, sparsity, count, grad_dtype):
    grad = torch.randn(3, elements, generator=torch.Generator().manual_seed(elements)).to(grad_dtype).to(device)
    got = direction(which, grad, "L1", sparsity=sparsity).double().cpu().numpy()
    for out, g in zip(got, grad.double().cpu().numpy(), strict=True):
        np.testing.assert_allclose(out, largest(g, count), rtol=1e-6, atol=0)


@both
def test_l1_step_moves_all_that_tie(device, which):
    grad = torch.tensor([[5.0, 2.0, -2.0, 2.0, 1.0, 0.0, 0.0, 0.0]], device=device)
    assert direction(which, grad, "L1", sparsity=0.25).tolist() == [[0.25, 0.25, -0.25, 0.25, 0.0, 0.0, 0.0, 0.0]]
    equal = torch.full((1, 1000), -1e-44, device=device)
    torch.testing.assert_close(direction(which, equal, "L1"), torch.full_like(equal, -1e-3))


@both
def test_l1_step_never_moves_zero_or_nan(device, which):
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([[0.0, 1e-44, nan, -0.0, 0.0, 0.0], [inf, 3e38, nan, -inf, 1.0, 0.0]], device=device)
    want = [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, -0.5, 0.0, 0.0]]
    assert direction(which, grad, "L1", sparsity=2 / 6).tolist() == want


@both
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_l1_selection_in_a_huge_sample(device, which, spread):
    grad = (spread * torch.randn(1, 150_528, generator=torch.Generator().manual_seed(3))).exp().to(device)
    got = direction(which, grad, "L1", sparsity=0.02)
    torch.testing.assert_close(got[0].cpu().double().numpy(), largest(grad[0].cpu().numpy(), 3011), rtol=1e-6, atol=0)


@both
def test_sparsity_per_sample(device, which):
    grad = torch.randn(4, 1000, generator=torch.Generator().manual_seed(4)).to(device)
    moved = direction(which, grad, "L1", sparsity=torch.tensor([0.001, 0.01, 0.5, 1.0], device=device)).ne(0).sum(1)
    assert moved.tolist() == [1, 10, 500, 1000]


@both
def test_l1_step_ends_in_the_ball(device, which):
    x_adv, x, grad = drawn([8, 3072], 5, torch.float32, device)
    out = step(which, x_adv, x, grad, alpha=5.0, eps=12.0, norm="L1")
    lengths = (out.double() - x.double()).abs().sum(1)
    assert 11.9999 < lengths.min().item() <= lengths.max().item() <= 12.0


# --- Both -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("broken", ["x_adv", "x", "eps", "alpha"])
def test_nan_in_the_iterate_image_or_setting_stays_visible(device, norm, broken, which):
    x_adv, x, grad = drawn([3, 70], 6, torch.float32, device)
    alpha, eps = (torch.full((3,), 0.1, device=device) for _ in range(2))
    {"x_adv": x_adv, "x": x, "eps": eps[:, None], "alpha": alpha[:, None]}[broken][1] = float("nan")
    out = step(which, x_adv, x, grad, alpha=alpha, eps=eps, norm=norm)
    assert bool(out[1].isnan().all())
    assert not bool(out[::2].isnan().any())


LAYOUTS = {
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@both
@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("x_adv_layout", LAYOUTS)
def test_layouts_and_in_place(device, which, x_adv_layout, grad_layout, norm):
    x_adv, x, grad = drawn([2, 3, 9, 11], 7, torch.bfloat16, device)
    want = step("reference", x_adv, x, grad, alpha=0.5, eps=1.0, norm=norm)
    laid = LAYOUTS[x_adv_layout](x_adv), x, LAYOUTS[grad_layout](grad)
    with backend.use(which):
        assert ops.pgd_step_(*laid, alpha=0.5, eps=1.0, norm=norm) is laid[0]
    torch.testing.assert_close(laid[0], want, rtol=0, atol=2e-7)


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, isa, grad_dtype, norm):
    tensors = drawn([4, 3079], 8, grad_dtype, torch.device("cpu"))
    want = step("native", *tensors, alpha=0.5, eps=1.0, norm=norm)
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    assert torch.equal(step("native", *tensors, alpha=0.5, eps=1.0, norm=norm), want)


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_batch_change_no_bit(threads, norm):
    x_adv, x, grad = drawn([7, 30_011], 9, torch.float32, torch.device("cpu"))
    want = torch.cat([
        step("native", x_adv[i : i + 1], x[i : i + 1], grad[i : i + 1], alpha=0.5, eps=1.0, norm=norm)
        for i in range(7)
    ])  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(step("native", x_adv, x, grad, alpha=0.5, eps=1.0, norm=norm), want)
    finally:
        torch.set_num_threads(before)


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [[1], [5, 7], [3, 4096], [2, 3, 33, 31], [3, 150_528]], ids=str)
def test_gpu_and_cpu_agree(cuda, shape, grad_dtype, norm):
    tensors = drawn(shape, 10, grad_dtype, torch.device("cpu"))
    on_cpu = step("native", *tensors, alpha=0.5, eps=1.0, norm=norm)
    on_gpu = step("native", *(t.to(cuda) for t in tensors), alpha=0.5, eps=1.0, norm=norm)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=2e-7)
    assert torch.equal(on_gpu, step("native", *(t.to(cuda) for t in tensors), alpha=0.5, eps=1.0, norm=norm))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("shape", [[8, 3072], [2, 150_528]], ids=str)
def test_graph_capture_replays_the_step(cuda, shape, norm):
    x_adv, x, grad = drawn(shape, 11, torch.float32, cuda)
    want = step("native", x_adv, x, grad, alpha=0.5, eps=1.0, norm=norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend.use("native"):
        ops.pgd_step_(x_adv, x, grad, alpha=0.5, eps=1.0, norm=norm)
    graph.replay()
    assert torch.equal(x_adv, want)
