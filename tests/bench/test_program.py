"""A run is on disk case by case: whatever ends it, what was measured can be read."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from afd.bench.document import Candidate, Case, read
from afd.bench.program import Benchmark, run
from afd.bench.show import Column
from afd.bench.timing import Timing


def timed(**figures):
    return Case({}, {"afd": Candidate(Timing(1.0, 2.0, 3.0), figures)})


@dataclass(frozen=True, kw_only=True)
class Three(Benchmark):
    """Three cases; what is on disk is looked at before each."""

    name = "kernels"
    columns = (Column("rate", "rate"),)
    seen: list
    fails: bool = False

    def look(self):
        self.seen.append(read(self.out) if self.out.exists() else None)

    def measure(self, device, say):
        del device, say
        self.look()
        yield "first", timed()
        self.look()
        yield "second", timed()
        self.look()
        if self.fails:
            raise RuntimeError("the device has gone")
        yield "first", timed(rate=0.5)
        self.look()


def test_each_case_is_written_when_it_is_measured(tmp_path, console):
    bench = Three(seen=[], out=tmp_path / "new" / "k.json")
    made = run(bench, console)
    assert [found and (list(found.cases), found.finished) for found in bench.seen] == [
        None, (["first"], False), (["first", "second"], False), (["first", "second"], False),
    ]  # fmt: skip
    assert made.finished
    assert read(bench.out) == made
    assert made.cases["first"].candidates["afd"].figures == {"rate": 0.5}
    assert sorted(path.name for path in bench.out.parent.iterdir()) == ["k.json", "k.png"]


def test_an_error_leaves_what_was_measured(tmp_path, console):
    bench = Three(seen=[], out=tmp_path / "k.json", fails=True)
    with pytest.raises(RuntimeError, match="the device has gone"):
        run(bench, console)
    left = read(bench.out)
    assert (list(left.cases), left.finished) == (["first", "second"], False)


def test_a_run_that_was_cut_off_can_be_compared_with(tmp_path, console):
    out = tmp_path / "k.json"
    with pytest.raises(RuntimeError):
        run(Three(seen=[], out=out, fails=True), console)
    run(Three(seen=[], out=out, compare=out), console)
    shown = " ".join(console.export_text().split())
    assert "a run that was cut off: what it had measured by then" in shown
    assert shown.count("within noise") == 2


def test_documents_of_before_are_of_whole_runs(document, tmp_path):
    path = tmp_path / "old.json"
    document({"PGD": {"afd": (1, 2, 3)}}).write(path)
    kept = json.loads(path.read_text())
    assert kept.pop("finished") is True
    path.write_text(json.dumps(kept))
    assert read(path).finished


def test_a_killed_run_leaves_its_finished_cases(tmp_path):
    out = tmp_path / "k.json"
    words = ["bench", "kernels", "--ops", "project,apgd_update", "--sizes", "cifar", "--against", "eager"]
    words += ["--rounds", "100", "--out", str(out)]
    running = subprocess.Popen([sys.executable, "-m", "afd", *words], cwd=Path(__file__).parents[2])
    try:
        while not out.exists():
            assert running.poll() is None, "it ended before its first case was on disk"
            time.sleep(0.01)
    finally:
        running.kill()
    assert running.wait() == -signal.SIGKILL
    left = read(out, "kernels")
    assert not left.finished
    assert "project Linf 128x3x32x32" in left.cases
    assert len(left.cases) < 4
    for case in left.cases.values():
        assert list(case.candidates) == ["native", "eager", "floor"]
        assert all(candidate.median > 0 for candidate in case.candidates.values())


def test_benchmarks_run_without_the_library_of_the_command_line(tmp_path):
    """Where only torch and what draws the tables is installed, they are called from Python."""
    script = f"""
import sys
sys.modules["tyro"] = None
from pathlib import Path
from rich.console import Console
import afd.bench.attacks, afd.bench.discriminator, afd.bench.rounds
from afd.bench.kernels import KernelBench
from afd.bench.program import run
run(KernelBench(ops="spectral_norm", sizes="cifar", against="eager", rounds=1, out=Path({str(tmp_path / "k.json")!r})),
    Console(quiet=True))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert read(tmp_path / "k.json", "kernels").finished
