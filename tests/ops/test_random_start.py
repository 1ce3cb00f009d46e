"""random_start: published vectors of the generator, native bit for bit against the reference, and the statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.ops import backend, native, reference

USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []
shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4) | st.sampled_from(
    [[1], [3, 4099], [2, 3, 33, 31], [70_001]]
)
counters = st.integers(0, 2**63 - 1) | st.sampled_from([0, 2**32 - 1, 2**32, 2**40, 2**63 - 1])


def start(which: str, x: Tensor, **settings) -> Tensor:
    with backend.use(which):
        return ops.random_start(x, **settings)


def uniforms(shape: list[int], *, seed: int, first_sample: int = 0) -> Tensor:
    """The bare draws of the native op: a ball of radius 1 around 0."""
    return start("native", torch.zeros(shape), eps=1.0, seed=seed, first_sample=first_sample, bounds=(-1.0, 1.0))


# --- The generator --------------------------------------------------------------------------------------------------

# Known answers for philox4x32-10 from Random123 (tests/kat_vectors): counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS)
def test_reference_philox_gives_the_published_vectors(device, counter, key, want):
    block, stream, low, high = counter
    sample = (high << 32 | low) - (1 << 64 if high >> 31 else 0)  # the same 64 bits as a signed number
    drawn = reference.philox(
        key[1] << 32 | key[0], torch.tensor(sample, device=device), torch.tensor(block, device=device), stream
    )
    assert tuple(drawn.tolist()) == want


def test_native_philox_gives_the_published_vector():
    odd = (uniforms([1, 4], seed=0).double() * 2**23).long()  # undoes symmetric_uniform; the lowest 9 bits are dropped
    assert ((odd + 2**23 - 1) // 2).flatten().tolist() == [word >> 9 for word in VECTORS[0][2]]


# --- The op ---------------------------------------------------------------------------------------------------------


@given(
    shape=shapes,
    eps=st.floats(0, 2),
    per_sample=st.booleans(),
    seed=counters,
    first_sample=counters,
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.25, 0.5)]),
)
def test_native_is_the_reference_bit_for_bit(device, shape, eps, per_sample, seed, first_sample, bounds):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    settings = {
        "eps": eps * torch.rand(shape[0], device=device) if per_sample else eps,
        "seed": seed,
        "first_sample": first_sample,
        "bounds": bounds,
    }
    got = start("native", x, **settings)
    assert torch.equal(got.view(torch.int32), start("reference", x, **settings).view(torch.int32))
    radius = settings["eps"].view(-1, *[1] * (x.dim() - 1)) if per_sample else eps
    inside = (got >= (x - radius).clamp(*bounds)) & (got <= (x + radius).clamp(*bounds))
    assert bool(inside.all())


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("first_sample", [0, 2**32 - 3, 2**40])
def test_a_split_batch_starts_where_the_whole_one_does(device, which, first_sample):
    x = torch.rand(9, 3, 7, device=device)
    eps = torch.rand(9, device=device)
    whole = start(which, x, eps=eps, seed=3, first_sample=first_sample)
    parts = [
        start(which, x[a:b], eps=eps[a:b], seed=3, first_sample=first_sample + a) for a, b in ((0, 1), (1, 6), (6, 9))
    ]
    assert torch.equal(torch.cat(parts), whole)


LAYOUTS = {
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.clone(memory_format=torch.contiguous_format).mT,
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_the_draw_follows_the_image_and_not_its_layout(device, x_layout, out_layout):
    x = torch.rand(2, 3, 5, 7, device=device)
    want = start("reference", x, eps=0.1, seed=4)
    laid = LAYOUTS[x_layout](x)
    assert torch.equal(start("native", laid, eps=0.1, seed=4), want)
    with backend.use("native"):
        assert torch.equal(ops.random_start_(LAYOUTS[out_layout](x), laid, eps=0.1, seed=4), want)


@pytest.mark.parametrize("which", ["native", "reference"])
def test_the_image_itself_may_be_overwritten(device, which):
    x = torch.rand(4, 33, device=device)
    want = start(which, x, eps=0.1, seed=5)
    before = x._version
    with backend.use(which):
        assert ops.random_start_(x, x, eps=0.1, seed=5) is x
    assert torch.equal(x, want)
    assert x._version == before + 1


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 - 1])
def test_a_seed_on_the_device_draws_as_a_number_does(device, which, norm, seed):
    x = torch.rand(3, 1030, device=device)
    want = start(which, x, eps=0.1, seed=seed, first_sample=2, norm=norm)
    key = torch.full((), 3, dtype=torch.int64, device=device)
    assert not torch.equal(start(which, x, eps=0.1, seed=key, first_sample=2, norm=norm), want)
    key.fill_(seed)
    assert torch.equal(start(which, x, eps=0.1, seed=key, first_sample=2, norm=norm), want)
    with backend.use(which):
        assert torch.equal(
            ops.random_start_(x.mT.contiguous().mT, x, eps=0.1, seed=key, first_sample=2, norm=norm), want
        )
    torch.library.opcheck(torch.ops.afd.random_start.default, (x, 0.1, 0.0, 1.0, 0, 2, None, norm, key))


def test_zero_radius_only_clamps(device):
    x = torch.tensor([[-0.5, 0.25, 1.5]], device=device)
    assert start("native", x, eps=0.0, seed=6).tolist() == [[0.0, 0.25, 1.0]]


def test_nan_stays_visible(device):
    x = torch.full((2, 5), float("nan"), device=device)
    assert bool(start("native", x, eps=0.1, seed=0).isnan().all())


@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, isa):
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    x = torch.rand(3, 10_007)
    assert torch.equal(start("native", x, eps=0.1, seed=7), start("reference", x, eps=0.1, seed=7))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads):
    x = torch.rand(5, 20_011)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = start("native", x, eps=0.1, seed=8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, start("reference", x, eps=0.1, seed=8))


# --- Statistics: the seeds are fixed, so these hold or fail for good; the limits are 5 standard errors ----------------

MANY = 1 << 20


def test_draws_are_uniform():
    u = uniforms([1, MANY], seed=9).double().flatten()
    assert abs(u.mean().item()) < 5 / math.sqrt(3 * MANY)
    assert abs(u.square().mean().item() - 1 / 3) < 5 * math.sqrt(4 / 45 / MANY)
    ranks = torch.arange(1, MANY + 1, dtype=torch.float64) / MANY
    distance = (ranks - (u.sort().values + 1) / 2).abs().max().item()  # Kolmogorov and Smirnov
    assert distance * math.sqrt(MANY) < 1.95  # probability 0.001
    assert u.abs().min().item() > 0
    assert u.abs().max().item() < 1


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1].item()


@pytest.mark.parametrize(
    ("seed", "first_sample"), [(11, 0), (10, 1), (10, 2**32), (10 + 2**32, 0)], ids=["seed", "sample", "high", "key"]
)
def test_seeds_and_samples_draw_independently(seed, first_sample):
    n = MANY // 4
    r = correlation(uniforms([1, n], seed=10), uniforms([1, n], seed=seed, first_sample=first_sample))
    assert abs(r) < 5 / math.sqrt(n)


@pytest.mark.parametrize("lag", [1, 2, 4, 64])
def test_neighbouring_elements_draw_independently(lag):
    u = uniforms([1, MANY // 4], seed=12).flatten()
    assert abs(correlation(u[:-lag], u[lag:])) < 5 / math.sqrt(MANY // 4)


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [[1], [5, 7], [3, 4096], [2, 3, 33, 31]], ids=str)
def test_gpu_and_cpu_agree_bit_for_bit(cuda, shape):
    x = torch.rand(shape)
    on_gpu = start("native", x.to(cuda), eps=0.1, seed=2**62 + 5, first_sample=2**40)
    assert torch.equal(on_gpu.cpu(), start("native", x, eps=0.1, seed=2**62 + 5, first_sample=2**40))


@pytest.mark.gpu
def test_a_replayed_graph_follows_a_seed_on_the_device(cuda):
    x, out = torch.rand(8, 3, 32, 32, device=cuda), torch.empty(8, 3, 32, 32, device=cuda)
    key, graph = torch.zeros((), dtype=torch.int64, device=cuda), torch.cuda.CUDAGraph()
    ops.random_start_(out, x, eps=0.1, seed=key)  # the kernel is loaded by its first launch, not inside a capture
    with torch.cuda.graph(graph), backend.use("native"):
        ops.random_start_(out, x, eps=0.1, seed=key)
    for seed in (13, 2**62 + 1):
        key.fill_(seed)
        graph.replay()
        assert torch.equal(out, start("native", x, eps=0.1, seed=seed))


@pytest.mark.gpu
def test_graph_capture_replays_the_start(cuda):
    x, out = torch.rand(8, 3, 32, 32, device=cuda), torch.empty(8, 3, 32, 32, device=cuda)
    ops.random_start_(out, x, eps=0.1, seed=13)  # the kernel is loaded by its first launch, not inside a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend.use("native"):
        ops.random_start_(out, x, eps=0.1, seed=13)
    x.uniform_()
    graph.replay()
    assert torch.equal(out, start("native", x, eps=0.1, seed=13))
