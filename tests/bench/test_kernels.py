"""The kernel benchmark: every way to do a work does the same work, and a tiny run goes from end to end."""

import pytest
import torch

from afd.bench import kernels, spectral_works, works
from afd.bench.clocks import CpuClock, GpuClock
from afd.bench.document import Document, read
from afd.bench.program import run
from afd.bench.show import table

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


@pytest.mark.usefixtures("small")
def test_without_compiled_nothing_is_compiled(tmp_path, console, monkeypatch):
    def never(*_, **__):
        raise AssertionError("torch.compile was touched")

    monkeypatch.setattr(torch, "compile", never)
    monkeypatch.setattr(torch.compiler, "reset", never)
    bench = kernels.KernelBench(
        ops="project,load_batch", sizes="cifar", against="eager", rounds=1, out=tmp_path / "k.json"
    )
    for found in run(bench, console).cases.values():
        assert list(found.candidates) == ["native", "eager", "floor"]
    plain = kernels.KernelBench(ops="pgd_step", sizes="cifar", against="reference", rounds=1, out=tmp_path / "r.json")
    shown = run(plain, console).cases
    assert list(shown["pgd_step L1 6x3x5x5 fp32"].candidates) == ["native", "reference", "floor"]
    assert next(iter(plain.remarks(shown))).count("?") == 1  # of the copy's rate, not of eager's


class Sets(CpuClock):
    """Wants four sets of inputs, and notes the footprints that it is asked about."""

    def sets(self, footprints):
        self.footprints = list(footprints)
        return 4


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", kernels.OPS)
def test_each_set_of_inputs_is_its_own(name):
    timer = Sets(0)
    found = list(kernels.several(kernels.OPS[name], "cifar", CPU, timer))
    assert [len(sets) for sets in found] == [4] * len(timer.footprints)
    for sets in found:
        assert len({work.name for work in sets}) == 1
        assert sets[0].footprint in timer.footprints
        places = [tensor.data_ptr() for work in sets for tensor in work.written]
        assert len(set(places)) == len(places)


def test_an_op_without_a_work_at_a_size_has_no_case(gpu):
    assert list(kernels.several(kernels.OPS["spectral_norm"], "imagenet", CPU, GpuClock(gpu, print))) == []


@pytest.mark.usefixtures("small")
def test_footprints_are_what_lies_in_memory():
    held = {work.name: work.footprint for name in kernels.OPS for work in kernels.OPS[name]("cifar", CPU)}
    elements = 6 * 75
    assert held["pgd_step Linf 6x3x5x5 fp32"] == 12 * elements  # x_adv is read and written, and there once
    assert held["pgd_step L1 6x3x5x5 bf16"] == 10 * elements
    assert held["apgd_step Linf 6x3x5x5 fp32"] == 16 * elements
    assert held["load_batch 6x3x5x5"] == elements
    assert held["spectral_norm 512, 512, 1, 100 x 512"] == 4 * 512 * (512 + 512 + 1 + 100)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["native", "eager"])
def test_each_pass_of_auto_pgds_bookkeeping_finds_rows_to_move(way):
    sets = [next(works.apgd_update("cifar", CPU)) for _ in range(3)]
    calls = kernels.ways(sets, ("eager",), print)[way]
    for _ in range(3):
        calls.once()
        for work in sets:
            *_, moves = work.written
            assert moves.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.usefixtures("small")
def test_a_gpus_figures_are_in_json_and_table(gpu, tmp_path, console):
    """The kernels run on the CPU; the clock is a GPU's, for which each call is one kernel of a known time."""
    seconds = {"native": 4e-6, "eager": 20e-6, "floor": 3e-6}

    class Told(GpuClock):
        def take(self, case, candidates, rounds):
            told = {
                name: type(calls)([lambda time=seconds[name]: gpu.kernel(time)] * len(calls.each), calls.before)
                for name, calls in candidates.items()
            }
            return super().take(case, told, rounds)

    timer, said = Told(gpu, print), []
    cases = {
        sets[0].name: kernels.case(sets, ("eager",), 3, timer, said.append)
        for name in ("project", "spectral_linear")
        for sets in kernels.several(kernels.OPS[name], "cifar", CPU, timer)
    }
    Document.here("kernels", CPU, 3, {}, cases).write(tmp_path / "k.json")
    made = read(tmp_path / "k.json")
    case = made.cases["project L2 6x3x5x5"]
    assert case.measured == {"copy_gigabytes_per_second": pytest.approx(2000)}
    for name, found in case.candidates.items():
        assert found.median == pytest.approx(seconds[name])
        assert found.figures["device_us"] == pytest.approx(seconds[name] * 1e6)
        assert found.figures["host_us"] == pytest.approx(30)
        assert found.figures["timed"] == "graph"
        assert found.figures["share_of_copy"] == pytest.approx(12 * 450 / seconds[name] / 2e12)
    assert case.candidates["eager"].figures["over_native"] == pytest.approx(5)
    assert made.cases["spectral_linear 7 x 512"].candidates["native"].figures["share_of_copy"] is None
    console.print(table(made, kernels.KernelBench.columns))
    shown = console.export_text()
    assert all(word in shown for word in ("host", "µs", "timed", "graph", "copy's"))
