"""The kernel benchmark: every way to do a work does the same work, and a tiny run goes from end to end."""

import pytest
import torch

from afd.bench import kernels, spectral_works, works
from afd.bench.program import run

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(works.SIZES, "cifar", (6, 3, 5, 5))
    monkeypatch.setitem(spectral_works.BATCHES, "cifar", 7)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", kernels.OPS)
def test_every_way_gives_the_same(name):
    torch.manual_seed(0)
    for work in kernels.OPS[name]("cifar", CPU):
        ways = {way: calls.each[0] for way, calls in kernels.ways([work], ("eager", "reference"), print).items()}
        ways.pop("floor")()
        before = [tensor.clone() for tensor in work.written]
        results = {way: computed(work, before, call) for way, call in ways.items()}
        assert all(torch.isfinite(result).any() for result in results.values())
        for way, result in results.items():
            told = f"{work.name}: {way} is not what native is"
            torch.testing.assert_close(result, results["native"], rtol=1e-4, atol=1e-5, msg=told)


def computed(work, before, call):
    """All that a call computes as one tensor, in place or not, always from the same start."""
    for tensor, value in zip(work.written, before, strict=True):
        tensor.copy_(value)
    result = call()
    tensors = work.written or ([result] if isinstance(result, torch.Tensor) else result)
    plain = [one if isinstance(one, torch.Tensor) else one.sigma for one in tensors]
    return torch.cat([one.detach().double().flatten() for one in plain])


@pytest.mark.usefixtures("small")
def test_bytes_are_counted_as_the_formula_has_them():
    moved = {work.name: work.bytes_moved for name in kernels.OPS for work in kernels.OPS[name]("cifar", CPU)}
    elements = 6 * 75
    assert moved["pgd_step Linf 6x3x5x5 fp32"] == 16 * elements  # three read, one written
    assert moved["pgd_step L1 6x3x5x5 bf16"] == 14 * elements
    assert moved["project L2 6x3x5x5"] == 12 * elements
    assert moved["apgd_step Linf 6x3x5x5 fp32"] == 24 * elements
    assert moved["apgd_update 6x3x5x5"] == 3 * 75 * 16  # three of the rows: x_adv and grad, read and written
    assert moved["load_batch 6x3x5x5"] == 5 * elements
    assert moved["spectral_linear 7 x 512"] is None


@pytest.mark.usefixtures("small")
def test_a_tiny_run(tmp_path, console, monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda sets, _say: [work.eager for work in sets])
    out = tmp_path / "k.json"
    made = run(kernels.KernelBench(ops="project,spectral_norm", sizes="cifar", rounds=2, out=out), console)
    case = made.cases["project L2 6x3x5x5"]
    assert list(case.candidates) == ["native", "eager", "compiled", "reference", "floor"]
    native, floor = case.candidates["native"], case.candidates["floor"]
    assert native.figures["share_of_floor"] == pytest.approx(floor.median / native.median)
    assert native.figures["gigabytes_per_second"] == pytest.approx(12 * 450 / native.median * 1e-9)
    assert "compiled" not in made.cases["project L1 6x3x5x5"].candidates
    assert out.with_suffix(".png").stat().st_size > 1000


def test_bars_are_judged(document):
    of = {"native": (1, 1, 1), "eager": (4, 4, 4), "floor": (0.8, 0.8, 0.8)}
    cases = document({"pgd_step Linf x": of, "pgd_step L1 x": of, "project Linf x": of}).cases
    assert list(kernels.KernelBench().remarks(cases)) == [
        "pgd_step Linf x: 70% of the copy's rate? yes, 3x eager? yes",
        "pgd_step L1 x: 0% of the copy's rate? yes, 10x eager? NO",
    ]
