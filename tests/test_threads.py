"""On a busy machine OpenMP's threads sleep while they wait; on a free one nothing is touched."""

import os
import subprocess
import sys

import pytest

from afd import process


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of four cores on which so many threads run, ours included."""
    for name in (*process.SETTLED, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(process, "BETWEEN", 0)
    monkeypatch.setattr(process, "RUNNING", str(tmp_path / "loadavg"))

    def of(running, cores=4):
        (tmp_path / "loadavg").write_text(f"0.10 0.20 0.30 {running}/321 4711\n")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))

    yield of
    os.environ.pop("OMP_WAIT_POLICY", None)


def test_beside_others_they_sleep_and_it_is_said(machine, capsys):
    machine(running=3)
    process.sleep_if_busy()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert capsys.readouterr().err.startswith("afd: this machine is busy (2 threads of other processes, 4 cores)")


@pytest.mark.parametrize(("running", "cores"), [(1, 4), (3, 2)])
def test_where_there_are_cores_enough_nothing_is_touched(machine, capsys, running, cores):
    machine(running, cores)
    process.sleep_if_busy()
    assert "OMP_WAIT_POLICY" not in os.environ
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [*process.SETTLED, "OMP_NUM_THREADS"])
def test_nor_where_the_user_has_settled_it(machine, monkeypatch, name):
    machine(running=9)
    monkeypatch.setenv(name, "1")
    process.sleep_if_busy()
    assert os.environ.get("OMP_WAIT_POLICY") == ("1" if name == "OMP_WAIT_POLICY" else None)


def test_nor_where_the_system_does_not_say(machine, monkeypatch):
    monkeypatch.setattr(process, "RUNNING", "/nowhere/loadavg")
    process.sleep_if_busy()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_it_is_settled_before_torch_is_imported(tmp_path):
    """By the command itself, whose module for this is imported without torch."""
    code = "import sys, afd.__main__, afd.process, afd.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
