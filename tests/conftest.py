"""What every test room shares: the devices, and how hypothesis draws."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

# Processes that tests fork find the tests' own functions by the names that pytest gives their modules.
sys.path.append(str(Path(__file__).parents[1]))

# A shell that starts this in the background has it ignore Ctrl-C, which the processes that tests start would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Kernels and thread pools warm up at their first call, so the time of one example says nothing.
settings.register_profile("afd", deadline=None, max_examples=40, print_blob=True)
settings.register_profile("brief", settings.get_profile("afd"), max_examples=3)  # where each example takes long
settings.load_profile(os.environ.get("AFD_HYPOTHESIS", "afd"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The weights and images that a test draws are the same each time, fixtures of its room among them."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the ops serve; the CUDA cases carry the gpu mark."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU, for tests (marked gpu) that make sense only there."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def tape() -> ModuleType:
    """The stand-in for CUDA graphs, which takes any device's work."""
    return importlib.import_module("tape")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Any]:
    """A small disk (`full_disk.Disk`) that a test may fill."""
    with importlib.import_module("full_disk").small_disk(tmp_path / "disk") as made:
        yield made


@pytest.fixture
def graphs_are_tapes(tape: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], list[object]]:
    """What makes the graphs of a module tapes, and returns those that it records from then on."""

    def exchange(module: ModuleType) -> list[object]:
        made: list[object] = []

        def recorded(_device: torch.device) -> object:
            made.append(tape.Tape())
            return made[-1]

        monkeypatch.setattr(module, "Graph", recorded)
        return made

    return exchange
