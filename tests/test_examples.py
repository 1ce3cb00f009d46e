"""The examples run as they are, in fewer epochs."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch):
    """As a user imports them in their folder."""
    monkeypatch.syspath_prepend(FOLDER)


def test_a_loop_of_ones_own(capsys):
    clean, robust = importlib.import_module("own_loop").main(epochs=3)
    assert clean > 0.3
    assert 0 <= robust < clean
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_method_of_ones_own(capsys):
    assert importlib.import_module("own_method").main(epochs=2) >= 0
    first, second = capsys.readouterr().out.splitlines()
    assert float(second.split()[2].rstrip("%")) > float(first.split()[2].rstrip("%"))  # it learns


@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_loops_of_others(package):
    pytest.importorskip(package, reason=f"{package} is nobody's requirement here")
    module = importlib.import_module("other_loops")
    train = {"lightning": module.with_lightning, "accelerate": module.with_accelerate}[package]
    _, loader = module.parts()
    model = train(epochs=2).eval()
    x, y = next(iter(loader))
    assert (model(x).argmax(1) == y).float().mean() > 0.4
