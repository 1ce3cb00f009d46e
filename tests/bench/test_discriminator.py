"""The discriminator's benchmark: who takes part, on what, and which bars they are held to."""

import pytest
import torch

from afd.bench import discriminator
from afd.bench.discriminator import DiscriminatorBench, footprint, updates, verdict
from afd.bench.program import run
from afd.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    for name, value in (("WIDTH", 16), ("BATCHES", (4,)), ("CLASSES", (3, 5))):
        monkeypatch.setattr(discriminator, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("against", "names"),
    [(None, ["afd", "plain", "parametrized"]), ("plain", ["afd", "plain"]), ("parametrized", ["afd", "parametrized"])],
)
def test_a_tiny_run(against, names, tmp_path, console):
    bench = DiscriminatorBench(rounds=2, against=against, out=tmp_path / "d.json")
    made = run(bench, console)
    assert list(made.cases) == ["batch 4, 3 classes", "batch 4, 5 classes"]
    for case in made.cases.values():
        assert list(case.candidates) == names
        assert not case.measured
        for found in case.candidates.values():
            assert set(found.figures) == {"over_plain", "over_afd"}
            assert (found.figures["over_plain"] is None) == ("plain" not in names)
    remarks = list(bench.remarks(made.cases))
    assert all(("plain" in line) == ("plain" in names) for line in remarks)
    assert all(("parametrized" in line) == ("parametrized" in names) for line in remarks)


def test_compiled_is_for_gpus(tmp_path, console):
    with pytest.raises(InputError, match="against is 'compiled'; allowed are plain, parametrized"):
        run(DiscriminatorBench(against="compiled", out=tmp_path / "d.json"), console)


@pytest.mark.usefixtures("small")
def test_each_set_has_a_network_and_a_batch_of_its_own():
    torch.manual_seed(3)
    found = updates(4, 3, sets=3, against=("plain",), device=CPU)
    for calls in found.values():
        cells = [dict(zip(call.__code__.co_freevars, call.__closure__, strict=True)) for call in calls.each]
        for name in ("net", "z", "y", "optimizer"):
            assert len({id(cell[name].cell_contents) for cell in cells}) == 3, name
        calls.once()
        nets = [cell["net"].cell_contents for cell in cells]
        assert all(p.grad is not None for net in nets for p in net.parameters())


def test_a_footprint_is_what_an_update_touches():
    parameters = 2 * 512 * 512 + 512 + 10 * 512
    assert footprint(128, 10) == 4 * (3 * parameters + 2 * 128 * 512)


def test_bars_of_those_that_took_part():
    medians = {"afd": 1.0, "plain": 1.2, "parametrized": 1.5, "compiled": 1.9}
    assert verdict(medians, on_gpu=True) == "8x parametrized? NO, 2x compiled? NO"
    assert verdict({"afd": 1.0, "compiled": 2.0}, on_gpu=True) == "2x compiled? yes"
    assert verdict(medians, on_gpu=False) == "at most 1.15 of plain? yes, 1.6x parametrized? NO"
    assert verdict({"afd": 1.0}, on_gpu=False) == ""


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_updates_are_captured(tmp_path, console, monkeypatch):
    monkeypatch.setattr(discriminator, "BATCHES", (128,))
    made = run(
        DiscriminatorBench(rounds=10, against="plain,parametrized", device="cuda", out=tmp_path / "d.json"), console
    )
    for name, case in made.cases.items():
        for found in case.candidates.values():
            assert found.figures["timed"] == "graph", name
            assert found.figures["device_us"] == pytest.approx(found.median * 1e6)
            assert found.figures["host_us"] > 0
    assert discriminator.GRAPH in made.cases
