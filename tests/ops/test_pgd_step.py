"""pgd_step: native against a float64 formula, and bit for bit against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.errors import InputError
from afd.ops import backend, native

GRAD_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ROUNDING = 2.5e-7  # one unit in the last place of float32 just above 1: the largest intermediate is below 2
# Gradients whose sign is easily lost; the smallest vanish (and rightly count as zero) in the narrow dtypes.
AWKWARD = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-60, -1e-60, 1e-44, -1e-44, 6e-8, -6e-8]
USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4) | st.sampled_from(
    [[1], [40_001], [3, 33_333], [2, 3, 33, 31]]
)


def drawn(shape: list[int], seed: int, grad_dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x_adv, x and a gradient with awkward values sprinkled in."""
    generator = torch.Generator().manual_seed(seed)
    x, x_adv = (torch.rand(shape, generator=generator) for _ in range(2))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    if grad.numel():
        places = torch.randint(grad.numel(), (2 * len(AWKWARD),), generator=generator)
        grad.view(-1)[places] = torch.tensor(AWKWARD * 2, dtype=torch.float64)
    return x_adv.to(device), x.to(device), grad.to(grad_dtype).to(device)


def formula(x_adv: Tensor, x: Tensor, grad: Tensor, alpha, eps, low: float, high: float) -> np.ndarray:
    """The step in float64 NumPy, written from the paper and not from the code."""

    def wide(t):
        return t.double().cpu().numpy() if isinstance(t, Tensor) else t

    def column(setting):
        return wide(setting).reshape(-1, *[1] * (x.dim() - 1)) if isinstance(setting, Tensor) else setting

    direction = np.sign(np.nan_to_num(wide(grad), nan=0.0))
    delta = wide(x_adv) + column(alpha) * direction - wide(x)
    return np.clip(wide(x) + np.clip(delta, -column(eps), column(eps)), low, high)


def step(which: str, *tensors: Tensor, **settings) -> Tensor:
    with backend.use(which):
        return ops.pgd_step(*tensors, **settings)


def bits(t: Tensor) -> list[int]:
    return t.contiguous().view(torch.int32).cpu()


@given(
    shape=shapes,
    seed=st.integers(0, 2**32),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    alpha=st.floats(-0.3, 0.3),
    eps=st.just(0.0) | st.floats(0, 0.5),
    per_sample=st.tuples(st.booleans(), st.booleans()),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.25, 0.5)]),
)
def test_native_is_the_formula_and_the_reference(device, shape, seed, grad_dtype, alpha, eps, per_sample, bounds):
    tensors = drawn(shape, seed, grad_dtype, device)
    if per_sample[0]:
        alpha = alpha * torch.rand(shape[0], device=device)
    if per_sample[1]:
        eps = eps * torch.rand(shape[0], device=device)
    got = step("native", *tensors, alpha=alpha, eps=eps, bounds=bounds)
    np.testing.assert_allclose(got.cpu().numpy(), formula(*tensors, alpha, eps, *bounds), rtol=0, atol=ROUNDING)
    assert torch.equal(bits(got), bits(step("reference", *tensors, alpha=alpha, eps=eps, bounds=bounds)))


@given(shape=shapes, seed=st.integers(0, 2**32), alpha=st.floats(-10, 10), eps=st.floats(0, 2))
def test_result_lies_in_the_ball_and_in_the_bounds(device, shape, seed, alpha, eps):
    x_adv, x, grad = drawn(shape, seed, torch.float32, device)
    out = step("native", x_adv, x, grad, alpha=alpha, eps=eps)
    assert bool(((out >= x - eps) & (out <= x + eps)).all())
    assert bool(((out >= 0) & (out <= 1)).all())


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("which", ["native", "reference"])
def test_every_kind_of_gradient_steps_by_its_sign(device, which, grad_dtype):
    tiny = torch.finfo(grad_dtype).smallest_normal * torch.finfo(grad_dtype).eps  # the smallest denormal
    inf, nan = float("inf"), float("nan")
    grad = torch.tensor([1.0, -1.0, inf, -inf, tiny, -tiny, 0.0, -0.0, nan], dtype=grad_dtype, device=device)
    assert grad[4] != 0
    x = torch.full((9,), 0.5, device=device)
    out = step(which, x, x, grad, alpha=0.125, eps=0.25)
    assert out.tolist() == [0.625, 0.375, 0.625, 0.375, 0.625, 0.375, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("broken", ["x_adv", "x", "eps"])
def test_nan_in_the_iterate_image_or_radius_stays_visible(device, which, broken):
    x_adv, x, grad = drawn([2, 70], 0, torch.float32, device)
    eps = torch.full((2,), 0.1, device=device)
    {"x_adv": x_adv, "x": x, "eps": eps[:, None]}[broken][1] = float("nan")
    out = step(which, x_adv, x, grad, alpha=0.01, eps=eps)
    assert bool(out[1].isnan().all())
    assert not bool(out[0].isnan().any())


def test_zero_radius_gives_back_the_image(device):
    x_adv, x, grad = drawn([3, 50], 1, torch.float32, device)
    assert torch.equal(step("native", x_adv, x, grad, alpha=0.1, eps=0.0), x)


def test_negative_alpha_descends(device):
    x = torch.full((2, 9), 0.5, device=device)
    grad = torch.ones_like(x)
    assert step("native", x, x, grad, alpha=-0.125, eps=0.5).unique().tolist() == [0.375]


def test_per_sample_settings_belong_to_their_sample(device):
    x_adv, x, grad = drawn([5, 3, 7], 2, torch.float32, device)
    alpha, eps = torch.rand(5, device=device) / 4, torch.rand(5, device=device) / 4
    together = step("native", x_adv, x, grad, alpha=alpha, eps=eps)
    for i in range(5):
        row = slice(i, i + 1)
        alone = step("native", x_adv[row], x[row], grad[row], alpha=alpha[i].item(), eps=eps[i].item())
        assert torch.equal(together[row], alone)


# --- Layouts --------------------------------------------------------------------------------------------------------


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0]


