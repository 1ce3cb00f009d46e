"""The log on disk goes on after an interruption without repeating; the terminal is quiet where there is none."""

import io
import json

import pytest
from rich.console import Console

from afd.training import EpochReport, IntervalReport, json_lines
from afd.training.progress import Terminal


def interval(number):
    return IntervalReport(1, number, number, 9, {"task": 0.5 / number}, {"task": 0.1})


def epoch(number):
    return EpochReport(1, number, {"task": 0.5}, 0.9, 0.7, 100.0, {"task": 0.1})


def test_json_lines(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = json_lines(path)
    log(interval(3))
    log(epoch(4))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["interval", "epoch"]
    assert lines[0]["losses"] == {"task": 0.5 / 3}
    assert lines[1]["robust"] == 0.7


def test_a_resumed_log_does_not_repeat(tmp_path):
    path = tmp_path / "log.jsonl"
    first = json_lines(path)
    for number in (2, 4, 6):
        first(interval(number))
    with path.open("a") as file:
        file.write('{"kind": "interval", "ro')  # killed while it wrote
    second = json_lines(path)
    second(interval(4))
    second(interval(6))
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [2, 4, 6]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_on_terminals_only(terminal):
    out = io.StringIO()
    with Terminal(Console(file=out, force_terminal=terminal, width=100), 3, "digits afd") as callback:
        callback(interval(4))
        callback(epoch(9))
    text = out.getvalue()
    assert ("━" in text) is terminal
    assert "digits afd   1/3" in text
    assert "natural 90.00%  robust 70.00%  100 images/s" in text
