"""The attack benchmark end to end on a tiny factory, and its errors."""

from __future__ import annotations

import json
import sys
import types

import pytest
from rich.console import Console
from torch import nn

from afd.bench import attacks, models
from afd.bench.attacks import AttackBench
from afd.errors import InputError


@pytest.fixture
def tiny(monkeypatch):
    module = types.ModuleType("tiny_factory")
    module.make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    module.broken = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "tiny_factory", module)
    return "tiny_factory:make"


def test_measures_prints_and_records(tiny, tmp_path):
    console = Console(record=True, width=200)
    out = tmp_path / "b.json"
    options = AttackBench(
        model=tiny,
        batch=6,
        shape=(3, 4, 4),
        attack="pgd,apgd",
        norm="Linf,L1",
        steps=3,
        against="eager",
        rounds=2,
        out=out,
    )
    attacks.run(options, console)
    shown = console.export_text()
    for words in ("PGD-3 Linf on tiny_factory:make 6x3x4x4", "APGD-3 L1", "afd auto", "accuracy left"):
        assert words in shown
    assert "left out: a loop by hand offers no APGD in L1" in shown
    kept = json.loads(out.read_text())
    assert kept["benchmark"] == "attacks"
    libraries = kept["seconds"]["PGD-3 L1"]["libraries"]
    assert list(libraries) == ["floor", "afd", "afd auto", "eager"]
    assert libraries["afd"]["seconds"]["p50"] > 0
    assert libraries["afd"]["peak_bytes"] > 0
    assert 0 <= libraries["eager"]["accuracy_left"] <= 1


def test_the_subject_classifies_its_own_images_rightly(tiny):
    target = models.subject(tiny, batch=130, shape=(3, 4, 4))
    assert attacks.accuracy(target, target.x) == 1.0
    assert target.size == "130x3x4x4"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("alexnet", "model is 'alexnet'; allowed are lenet, resnet18, and package.module:factory"),
        ("no_such_package:make", "which cannot be imported: No module named 'no_such_package'"),
        ("tiny_factory:nothing", "which cannot be imported: .*nothing"),
        ("tiny_factory:broken", "whose factory raised ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_models_that_cannot_be_had_are_named(model, message):
    with pytest.raises(InputError, match=message):
        models.subject(model)
