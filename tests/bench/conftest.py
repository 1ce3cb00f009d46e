"""What the tests of benchmarks share: a quiet console, documents by hand, a GPU by rule, a model that costs nothing."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn

from afd.bench.metering import GpuClock
from afd.bench.results import Candidate, Case, Document, Timing


class StandIn(GpuClock):
    """The clock of a GPU on which time passes as its kernels say, on the CPU and by rule."""

    launch_seconds, graph_seconds = 30e-6, 8e-6  # of the host

    def __init__(self):
        self.said, self.log = [], []
        self.say, self.l2_bytes = self.said.append, 1000
        self.measured = {"copy_gigabytes_per_second": 2000.0}
        self.on_host = self.on_device = 0.0
        self.tape = None  # seconds of the kernels that are being recorded
        self.now = lambda: self.on_host
        self.wait, self.free = (partial(self.log.append, word) for word in ("wait", "free"))

    def kernel(self, seconds):
        """Launches one that takes so long."""
        if self.tape is None:
            self.on_host += self.launch_seconds
            self.on_device += seconds
        else:
            self.tape.append(seconds)

    def synchronise(self):
        """What a kernel's caller must not do while it is recorded."""
        if self.tape is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.on_host += 1e-3

    def warm(self, work):
        self.log.append("warm")
        work()

    def record(self, work):
        self.log.append("record")
        self.tape = kernels = []
        try:
            work()
        finally:
            self.tape = None

        def replay():
            self.log.append("replay")
            self.on_host += self.graph_seconds
            self.on_device += sum(kernels)

        return replay

    def seconds(self, work):
        before = self.on_device
        work()
        seconds = self.on_device - before
        return lambda: seconds


@pytest.fixture
def gpu():
    return StandIn()


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

    def make(cases, repeats=9, settings=None, **changes):
        made = {
            name: Case({"eps": 0.1}, {who: Candidate(Timing(*taken), {"of_floor": 0.5}) for who, taken in one.items()})
            for name, one in cases.items()
        }
        whole = Document.here("attacks", torch.device("cpu"), repeats, settings or {"model": "lenet"}, made)
        return replace(whole, **changes)

    return make