def misaligned(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


LAYOUTS = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.clone(memory_format=torch.contiguous_format).mT,
    "strided": strided,
    "misaligned": misaligned,
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("x_adv_layout", LAYOUTS)
def test_layout_changes_no_value(device, x_adv_layout, x_layout, grad_layout):
    x_adv, x, grad = drawn([2, 3, 4, 5], 3, torch.bfloat16, device)
    settings = {"alpha": torch.tensor([0.1, 0.2], device=device), "eps": 0.3}
    want = step("reference", x_adv, x, grad, **settings)
    laid = LAYOUTS[x_adv_layout](x_adv), LAYOUTS[x_layout](x), LAYOUTS[grad_layout](grad)
    assert torch.equal(step("native", *laid, **settings), want)
    with backend.use("native"):
        assert torch.equal(ops.pgd_step_(*laid, **settings), want)


def test_expanded_inputs_are_read_right(device):
    x_adv, x, grad = drawn([4, 6], 4, torch.float32, device)
    x, grad = x[:1].expand(4, 6), grad[:, :1].expand(4, 6)
    got = step("native", x_adv, x, grad, alpha=0.1, eps=0.2)
    assert torch.equal(got, step("reference", x_adv, x, grad, alpha=0.1, eps=0.2))


def test_expanded_iterate_cannot_be_written_in_place(device):
    x = torch.rand(1, 6, device=device)
    with pytest.raises(InputError, match=r"x_adv has shape \[4, 6\] and stride \(0, 1\), so that elements"):
        ops.pgd_step_(x.expand(4, 6), x.repeat(4, 1), x.repeat(4, 1), alpha=0.1, eps=0.1)


# --- In place -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["native", "reference"])
def test_in_place_writes_and_returns_its_first_argument(device, which):
    x_adv, x, grad = drawn([3, 11], 5, torch.float32, device)
    want = step(which, x_adv, x, grad, alpha=0.1, eps=0.2)
    before, kept = x_adv._version, (x.clone(), grad.clone())
    with backend.use(which):
        assert ops.pgd_step_(x_adv, x, grad, alpha=0.1, eps=0.2) is x_adv
    assert torch.equal(x_adv, want)
    assert x_adv._version == before + 1  # or autograd would not see that a saved tensor has changed
    assert torch.equal(x, kept[0])
    assert torch.equal(bits(grad), bits(kept[1]))


# --- Every way to run on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, isa, grad_dtype):
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    tensors = drawn([3, 12_347], 6, grad_dtype, torch.device("cpu"))
    for alpha in (0.1, torch.tensor([0.1, -0.2, 0.3])):
        got = step("native", *tensors, alpha=alpha, eps=0.25)
        assert torch.equal(bits(got), bits(step("reference", *tensors, alpha=alpha, eps=0.25)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads):
    tensors = drawn([7, 30_011], 7, torch.float32, torch.device("cpu"))
    eps = torch.linspace(0, 0.3, 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = step("native", *tensors, alpha=0.1, eps=eps)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(got), bits(step("reference", *tensors, alpha=0.1, eps=eps)))


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [[1], [5, 7], [3, 4096], [2, 3, 33, 31]], ids=str)
def test_gpu_and_cpu_agree_bit_for_bit(cuda, shape, grad_dtype):
    tensors = drawn(shape, 8, grad_dtype, torch.device("cpu"))
    on_cpu = step("native", *tensors, alpha=0.1, eps=0.25)
    on_gpu = step("native", *(t.to(cuda) for t in tensors), alpha=0.1, eps=0.25)
    assert torch.equal(bits(on_gpu), bits(on_cpu))


@pytest.mark.gpu
def test_waits_for_the_current_stream_only(cuda):
    x_adv, x, grad = drawn([64, 3, 32, 32], 9, torch.float32, cuda)
    want = step("native", x_adv, x, grad, alpha=0.1, eps=0.25)
    late = torch.zeros_like(x_adv)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # so that a kernel on another stream would read zeros
        late.copy_(x_adv)
        got = step("native", late, x, grad, alpha=0.1, eps=0.25)
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_graph_capture_replays_the_step(cuda):
    x_adv, x, grad = drawn([8, 3, 32, 32], 10, torch.float32, cuda)
    want = step("native", step("native", x_adv, x, grad, alpha=0.1, eps=0.3), x, grad, alpha=0.1, eps=0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend.use("native"):
        ops.pgd_step_(x_adv, x, grad, alpha=0.1, eps=0.3)
    graph.replay()
    graph.replay()
    assert torch.equal(x_adv, want)


@pytest.mark.gpu
def test_second_gpu_is_served_while_the_first_is_current(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = drawn([3, 1000], 11, torch.float32, torch.device("cuda:1"))
    got = step("native", *tensors, alpha=0.1, eps=0.2)
    assert torch.equal(got, step("reference", *tensors, alpha=0.1, eps=0.2))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("shape", [(4, 1, 6, 5), (1, 3, 6, 5), (4, 3, 1, 1)])
def test_strides_of_size_one_dimensions_do_not_matter(shape):
    """A channels_last tensor with one channel is contiguous too, but its strides say otherwise."""
    x, grad = torch.rand(shape), torch.randn(shape)
    odd = grad.to(memory_format=torch.channels_last)
    got = ops.pgd_step(x, x.clone(), odd, alpha=0.02, eps=0.1)
    assert torch.equal(got, ops.pgd_step(x, x.clone(), grad, alpha=0.02, eps=0.1))
