"""apgd_step: native against a float64 formula, and bit for bit against the reference."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.ops import backend, native

GRAD_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ROUNDING = 1e-6  # a few units in the last place of float32: the largest intermediate is below 4
AWKWARD = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-60, -1e-60, 1e-44, -1e-44, 6e-8, -6e-8]
USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []
CPU = torch.device("cpu")

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4) | st.sampled_from([[1], [40_001], [2, 3, 33, 31]])


def drawn(shape: list[int], seed: int, grad_dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x_adv, x_adv_old, x and a gradient with awkward values sprinkled in."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(shape, generator=generator).to(device) for _ in range(3)]
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    if grad.numel():
        places = torch.randint(grad.numel(), (2 * len(AWKWARD),), generator=generator)
        grad.view(-1)[places] = torch.tensor(AWKWARD * 2, dtype=torch.float64)
    return [*images, grad.to(grad_dtype).to(device)]


def formula(*tensors: Tensor, step, eps, a: float, bounds: tuple[float, float]) -> np.ndarray:
    """The step in float64 NumPy, written from the paper and not from the code."""

    def column(setting):
        return setting.double().cpu().numpy().reshape(-1, *[1] * (x.ndim - 1)) if torch.is_tensor(setting) else setting

    def project(point):
        return np.clip(x + np.clip(point - x, -column(eps), column(eps)), *bounds)

    x_adv, x_adv_old, x, grad = (t.double().cpu().numpy() for t in tensors)
    z = project(x_adv + column(step) * np.sign(np.nan_to_num(grad, nan=0.0)))
    return project(x_adv + a * (z - x_adv) + (1 - a) * (x_adv - x_adv_old))


def take(which: str, *tensors: Tensor, **settings) -> Tensor:
    with backend.use(which):
        return ops.apgd_step(*tensors, **settings)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.uint8).cpu()


@given(
    shape=shapes,
    seed=st.integers(0, 2**32),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    step=st.floats(-0.3, 0.3),
    eps=st.just(0.0) | st.floats(0, 0.5),
    a=st.sampled_from([0.75, 1.0, 0.0]) | st.floats(0, 1),
    per_sample=st.tuples(st.booleans(), st.booleans()),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.25, 0.5)]),
)
def test_native_is_the_formula_and_the_reference(device, shape, seed, grad_dtype, step, eps, a, per_sample, bounds):
    tensors = drawn(shape, seed, grad_dtype, device)
    if per_sample[0]:
        step = step * torch.rand(shape[0], device=device)
    if per_sample[1]:
        eps = eps * torch.rand(shape[0], device=device)
    settings = {"step": step, "eps": eps, "a": a, "bounds": bounds}
    got = take("native", *tensors, **settings)
    np.testing.assert_allclose(got.cpu().numpy(), formula(*tensors, **settings), rtol=0, atol=ROUNDING)
    assert torch.equal(bits(got), bits(take("reference", *tensors, **settings)))


@given(shape=shapes, seed=st.integers(0, 2**32), step=st.floats(-10, 10), eps=st.floats(0, 2))
def test_result_lies_in_the_ball_and_in_the_bounds(device, shape, seed, step, eps):
    x_adv, x_adv_old, x, grad = drawn(shape, seed, torch.float32, device)
    out = take("native", x_adv, x_adv_old, x, grad, step=step, eps=eps)
    assert bool(((out >= x - eps) & (out <= x + eps)).all())
    assert bool(((out >= 0) & (out <= 1)).all())


def test_first_step_is_a_pgd_step_up_to_rounding(device):
    """With a = 1 the previous iterate has no weight."""
    x_adv, x_adv_old, x, grad = drawn([3, 50], 0, torch.float32, device)
    got = take("native", x_adv, x_adv_old, x, grad, step=0.1, eps=0.2, a=1.0)
    torch.testing.assert_close(got, ops.pgd_step(x_adv, x, grad, alpha=0.1, eps=0.2), atol=2e-7, rtol=0)


def test_composition_for_other_norms_gives_the_linf_step(device):
    x_adv, x_adv_old, x, grad = drawn([3, 50], 1, torch.float32, device)
    z = ops.pgd_step(x_adv, x, grad, alpha=0.1, eps=0.2)
    mixed = ops.momentum_point(x_adv, x_adv_old, z)
    composed = ops.pgd_step(mixed, x, grad, alpha=0.0, eps=0.2)  # a step of 0 projects
    assert torch.equal(take("native", x_adv, x_adv_old, x, grad, step=0.1, eps=0.2), composed)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("broken", ["x_adv", "x_adv_old", "x", "eps", "step"])
def test_nan_in_an_iterate_image_or_setting_stays_visible(device, which, broken):
    x_adv, x_adv_old, x, grad = drawn([2, 70], 0, torch.float32, device)
    eps, step = torch.full((2,), 0.1, device=device), torch.full((2,), 0.01, device=device)
    named = {"x_adv": x_adv, "x_adv_old": x_adv_old, "x": x, "eps": eps[:, None], "step": step[:, None]}
    named[broken][1] = float("nan")
    out = take(which, x_adv, x_adv_old, x, grad, step=step, eps=eps)
    assert bool(out[1].isnan().all())
    assert not bool(out[0].isnan().any())


def test_per_sample_settings_belong_to_their_sample(device):
    tensors = drawn([5, 3, 7], 2, torch.float32, device)
    step, eps = torch.rand(5, device=device) / 4, torch.rand(5, device=device) / 4
    together = take("native", *tensors, step=step, eps=eps)
    for i in range(5):
        alone = take("native", *(t[i : i + 1] for t in tensors), step=step[i].item(), eps=eps[i].item())
        assert torch.equal(together[i : i + 1], alone)


# --- In place, and layouts ------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.clone(memory_format=torch.contiguous_format).mT,
    "strided": lambda t: torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_in_place_moves_both_iterates(device, which, grad_dtype):
    x_adv, x_adv_old, x, grad = drawn([3, 11], 5, grad_dtype, device)
    want, was, kept = take(which, x_adv, x_adv_old, x, grad, step=0.1, eps=0.2), x_adv.clone(), (x.clone(), bits(grad))
    versions = x_adv._version, x_adv_old._version
    with backend.use(which):
        assert ops.apgd_step_(x_adv, x_adv_old, x, grad, step=0.1, eps=0.2) is x_adv
    assert torch.equal(x_adv, want)
    assert torch.equal(x_adv_old, was)
    assert (x_adv._version, x_adv_old._version) == (versions[0] + 1, versions[1] + 1)
    assert torch.equal(x, kept[0])
    assert torch.equal(bits(grad), kept[1])


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("others", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_value(device, layout, others, place):
    tensors = drawn([2, 3, 4, 5], 3, torch.bfloat16, device)
    settings = {"step": torch.tensor([0.1, 0.2], device=device), "eps": 0.3}
    want = take("reference", *tensors, **settings)
    laid = [LAYOUTS[layout if i == place else others](t) for i, t in enumerate(tensors)]
    assert torch.equal(take("native", *laid, **settings), want)
    with backend.use("native"):
        assert torch.equal(ops.apgd_step_(*laid, **settings), want)
    assert torch.equal(laid[1], tensors[0])


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize(
    ("written", "shared"),
    [("x_adv", "x_adv_old"), ("x_adv", "x"), ("x_adv", "grad"), ("x_adv_old", "x"), ("x_adv_old", "grad")],
)
def test_iterates_may_not_be_inputs(device, which, written, shared):
    tensors = dict(zip(("x_adv", "x_adv_old", "x", "grad"), drawn([2, 5], 4, torch.float32, device), strict=True))
    tensors[shared] = tensors[written]
    words = f"{shared} shares memory with {written}, which is written in place"
    with backend.use(which), pytest.raises(ValueError, match=words):
        ops.apgd_step_(**tensors, step=0.1, eps=0.1)


X = torch.rand(3, 4)
GOOD = {"x_adv": X, "x_adv_old": X.clone(), "x": X.clone(), "grad": X.clone(), "step": 0.1, "eps": 0.1}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"norm": "L7"}, ValueError, "norm is 'L7'; allowed are Linf"),
        ({"x_adv_old": X[:2]}, ValueError, "x_adv_old has shape [2, 4]; it must match x, [3, 4]"),
        ({"x_adv_old": X.double()}, TypeError, "x_adv_old is torch.float64; it must have x's dtype, torch.float32"),
        ({"grad": X.int()}, TypeError, "grad is torch.int32; allowed are torch.float32, torch.float16"),
        ({"step": float("nan")}, ValueError, "step is nan; it must be a finite number"),
        ({"step": torch.rand(2)}, ValueError, "step has shape [2]; per-sample values need [3]"),
        ({"eps": -0.5}, ValueError, "eps is -0.5; it must be a finite number >= 0"),
        ({"a": 1.5}, ValueError, "a is 1.5; it must be in [0, 1]"),
        ({"a": float("nan")}, ValueError, "a is nan; it must be in [0, 1]"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds are (1.0, 0.0); low must be less than high"),
    ],
)
@pytest.mark.parametrize("op", [ops.apgd_step, ops.apgd_step_])
def test_refuses(op, change, error, words):
    with pytest.raises(error, match=re.escape(words)):
        op(**(GOOD | change))


# --- As torch sees it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", ["apgd_step", "apgd_step_"])
def test_opcheck(device, name, per_sample, memory_format):
    tensors = [torch.rand(2, 3, 4, 5, device=device).to(memory_format=memory_format) for _ in range(4)]
    values = [torch.tensor([0.1, 0.2], device=device)] * 2 if per_sample else []
    arguments = (*tensors, 0.1, 0.2, 0.75, 0.0, 1.0, *values)
    torch.library.opcheck(getattr(torch.ops.afd, name).default, arguments)


# --- Every way to run on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, isa, grad_dtype):
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    tensors = drawn([3, 12_347], 6, grad_dtype, CPU)
    for step in (0.1, torch.tensor([0.1, -0.2, 0.3])):
        got = take("native", *tensors, step=step, eps=0.25)
        assert torch.equal(bits(got), bits(take("reference", *tensors, step=step, eps=0.25)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads):
    tensors, eps = drawn([7, 30_011], 7, torch.float32, CPU), torch.linspace(0, 0.3, 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = take("native", *tensors, step=0.1, eps=eps)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(got), bits(take("reference", *tensors, step=0.1, eps=eps)))


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [[1], [5, 7], [3, 4096], [2, 3, 33, 31]], ids=str)
def test_gpu_and_cpu_agree_bit_for_bit(cuda, shape, grad_dtype):
    tensors = drawn(shape, 8, grad_dtype, CPU)
    on_gpu = take("native", *(t.to(cuda) for t in tensors), step=0.1, eps=0.25)
    assert torch.equal(bits(on_gpu), bits(take("native", *tensors, step=0.1, eps=0.25)))


@pytest.mark.gpu
def test_graph_capture_replays_the_step(cuda):
    x_adv, x_adv_old, x, grad = drawn([8, 3, 32, 32], 9, torch.float32, cuda)
    twice = x_adv.clone(), x_adv_old.clone()
    for _ in range(2):
        ops.apgd_step_(*twice, x, grad, step=0.1, eps=0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend.use("native"):
        ops.apgd_step_(x_adv, x_adv_old, x, grad, step=0.1, eps=0.3)
    graph.replay()
    graph.replay()
    assert torch.equal(x_adv, twice[0])
    assert torch.equal(x_adv_old, twice[1])
