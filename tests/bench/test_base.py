"""A run is on disk case by case, says what it is at, reads its words, and is reported and compared truthfully."""

import io
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from full_disk import REASONS
from rich.console import Console

from afd import deprecated, process
from afd.bench import base, results
from afd.bench.__main__ import asked
from afd.bench.attacks import AttackBench
from afd.bench.base import Benchmark, built, run
from afd.bench.kernels import KernelBench
from afd.bench.metering import in_turn
from afd.bench.methods import MethodsBench
from afd.bench.results import Candidate, Case, Column, DocumentError, Timing, earlier, read
from afd.cli import main
from afd.deprecated import OldSpellingWarning
from afd.files import FileError, FolderError


def timed(**figures):
    return Case({}, {"afd": Candidate(Timing(1.0, 2.0, 3.0), figures)})


@dataclass(frozen=True, kw_only=True)
class Three(Benchmark):
    """Three cases; what is on disk, and was told, is looked at before each."""

    name = "kernels"
    columns = (Column("rate", "rate"),)
    seen: list
    fails: bool = False

    def measure(self, device, say):
        del device
        for name, case in (("first", timed()), ("second", timed()), ("first", timed(rate=0.5)), ("", None)):
            self.seen.append(read(self.out) if self.out.exists() else None)
            if self.fails and len(self.seen) == 3:
                raise RuntimeError("the device has gone")
            say("something was left out")
            if case:
                yield name, case


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
    assert "something was left out\n" in console.export_text().replace("  ", "")


def test_an_error_leaves_what_was_measured_which_can_be_compared_with(tmp_path, console):
    out = tmp_path / "k.json"
    with pytest.raises(RuntimeError, match="the device has gone"):
        run(Three(seen=[], out=out, fails=True), console)
    left = read(out)
    assert (list(left.cases), left.finished) == (["first", "second"], False)
    run(Three(seen=[], out=out, since=out), console)
    shown = " ".join(console.export_text().split())
    assert "a run that was cut off: what it had measured by then" in shown
    assert shown.count("within noise") == 2


# --- What is being done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, False), (True, True)])
def test_in_a_log_details_come_now_and_then_and_on_a_terminal_in_a_line_that_is_taken_away(
    terminal, quiet, monkeypatch
):
    clock, shown = [100.0], Console(file=io.StringIO(), force_terminal=terminal, quiet=quiet, width=60)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    base.begin("nobody listens")
    base.detail("nobody listens")
    with base.telling(shown, "bench attacks"):
        base.begin("building lenet")
        base.begin("PGD-10" + "x" * 100 * terminal)
        for second in range(30):
            clock[0] = 100.0 + second
            base.detail(f"repeat {second}")
    told = shown.file.getvalue()
    if quiet:
        assert told == ""
    elif terminal:
        assert told.count("\n") <= 1, "the line is written over"
        assert "\x1b[2K" in told.rpartition("PGD-10")[2]
    else:
        doing = ["building lenet", "PGD-10", "PGD-10: repeat 10", "PGD-10: repeat 20"]
        assert told.splitlines() == [f"bench attacks: {one}" for one in doing]


def test_it_is_told_before_a_call_and_not_within_what_is_timed(monkeypatch):
    order = []
    monkeypatch.setattr(base, "detail", order.append)

    def clock(call):
        order.append("from")
        call()
        order.append("to")
        return lambda: 1.0

    in_turn({"afd": lambda: order.append("call")}, 2, clock)
    assert order == [x for i in (1, 2) for x in (f"repeat {i} of 2, afd", "from", "call", "to")]


# --- Words -----------------------------------------------------------------------------------------------------------


