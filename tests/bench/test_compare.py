"""A change counts where the bands do not overlap; what is not comparable is said to be so."""

import pytest
import torch
from rich.console import Console

from afd.bench import compare
from afd.bench.document import DocumentError
from afd.bench.timing import Timing


@pytest.mark.parametrize(
    ("now", "rounds", "told"),
    [
        ((1.3, 1.4, 1.5), 9, "slower"),
        ((0.5, 0.6, 0.7), 9, "faster"),
        ((1.1, 1.4, 1.5), 9, "within noise"),
        ((0.5, 0.7, 0.9), 9, "within noise"),
        ((1.3, 1.4, 1.5), 4, "too few rounds to tell (4)"),
    ],
)
def test_verdicts(now, rounds, told):
    assert compare.verdict(Timing(0.8, 1.0, 1.2), Timing(*now), rounds) == told


def shown(old, new):
    console = Console(record=True, width=200)
    console.print(compare.table(old, new))
    return console.export_text()


def test_every_candidate_of_either_run_is_named(document):
    old = document({"PGD": {"afd": (1, 2, 3), "art": (4, 5, 6)}})
    new = document({"PGD": {"afd": (4, 4, 5), "foolbox": (7, 8, 9)}, "APGD": {"afd": (1, 1, 1)}})
    lines = {line.split()[0]: line for line in shown(old, new).splitlines() if line.strip()}
    assert lines["art"].endswith("only then  ")
    assert "only now" in lines["foolbox"]
    assert "APGD" in lines
    assert "2.00" in shown(old, new)
    assert "slower" in shown(old, new)


def test_other_settings_have_no_verdict(document):
    old = document({"PGD": {"afd": (1, 2, 3)}}, settings={"model": "lenet"})
    new = document({"PGD": {"afd": (4, 5, 6)}}, settings={"model": "resnet18"})
    assert "not comparable: model was lenet, is resnet18" in shown(old, new)
    assert "slower" not in shown(old, new)


def test_another_device_or_benchmark_is_refused(document, tmp_path):
    path, cpu = tmp_path / "old.json", torch.device("cpu")
    made = document({"PGD": {"afd": (1, 2, 3)}})
    made.write(path)
    assert compare.earlier(path, "attacks", cpu) == made
    with pytest.raises(DocumentError, match="is of benchmark 'attacks'; it must be of 'kernels'"):
        compare.earlier(path, "kernels", cpu)
    document({}, device="Abacus").write(path)
    with pytest.raises(DocumentError, match=r"measured on Abacus, \d+ threads?; this run is on .*cannot be compared"):
        compare.earlier(path, "attacks", cpu)
    document({}, threads=made.threads + 1).write(path)
    with pytest.raises(DocumentError, match=f"{made.threads + 1} threads; this run"):
        compare.earlier(path, "attacks", cpu)
