"""The kernel benchmark: every way to do a work does the same work, and a tiny run goes from end to end."""

import pytest
import torch

from afd.bench import kernels, op_cases
from afd.bench.base import run
from afd.bench.kernels import DiscriminatorBench, KernelBench, footprint, several, updates, ways
from afd.bench.metering import Calls, CpuClock
from afd.bench.op_cases import OPS, small, timed
from afd.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch):
    monkeypatch.setitem(op_cases.SIZES, "cifar", (6, 3, 5, 5))
    monkeypatch.setitem(op_cases.FEATURES, "cifar", (7, 512))


def cases(op=""):
    return [one for one in timed("cifar") if op in ("", one.op)]


def test_every_op_has_cases_to_be_timed_and_to_be_checked():
    for found in (timed("cifar"), small()):
        names = [(one.op, one.name) for one in found]
        assert {op for op, _ in names} == set(OPS)
        assert len(set(names)) == len(names)
    assert {one.op for one in timed("imagenet")} == set(OPS) - {"spectral_norm"}


@pytest.mark.parametrize("name", OPS)
def test_every_way_gives_the_same(name):
    for one in cases(name):
        work = one.on("cpu")
        found = {way: calls.each[0] for way, calls in ways([work], CPU, ("eager", "reference"), print).items()}
        found.pop("floor")()
        before = [tensor.clone() for tensor in work.written]
        results = {way: computed(work, before, call) for way, call in found.items()}
        assert all(torch.isfinite(result).any() for result in results.values())
        for way, result in results.items():
            told = f"{one.name}: {way} is not what native is"
            torch.testing.assert_close(result, results["native"], rtol=1e-4, atol=1e-5, msg=told)


def computed(work, before, call):
    """All that a call computes as one tensor, in place or not, always from the same start."""
    for tensor, value in zip(work.written, before, strict=True):
        tensor.copy_(value)
    result = call()
    tensors = work.written or ([result] if isinstance(result, torch.Tensor) else result)
    plain = [one if isinstance(one, torch.Tensor) else one.sigma for one in tensors]
    return torch.cat([one.detach().double().flatten() for one in plain])


def test_bytes_are_counted_as_the_formula_has_them():
    """Those that are moved, and those that lie in memory before."""
    found = {one.name: one.on("cpu") for one in cases()}
    elements, matrices = 6 * 75, 4 * 512 * (512 + 512 + 1 + 100)
    for name, moved, held in (
        ("pgd_step Linf 6x3x5x5 fp32", 16 * elements, 12 * elements),  # x_adv is read and written, and there once
        ("pgd_step L1 6x3x5x5 bf16", 14 * elements, 10 * elements),
        ("project L2 6x3x5x5", 12 * elements, 8 * elements),
        ("apgd_step Linf 6x3x5x5 fp32", 24 * elements, 16 * elements),
        ("apgd_update 6x3x5x5", 3 * 75 * 16, 3 * 75 * 16),  # three of the rows: x_adv and grad, read and written
        ("load_batch 6x3x5x5", 5 * elements, elements),
        ("spectral_norm 512, 512, 1, 100 x 512", matrices, matrices),
        ("spectral_linear 7 x 512", None, 4 * (2 * 7 * 512 + 512 * 512 + 512)),
    ):
        assert (found[name].bytes_moved, found[name].footprint) == (moved, held), name


def test_a_tiny_run(tmp_path, console, monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda sets, _say: [work.eager for work in sets])
    out = tmp_path / "k.json"
    made = run(KernelBench(ops="project,spectral_norm", sizes="cifar", repeats=2, out=out), console)
    case = made.cases["project L2 6x3x5x5"]
    assert list(case.candidates) == ["native", "eager", "compiled", "reference", "floor"]
    native, floor = case.candidates["native"], case.candidates["floor"]
    assert native.figures["share_of_floor"] == pytest.approx(floor.median / native.median)
    assert native.figures["gigabytes_per_second"] == pytest.approx(12 * 450 / native.median * 1e-9)
    assert "share_of_copy" not in native.figures
    assert "compiled" not in made.cases["project L1 6x3x5x5"].candidates
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("against", ["eager", "reference"])
def test_without_compiled_nothing_is_compiled(against, monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda *_: pytest.fail("torch.compile was touched"))
    for one in cases("pgd_step"):
        there = against == "eager" or "Linf" not in one.name  # where the reference is the eager formulation
        assert list(ways([one.on("cpu")], CPU, (against,), print)) == ["native", *[against] * there, "floor"]


class Sets(CpuClock):
    """Wants four sets of inputs."""

    def sets(self, footprint):
        self.footprint = footprint
        return 4