def test_words_are_read_as_the_options_are_annotated():
    def read(*words):
        return built((AttackBench, KernelBench, MethodsBench), words)

    bench = read("attacks", "shape=3,224,224", "eps=0.5", "batch=64", "model=a.b:c", "since=x/y.json")
    assert (bench.name, bench.shape, bench.eps, bench.batch) == ("attacks", (3, 224, 224), 0.5, 64)
    assert (bench.model, bench.since, bench.out, bench.steps) == ("a.b:c", Path("x/y.json"), None, 20)
    assert read("methods", "case=small", "case=resnet18").case == "resnet18", "the last counts"
    assert read("attacks", "model=a=b").model == "a=b"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: benchmark"),
        (["speed"], "argument benchmark: invalid choice: 'speed' (choose from "),
        (["methods", "size=3"], "unrecognized arguments: --size=3"),
        (["methods", "case=vgg"], "argument --case: invalid choice: 'vgg' (choose from "),
        (["kernels", "repeats"], "argument --repeats: expected one argument"),
        (["kernels", "repeats=1.5"], "argument --repeats: invalid int value: '1.5'"),
        (["attacks", "shape=3,x,4"], "argument --shape: invalid integers value: '3,x,4'"),
        (["attacks", "out="], "out is '.'; it must be the name of a JSON file"),
        (["kernels", "sizes=vast", "out=k.json"], "sizes is 'vast'; allowed are "),
        (["kernels", "repeats=0"], "repeats is 0; it must be"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["afd.bench", *words])
    assert process.carry_out(asked, "afd.bench") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"afd.bench: error: {said}")


@pytest.mark.parametrize("name", ["round", "step"])
@pytest.mark.parametrize("repeats", [["--rounds", "0"], ["--rounds=0"]])
def test_old_words_mean_what_they_meant(name, repeats, monkeypatch, capsys):
    with pytest.warns(OldSpellingWarning) as told:
        assert main(["bench", name, "--case", "small", *repeats]) == 2
    monkeypatch.setattr(sys, "argv", ["afd.bench", name, repeats[0].strip("-").replace("=0", "") + "=0"])
    with pytest.warns(OldSpellingWarning) as told_again:
        assert process.carry_out(asked, "afd.bench") == 2
    said = [f"afd bench {name} is now afd bench methods --methods afd", "--rounds is now --repeats"]
    assert [str(one.message) for one in told] == said
    assert [str(one.message) for one in told_again] == [said[0], "rounds is now repeats"]
    assert capsys.readouterr().err.count("repeats is 0; it must be") == 2


@pytest.mark.parametrize("words", [["--compare", "pyproject.toml"], ["--compare=pyproject.toml"]])
def test_compare_of_earlier_days_is_since(words, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.warns(OldSpellingWarning, match="^--compare is now --since$"):
        assert main(["bench", "attacks", *words]) == 2
    assert "pyproject.toml is not JSON" in capsys.readouterr().err
    with pytest.warns(OldSpellingWarning, match="^compare is now since$"):
        assert deprecated.bench_words(["attacks", "compare=x"]) == ["attacks", "since=x"]


def test_what_timed_afd_alone_times_afd_alone():
    with pytest.warns(OldSpellingWarning):
        words = deprecated.bench_words(["step", "schedules=alternating"])
    assert built([MethodsBench], words) == MethodsBench(methods="afd", schedules="alternating")


# --- The document ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read_of_version_1_too(document, tmp_path):
    """Which said rounds, and at first not whether it was whole."""
    made = document({"PGD": {"afd": (1.0, 2.0, 3.0), "floor": (0.5, 0.6, 0.7)}}, benchmark="step")
    made.write(path := tmp_path / "new" / "a.json")
    assert read(path) == read(path, "step") == made
    kept = json.loads(path.read_text())
    assert (kept["format"], kept["version"]) == (results.FORMAT, results.VERSION)
    assert {"afd", "python", "torch"} <= set(kept["versions"])
    assert kept["cases"]["PGD"]["candidates"]["afd"]["seconds"] == {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    kept |= {"version": 1, "benchmark": "round", "rounds": kept.pop("repeats")}
    assert kept.pop("finished") is True
    path.write_text(json.dumps(kept))
    assert read(path, "step") == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has format None, version None; afd bench reads format 'afd-bench', version 2"),
        ('{"benchmark": "attacks", "seconds": {}}', "has format None, version None"),
        ('{"format": "afd-bench", "version": 3}', "has format 'afd-bench', version 3; afd bench reads"),
        ('{"format": "afd-bench", "version": 1, "benchmark": "attacks"}', "damaged: 'cases'"),
        ('{"format": "afd-bench", "version": 2, "benchmark": "attacks", "cases": {}}', "damaged: .*missing"),
        ('{"format": "afd-bench", "version": 2, "benchmark": "kernels"}', "is of benchmark 'kernels'; it must be of"),
        (None, r"cannot be read: No such file"),
    ],
)
def test_other_files_are_named(text, message, tmp_path):
    path = tmp_path / "b.json"
    if text:
        path.write_text(text)
    with pytest.raises(DocumentError, match=message) as raised:
        read(path, "attacks")
    assert str(path) in str(raised.value)


