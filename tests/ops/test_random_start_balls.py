"""random_start in L2 and L1: native against the reference, the balls' statistics, and what the draws depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.ops import backend, native

BALLS = ["L2", "L1"]
USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []
shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4) | st.sampled_from([[1], [3, 4099], [2, 3, 33, 31]])
counters = st.integers(0, 2**63 - 1) | st.sampled_from([0, 2**32 - 1, 2**32, 2**40, 2**63 - 1])
FREE = (-10.0, 10.0)


def start(which: str, x: Tensor, **settings) -> Tensor:
    with backend.use(which):
        return ops.random_start(x, **settings)


def length(u: Tensor, norm: str) -> Tensor:
    u = u.double().flatten(1)
    return u.abs().sum(1) if norm == "L1" else u.norm(dim=1)


@given(
    shape=shapes,
    norm=st.sampled_from(BALLS),
    eps=st.floats(0, 20),
    per_sample=st.booleans(),
    seed=counters,
    first_sample=counters,
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), FREE]),
)
def test_native_agrees_with_the_reference(device, shape, norm, eps, per_sample, seed, first_sample, bounds):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    radius = eps * torch.linspace(0.5, 1, shape[0], device=device) if per_sample else eps
    settings = {"eps": radius, "seed": seed, "first_sample": first_sample, "bounds": bounds, "norm": norm}
    got = start("native", x, **settings)
    torch.testing.assert_close(got, start("reference", x, **settings), rtol=1e-6, atol=1e-6 * max(1.0, eps) / 2)
    if x.dim() > 1:
        assert bool((length(got.double() - x.double(), norm) <= torch.as_tensor(radius).double() + 2e-5).all())
    assert bool(((got >= bounds[0]) & (got <= bounds[1])).all())


@pytest.mark.parametrize("norm", BALLS)
def test_native_draws_are_accurate(norm):
    """Around 0, where adding x hides nothing: to 1e-6 of the value, or of the ball for values near 0."""
    zero = torch.zeros(4, 50_000)
    got = start("native", zero, eps=1.0, seed=1, bounds=FREE, norm=norm)
    want = start("reference", zero.double(), eps=1.0, seed=1, bounds=FREE, norm=norm)
    typical = want.abs().mean().item()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6 * typical)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("first_sample", [0, 2**32 - 3])
def test_a_split_batch_starts_where_the_whole_one_does(device, which, norm, first_sample):
    x = torch.rand(9, 3, 7, device=device)
    eps = torch.rand(9, device=device)
    whole = start(which, x, eps=eps, seed=3, first_sample=first_sample, norm=norm)
    parts = [
        start(which, x[a:b], eps=eps[a:b], seed=3, first_sample=first_sample + a, norm=norm)
        for a, b in ((0, 1), (1, 6), (6, 9))
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", BALLS)
def test_the_image_itself_may_be_overwritten(device, which, norm):
    x = torch.rand(4, 3, 5, 7, device=device)
    want = start(which, x, eps=0.5, seed=5, norm=norm)
    last = x.clone(memory_format=torch.channels_last)
    with backend.use(which):
        assert ops.random_start_(x, x, eps=0.5, seed=5, norm=norm) is x
        assert torch.equal(ops.random_start_(last, last, eps=0.5, seed=5, norm=norm), want)
    assert torch.equal(x, want)


@pytest.mark.parametrize("norm", BALLS)
def test_zero_radius_only_clamps_and_nan_stays_visible(device, norm):
    x = torch.tensor([[-0.5, 0.25, 1.5, float("nan")]], device=device)
    out = start("native", x, eps=0.0, seed=6, norm=norm)
    assert out[:, :3].tolist() == [[0.0, 0.25, 1.0]]
    assert bool(out[0, 3].isnan())


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, isa, norm):
    x = torch.rand(3, 10_007)
    want = start("native", x, eps=1.0, seed=7, norm=norm)
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    assert torch.equal(start("native", x, eps=1.0, seed=7, norm=norm), want)


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads, norm):
    x = torch.rand(5, 20_011)
    want = start("native", x, eps=1.0, seed=8, norm=norm)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(start("native", x, eps=1.0, seed=8, norm=norm), want)
    finally:
        torch.set_num_threads(before)


# --- Statistics: the seeds are fixed, so these hold or fail for good; the limits are 5 standard errors ----------------

MANY = 200_000


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("elements", [1, 2, 3, 10])
def test_starts_are_uniform_in_the_ball(norm, elements):
    """In a uniform ball the radius to the power n is uniform, and every orthant and coordinate is like the others."""
    u = start("native", torch.zeros(MANY, elements), eps=1.0, seed=9, bounds=FREE, norm=norm).double()
    share = length(u, norm) ** elements
    ranks = torch.arange(1, MANY + 1, dtype=torch.float64) / MANY
    distance = (ranks - share.sort().values).abs().max().item()  # Kolmogorov and Smirnov
    assert distance * math.sqrt(MANY) < 1.95  # probability 0.001
    error = (u.square().mean(0).sqrt() / math.sqrt(MANY)).max().item()
    assert u.mean(0).abs().max().item() < 5 * error
    spread = u.square().mean(0)
    assert ((spread - spread.mean()).abs() < 5 * (u**4).mean(0).sqrt() / math.sqrt(MANY)).all()
    assert (u > 0).double().mean(0).sub(0.5).abs().max().item() < 5 * 0.5 / math.sqrt(MANY)


@pytest.mark.parametrize(
    ("norm", "fourth"),
    [("L2", 3.0), ("L1", 6.0)],  # of the normal and of the double exponential distribution, over variance squared
)
def test_coordinates_of_a_large_ball_have_the_right_tails(norm, fourth):
    u = start("native", torch.zeros(1, 1 << 20), eps=1.0, seed=10, bounds=FREE, norm=norm).double().flatten()
    kurtosis = (u**4).mean() / u.square().mean() ** 2
    assert abs(kurtosis.item() - fourth) < 0.15
    pairs = torch.corrcoef(torch.stack([u[::2].abs(), u[1::2].abs()]))[0, 1].item()
    assert abs(pairs) < 5 / math.sqrt(1 << 19)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("shape", [[1], [5, 7], [3, 4096], [2, 3, 33, 31], [3, 150_528]], ids=str)
def test_gpu_and_cpu_agree(cuda, shape, norm):
    x = torch.rand(shape)
    settings = {"eps": 1.0, "seed": 2**62 + 5, "first_sample": 2**40, "norm": norm}
    on_gpu = start("native", x.to(cuda), **settings)
    torch.testing.assert_close(on_gpu.cpu(), start("native", x, **settings), rtol=1e-6, atol=1e-7)
