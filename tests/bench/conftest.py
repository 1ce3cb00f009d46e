"""What the tests of benchmarks share: a quiet program, documents by hand, and a model that costs nothing."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from afd.bench.document import Candidate, Case, Document
from afd.bench.timing import Timing


@pytest.fixture
def tiny(monkeypatch):
    """A factory that can be imported: `tiny_factory:make`."""
    module = types.ModuleType("tiny_factory")
    module.make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    module.broken = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "tiny_factory", module)
    return "tiny_factory:make"


@pytest.fixture
def console():
    return Console(record=True, width=220)


@pytest.fixture
def document():
    """A function: case name -> candidate -> (p20, p50, p80) gives a document of this machine."""

    def make(cases, rounds=9, settings=None, **changes):
        made = {
            name: Case({"eps": 0.1}, {who: Candidate(Timing(*taken), {"of_floor": 0.5}) for who, taken in one.items()})
            for name, one in cases.items()
        }
        whole = Document.here("attacks", torch.device("cpu"), rounds, settings or {"model": "lenet"}, made)
        return replace(whole, **changes)

    return make
