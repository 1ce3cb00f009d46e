"""A setting that needs neither torch nor a GPU, and stages whose commands are a few lines of Python."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from gpu_day import build
from gpu_day.child import Command
from gpu_day.setting import Machine, Setting, environment
from gpu_day.steps import Stage, Step


@pytest.fixture(autouse=True)
def listening():
    """SIGINT is heard here, as in the day's own process; what is started in the background would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make_setting(tmp_path, monkeypatch):
    """A Setting in a temporary folder; machine and environment as asked for."""

    def make(gpu=None, data=None, given=None):
        machine = Machine("2.11.0", gpu=gpu, capability="9.0" if gpu else None, cores=2)
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        return Setting(
            tmp_path, work, tmp_path / "out", machine, environment(tmp_path, work, data, given or os.environ), data
        )

    return make


@pytest.fixture
def built(monkeypatch):
    """As if stage 1 had been there."""
    monkeypatch.setattr(build, "up_to_date", lambda _: True)


def python(name, code, **settings):
    """A command that runs Python."""
    return Command(name, (sys.executable, "-c", code), **settings)


def one(name, code="", **settings):
    """A step of one such command."""
    return Step(name, lambda _: [python(name, code)], **settings)


def stage(number, *steps, **settings):
    """A stage of steps."""
    return Stage(number, f"stage{number}", f"the stage {number}", share=1, steps=lambda _: steps, **settings)


def wait_for(path, seconds=20.0):
    """Until a child has written a file."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def kit():
    """The functions above."""
    return SimpleNamespace(python=python, one=one, stage=stage, wait_for=wait_for)