@pytest.mark.parametrize("one", list(timed("cifar")), ids=lambda one: one.name)
def test_each_set_of_inputs_is_its_own(one):
    timer = Sets(0)
    sets = several(one, CPU, timer)
    assert (len(sets), sets[0].footprint) == (4, timer.footprint)
    places = [tensor.data_ptr() for work in sets for tensor in work.written]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("way", ["native", "eager"])
def test_each_pass_of_auto_pgds_bookkeeping_finds_rows_to_move(way):
    sets = [cases("apgd_update")[0].on("cpu") for _ in range(3)]
    calls = ways(sets, CPU, ("eager",), print)[way]
    for _ in range(3):
        calls.once()
        for work in sets:
            moves = next(tensor for tensor in work.written if tensor.dtype == torch.uint8)
            assert moves.tolist() == [1, 1, 1, 0, 0, 0]


def test_a_gpus_figures_are_in_json_and_table(gpu, tmp_path, console, monkeypatch):
    """The clock is a GPU's, for which each call is one kernel of a known time."""
    seconds, take = {"native": 4e-6, "eager": 20e-6, "floor": 3e-6}, gpu.take

    def told(case, candidates, repeats):
        known = {name: Calls([lambda time=seconds[name]: gpu.kernel(time)] * 2) for name in candidates}
        return take(case, known, repeats)

    monkeypatch.setattr(gpu, "take", told)
    monkeypatch.setattr(kernels, "clock", lambda *_: gpu)
    bench = KernelBench(ops="project,spectral_linear", sizes="cifar", against="eager", out=tmp_path / "k.json")
    made = run(bench, console)
    case = made.cases["project L2 6x3x5x5"]
    assert case.measured == {"copy_gigabytes_per_second": pytest.approx(2000)}
    for name, one in case.candidates.items():
        assert one.median == pytest.approx(seconds[name])
        assert (one.figures["device_us"], one.figures["host_us"]) == pytest.approx((seconds[name] * 1e6, 30))
        assert one.figures["timed"] == "graph"
        assert one.figures["share_of_copy"] == pytest.approx(12 * 450 / seconds[name] / 2e12)
    assert case.candidates["eager"].figures["over_native"] == pytest.approx(5)
    assert made.cases["spectral_linear 7 x 512"].candidates["native"].figures["share_of_copy"] is None
    shown = console.export_text()
    assert all(word in shown for word in ("host", "µs", "timed", "graph", "copy's"))


# --- The discriminator ----------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    for name, value in (("WIDTH", 16), ("BATCHES", (4,)), ("CLASSES", (3, 5))):
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("against", "names"),
    [(None, ["afd", "plain", "parametrized"]), ("parametrized", ["afd", "parametrized"])],
)
def test_a_tiny_run_of_discriminators(against, names, tmp_path, console):
    bench = DiscriminatorBench(repeats=2, against=against, out=tmp_path / "d.json")
    made = run(bench, console)
    assert list(made.cases) == ["batch 4, 3 classes", "batch 4, 5 classes"]
    for case in made.cases.values():
        assert list(case.candidates) == names
        assert not case.measured
        for found in case.candidates.values():
            assert set(found.figures) == {"over_plain", "over_afd"}
            assert (found.figures["over_plain"] is None) == ("plain" not in names)


def test_compiled_is_for_gpus():
    with pytest.raises(InputError, match="against is 'compiled'; allowed are plain, parametrized"):
        DiscriminatorBench(against="compiled").check()


@pytest.mark.usefixtures("few")
def test_each_set_has_a_network_and_a_batch_of_its_own():
    for calls in updates(4, 3, sets=3, against=("plain",), device=CPU).values():
        cells = [dict(zip(call.__code__.co_freevars, call.__closure__, strict=True)) for call in calls.each]
        for name in ("net", "z", "y", "optimizer"):
            assert len({id(cell[name].cell_contents) for cell in cells}) == 3, name
        calls.once()
        nets = [cell["net"].cell_contents for cell in cells]
        assert all(p.grad is not None for net in nets for p in net.parameters())


def test_a_footprint_is_what_an_update_touches():
    parameters = 2 * 512 * 512 + 512 + 10 * 512
    assert footprint(128, 10) == 4 * (3 * parameters + 2 * 128 * 512)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_updates_are_captured(tmp_path, console, monkeypatch):
    monkeypatch.setattr(kernels, "BATCHES", (128,))
    bench = DiscriminatorBench(repeats=10, against="plain,parametrized", device="cuda", out=tmp_path / "d.json")
    made = run(bench, console)
    for name, case in made.cases.items():
        for found in case.candidates.values():
            assert found.figures["timed"] == "graph", name
            assert found.figures["device_us"] == pytest.approx(found.median * 1e6)
            assert found.figures["host_us"] > 0
    assert kernels.GRAPH in made.cases