def test_a_full_disk_leaves_the_earlier_document_and_no_picture(document, disk):
    path = disk.folder / "out" / "bench.json"
    made = document({"PGD": {"afd": (1.0, 2.0, 3.0)}})
    made.write(path)
    with disk.full():
        for write, at in ((made.write, path), (lambda at: results.chart(at, made), path.with_suffix(".png"))):
            with pytest.raises(FileError, match=f"cannot write {at}: {REASONS}"):
                write(at)
    assert read(path) == made
    assert disk.files() == ["out/bench.json"]
    with pytest.raises(FolderError, match=r"bench\.json is a file; it must be a folder"):
        made.write(path / "bench.json")


# --- The report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "text"),
    [
        *((results.duration(seconds), text) for seconds, text in (
            (12.345, "12.3 s"), (1.0, "1 s"), (0.0123, "12.3 ms"), (0.000185, "185 µs"), (3e-7, "0.3 µs"))),
        *((Column("share", "share", "{:.0%}").cell(value), text) for value, text in (
            (0.5, "50%"), (None, ""), ("bf16", "bf16"))),
    ],
)  # fmt: skip
def test_figures_are_written_for_people(written, text):
    assert written == text


def shown(table, width=200):
    console = Console(record=True, width=width)
    results.whole(console, table)
    return console.export_text()


def test_a_table_has_a_row_for_each_candidate_and_a_picture_a_panel_for_each_case(document, tmp_path):
    made = document({"PGD": {"afd": (0.001, 0.002, 0.003), "floor": (1, 1, 1)}, "APGD": {"afd": (1, 2, 3)}})
    columns = [Column("of floor", "of_floor", "{:.0%}"), Column("missing", "missing")]
    lines = [line.split() for line in shown(results.table(made, columns), width=20).splitlines()]  # but printed whole
    assert ["afd", "2", "ms", "1", "ms", "-", "3", "ms", "50%"] in lines
    assert ["floor", "1", "s", "1", "s", "-", "1", "s", "50%"] in lines
    results.chart(tmp_path / "a.png", made)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_candidate_of_either_run_is_compared_unless_settings_differ(document):
    old = document({"PGD": {"afd": (1, 2, 3), "art": (4, 5, 6)}})
    new = document({"PGD": {"afd": (4, 4, 5), "foolbox": (7, 8, 9)}, "APGD": {"afd": (1, 1, 1)}})
    text = shown(results.comparison(old, new))
    lines = {line.split()[0]: line.rstrip() for line in text.splitlines() if line.strip()}
    assert lines["art"].endswith("only then")
    assert "only now" in lines["foolbox"]
    assert all(word in text for word in ("APGD", "2.00", "slower"))
    text = shown(results.comparison(old, replace(new, settings={"model": "resnet18"})))
    assert "not comparable: model was lenet, is resnet18" in text
    assert "slower" not in text


@pytest.mark.parametrize(
    ("now", "repeats", "told"),
    [
        ((1.3, 1.4, 1.5), 9, "slower"),
        ((0.5, 0.6, 0.7), 9, "faster"),
        ((1.1, 1.4, 1.5), 9, "within noise"),
        ((0.5, 0.7, 0.9), 9, "within noise"),
        ((1.3, 1.4, 1.5), 4, "too few repeats to tell (4)"),
    ],
)
def test_verdicts(now, repeats, told):
    assert results.verdict(Timing(0.8, 1.0, 1.2), Timing(*now), repeats) == told


def test_a_run_elsewhere_or_of_another_benchmark_is_refused(document, tmp_path):
    path, made = tmp_path / "old.json", document({"PGD": {"afd": (1, 2, 3)}})
    made.write(path)
    assert earlier(path, made) == made
    for here, said in (
        (replace(made, benchmark="kernels"), "is of benchmark 'attacks'; it must be of 'kernels'"),
        (replace(made, device="Abacus"), r"\d+ threads?; this run is on Abacus, \d+ threads?, so they cannot be comp"),
        (replace(made, threads=made.threads + 1), f"{made.threads + 1} threads, so they cannot be compared"),
    ):
        with pytest.raises(DocumentError, match=said):
            earlier(path, here)
