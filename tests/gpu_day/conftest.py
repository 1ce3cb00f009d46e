"""A day that needs neither torch nor a GPU, whose commands are a few lines of Python."""

import json
import os
import shlex
import signal
import sys
import time

import pytest
from gpu_day import results
from gpu_day.__main__ import Day
from gpu_day.plan import Step
from gpu_day.run import environment


@pytest.fixture(autouse=True)
def listening():
    """SIGINT is heard here, as in the day's own process; what is started in the background would ignore it."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make_day(tmp_path):
    def make(seconds=60.0):
        children = environment(tmp_path, tmp_path / "work", os.environ)
        content = results.opened(tmp_path / "out", "abc") | {"machine": {"gpu": "H100"}}
        (tmp_path / "work" / "logs").mkdir(exist_ok=True)
        return Day(tmp_path / "out", {"work": tmp_path / "work"}, children, content, time.monotonic() + seconds, [])

    return make


@pytest.fixture
def make_step():
    """A step whose commands are Python, each given the step's folder."""

    def make(name, *codes, read=None, **settings):
        lines = [f"{sys.executable} -c {shlex.quote(code)}".replace("{", "{{").replace("}", "}}") for code in codes]
        return Step(2, name, [f"{line} {{folder}}" for line in lines], read, **settings)

    return make


@pytest.fixture
def written(tmp_path):
    """The steps as they lie on disk."""
    return lambda: json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
