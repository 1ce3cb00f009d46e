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


class StandIn:
    """A GPU on which time passes as its kernels say: what `afd.bench.gpu.Gpu` does, on the CPU and by rule."""

    l2_bytes = 1000
    launch_seconds, graph_seconds = 30e-6, 8e-6  # of the host

    def __init__(self):
        self.host = self.device = 0.0
        self.tape = None  # seconds of the kernels that are being recorded
        self.log = []

    def kernel(self, seconds):
        """Launches one that takes so long."""
        if self.tape is None:
            self.host += self.launch_seconds
            self.device += seconds
        else:
            self.tape.append(seconds)

    def synchronise(self):
        """What a kernel's caller must not do while it is recorded."""
        if self.tape is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.host += 1e-3

    def now(self):
        return self.host

    def wait(self):
        self.log.append("wait")

    def warm(self, work):
        self.log.append("warm")
        work()

    def record(self, work):
        self.log.append("record")
        self.tape, kernels = [], None
        try:
            work()
            kernels = self.tape
        finally:
            self.tape = None
        return Graph(self, kernels)

    def time(self, work):
        before = self.device
        work()
        seconds = self.device - before
        return lambda: seconds

    def free(self):
        self.log.append("free")

    def copy_rate(self):
        return 2e12


class Graph:
    """Its recording."""

    def __init__(self, gpu, kernels):
        self.gpu, self.kernels = gpu, kernels

    def __call__(self):
        self.gpu.log.append("replay")
        self.gpu.host += self.gpu.graph_seconds
        self.gpu.device += sum(self.kernels)


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

    def make(cases, rounds=9, settings=None, **changes):
        made = {
            name: Case({"eps": 0.1}, {who: Candidate(Timing(*taken), {"of_floor": 0.5}) for who, taken in one.items()})
            for name, one in cases.items()
        }
        whole = Document.here("attacks", torch.device("cpu"), rounds, settings or {"model": "lenet"}, made)
        return replace(whole, **changes)

    return make
