"""A benchmark says at once that it is at work, and at what; it tells nothing while a call is timed."""

import io
import time

import torch
from rich.console import Console

from afd.bench import at_work
from afd.bench.attacks import AttackBench
from afd.bench.program import run
from afd.bench.timing import in_turn


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=60)


def test_in_a_log_each_case_is_a_line_and_details_come_now_and_then(monkeypatch):
    clock, shown = [100.0], console(terminal=False)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with at_work.telling(shown, "bench attacks"):
        at_work.begin("building lenet")
        at_work.begin("PGD-10")
        for second in range(30):
            clock[0] = 100.0 + second
            at_work.now(f"round {second}")
    assert shown.file.getvalue().splitlines() == [
        "bench attacks: building lenet", "bench attacks: PGD-10", "bench attacks: PGD-10: round 10",
        "bench attacks: PGD-10: round 20",
    ]  # fmt: skip


def test_on_a_terminal_it_is_one_line_that_is_taken_away(monkeypatch):
    clock, shown = [100.0], console(terminal=True)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with at_work.telling(shown, "bench"):
        at_work.begin("x" * 100)
        clock[0] += 1
        at_work.now("round 1 of 2, afd")
    lines = shown.file.getvalue().split(at_work.ERASE)
    assert lines[-1] == ""
    assert all(len(line) < 60 and "\n" not in line for line in lines)
    assert len(lines) == 4


def test_without_a_listener_nothing_is_told_and_a_quiet_one_stays_quiet():
    at_work.begin("a")
    at_work.now("b")
    quiet = Console(file=io.StringIO(), quiet=True)
    with at_work.telling(quiet, "bench"):
        at_work.begin("a")
    assert quiet.file.getvalue() == ""


def test_it_is_told_before_a_call_and_not_within_what_is_timed(monkeypatch):
    order = []
    monkeypatch.setattr(at_work, "now", lambda text: order.append(text))

    def clock(call):
        order.append("from")
        call()
        order.append("to")
        return lambda: 1.0

    in_turn({"afd": lambda: order.append("call")}, 2, clock)
    assert order == [x for i in (1, 2) for x in (f"round {i} of 2, afd", "from", "call", "to")]


def test_a_benchmark_of_attacks_tells_its_first_line_before_it_builds_anything(tmp_path, monkeypatch):
    shown = console(terminal=False)
    seen = []

    def built():
        seen.append(shown.file.getvalue())
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))

    monkeypatch.setitem(__import__("afd.bench.models").bench.models.MODELS, "tiny", (built, (1, 4, 4), 4))
    run(AttackBench(model="tiny", steps=1, rounds=1, against="eager", out=tmp_path / "a.json"), shown)
    assert "bench attacks: building tiny\n" in seen[0]
    assert "bench attacks: PGD-1 Linf, 4x1x4x4\n" in shown.file.getvalue()
