"""`afd compare --results`: finished evaluations and comparisons side by side, as far as that makes sense."""

from __future__ import annotations

import copy
import io
import json
import os
from pathlib import Path

import pytest
import torch
from comparisons import comparison, entry, waiting
from rich.console import Console

from afd import deprecated
from afd.cli import main
from afd.deprecated import OldSpellingWarning
from afd.evaluation.outcome import read_results
from afd.experiments.comparison.results import compare_results, paired_table
from afd.metrics import packed, paired_interval

SAVED = Path(__file__).parents[3] / "benchmarks" / "results"


def evaluation(folder, *, clean=None, worst=None, source="autoattack-afd-wgan", **changed):
    """A folder of an evaluation that was really made, with the bits of images that versions before left out."""
    results = read_results(SAVED / f"evaluation-mnist-{source}.json")
    results["data"] |= changed.pop("data", {})
    results["protocol"]["reference"] |= changed.pop("reference", {})
    results |= changed
    if clean is not None:
        count = results["data"]["count"]
        results["withstood"] = {
            "clean": packed(torch.arange(count) < clean),
            "stages": {"apgd-ce": {"0.3": packed(torch.arange(count) < worst + 5)}, "probe-noise": {"0.3": "00"}},
            "worst_case": {"Linf": {"0.3": packed(torch.arange(count) < worst)}},
        }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def saved(folder, content):
    """A folder of a comparison."""
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(json.dumps(content))
    return folder


def made(*names, **changed):
    shares = {"natural": (0.99, 0.0), "at": (0.98, 0.9), "trades": (0.985, 0.89)}
    return comparison({name: entry(name, [shares[name]]) for name in names}, **changed)


def failed(capsys, *words):
    assert main(["compare", "--results", *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("afd: error: ")
    assert told.count("\n") == 1
    return told


def side_by_side(folders, out):
    console = Console(width=200, file=io.StringIO())
    compare_results(folders, out, overwrite=False, console=console)
    return console.file.getvalue()


# --- Evaluations -----------------------------------------------------------------------------------------------------


def test_evaluations_are_paired_over_their_images(tmp_path):
    one = evaluation(tmp_path / "one", clean=980, worst=866)
    other = evaluation(tmp_path / "other", clean=990, worst=800)
    shown = side_by_side([one, other], tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "Percentage points more than AFD-WGAN (one), on the same 1000 images" in text
    low, high = paired_interval(torch.arange(1000) < 800, torch.arange(1000) < 866)
    span = f"{100 * low:+.2f} to {100 * high:+.2f}"
    assert f"| AFD-WGAN (other) | worst case, L∞ ε = 0.3 (autoattack) | -6.60 * | {span} |" in text
    assert "| AFD-WGAN (other) | clean | +1.00 * |" in text
    assert "| AFD-WGAN (other) | apgd-ce, ε = 0.3 | -6.60 * |" in text
    assert "probe" not in text
    assert span in shown
    assert span in (tmp_path / "out" / "report.html").read_text()


def test_results_of_earlier_versions_are_compared_without_pairs(tmp_path):
    folders = [evaluation(tmp_path / "one"), evaluation(tmp_path / "two", clean=990, worst=800)]
    side_by_side(folders, tmp_path / "out")
    assert "Percentage points" not in (tmp_path / "out" / "tables.md").read_text()
    assert paired_table([read_results(folder) for folder in folders]) is None


def test_figures_of_other_protocols_are_not_paired(tmp_path):
    one = read_results(evaluation(tmp_path / "one", clean=990, worst=800))
    other = copy.deepcopy(one)
    other["protocol"]["name"] = "quick"
    figures = [row[1] for row in paired_table([one, other]).rows]
    assert figures == ["clean", "apgd-ce, ε = 0.3"]


def test_models_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "first", tmp_path / "b" / "first", tmp_path / "c" / "third"]
    folders = [evaluation(folder) for folder in folders]
    folders.append(evaluation(tmp_path / "natural", source="autoattack-natural"))
    side_by_side(folders, tmp_path / "out")
    names = [line.split(" | ")[0] for line in (tmp_path / "out" / "tables.md").read_text().splitlines()]
    names = [name.removeprefix("| ").removesuffix(" †") for name in names if name.startswith("| ")]
    assert names[2:6] == [f"AFD-WGAN ({folders[0]})", f"AFD-WGAN ({folders[1]})", "AFD-WGAN (third)", "natural"]


def test_figures_at_other_radii_are_told_apart(tmp_path):
    one, other = evaluation(tmp_path / "one"), evaluation(tmp_path / "other", reference={"text": "0.2"})
    side_by_side([one, other], tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "AFD-WGAN (one), L∞ ε = 0.3" in text
    assert "AFD-WGAN (other), L∞ ε = 0.2" in text


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"name": "digits"}, "data is digits"), ({"count": 500}, "images is 500"), ({"split": "train"}, "split is train")],
)
def test_evaluations_of_other_images_are_refused(tmp_path, capsys, changed, told):
    one, other = evaluation(tmp_path / "one"), evaluation(tmp_path / "other", data=changed)
    said = failed(capsys, one, other, "--out", tmp_path / "out")
    assert f"results names evaluations of other settings: {told} in {other}, and " in said
    assert said.endswith(f" in {one}\n")
    assert not (tmp_path / "out").exists()


# --- Comparisons -----------------------------------------------------------------------------------------------------


def test_comparisons_are_put_into_one_table(tmp_path):
    first, two = made("natural", "at"), made("at", "trades", seeds=[0, 1])
    two["machine"] = two["machine"] | {"device": "Xeon"}
    for made_there in two["entries"].values():
        del made_there["runs"]["0"]["made"]  # as in records of before
    one, other = saved(tmp_path / "one", first), saved(tmp_path / "other", two)
    report = other / "trades" / "seed-0" / "evaluation" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("")
    shown = side_by_side([one, other], tmp_path / "deeper" / "out")
    text = (tmp_path / "deeper" / "out" / "table.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:6] == ["natural", "at (one)", "at (other)", "trades"]
    assert "- machine: device AMD EPYC, 1 thread, system Linux" in text
    assert "- made otherwise: at (other) (seed 0), trades (seed 0): device Xeon" in text
    assert "seeds: 0, 1" in text
    assert f"afd compare --results {one} {other}" in text
    assert "more than at (one)" in " ".join(shown.split())
    trades, at = two["entries"]["trades"]["runs"]["0"], first["entries"]["at"]["runs"]["0"]
    apart = 100 * (trades["evaluation"]["autoattack"] - at["evaluation"]["autoattack"])
    assert f"{apart:+.2f} \\* (" in next(line for line in text.splitlines() if line.startswith("| trades"))
    page = (tmp_path / "deeper" / "out" / "report.html").read_text()
    assert f'href="{os.path.relpath(report, tmp_path / "deeper" / "out")}"' in page
    assert {path.name for path in (tmp_path / "deeper" / "out").iterdir() if not path.name.startswith(".")} == {
        "compare.png", "report.html", "table.csv", "table.md",
    }  # fmt: skip


def test_records_that_do_not_say_the_options_for_all_are_put_beside_others(tmp_path):
    first, two = made("at"), made("trades")
    del two["train"]
    side_by_side([saved(tmp_path / "one", first), saved(tmp_path / "other", two)], tmp_path / "out")
    assert "| trades | " in (tmp_path / "out" / "table.md").read_text()


def test_without_a_folder_it_stands_where_comparisons_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert side_by_side([saved(tmp_path / "one", made("at"))], None)
    assert (tmp_path / "runs" / "compare" / "0001" / "table.md").exists()


def test_a_single_comparison_is_shown_as_it_was(tmp_path):
    one = saved(tmp_path / "one", made("at", "trades"))
    side_by_side([one / "compare.json"], tmp_path / "out")
    assert "| trades | " in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"ball": {"norm": "Linf", "eps": 0.2, "text": "0.2"}},
            "ball is L∞ ε = 0.2 in {other}, and L∞ ε = 0.3 in {one}",
        ),
        ({"images": 500}, "images is 500 in {other}, and 1000 in {one}"),
        ({"network": {"name": "lenet"}}, "network is lenet in {other}, and convnet, width 8, activation relu"),
        ({"train": "--data mnist --ema 0.9"}, "options for all is --data mnist --ema 0.9 in {other}, and --data mnist"),
        ({"train": ""}, "options for all is nothing in {other}, and --data mnist --width 8 in {one}"),
        ({"budget": {"asked": "5m", "passes": 1e8}}, "budget is 1e+08 passes in {other}, and 1.2e+08 passes in {one}"),
        ({"budget": {"asked": "12 epochs", "passes": None}}, "budget is 12 epochs in {other}, and 1.2e+08 passes"),
    ],
)
def test_comparisons_of_other_settings_are_refused(tmp_path, capsys, changed, told):
    one, other = saved(tmp_path / "one", made("at")), saved(tmp_path / "other", made("trades", **changed))
    said = failed(capsys, one, other, "--out", tmp_path / "out")
    assert f"results names comparisons of other settings: {told.format(one=one, other=other)}" in said
    assert not (tmp_path / "out").exists()


# --- What cannot be ---------------------------------------------------------------------------------------------------


def test_other_bad_results_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = saved(tmp_path / "one", made("at")), evaluation(tmp_path / "other")
    assert f"results names a comparison, {one}, and an evaluation, {other}; all must be" in failed(capsys, other, one)
    assert f"results names {one} twice; name each folder once" in failed(capsys, one, one / "compare.json")
    unfinished = saved(tmp_path / "half", comparison({"at": waiting("at")}, finished=False))
    assert f"{unfinished} holds a comparison that is not finished" in failed(capsys, unfinished)
    newer = saved(tmp_path / "newer", made("at") | {"version": 2})
    assert "has version 2; this afd reads 1" in failed(capsys, newer)
    damaged = saved(tmp_path / "damaged", {key: one for key, one in made("at").items() if key != "budget"})
    assert "is damaged: it lacks budget" in failed(capsys, damaged)
    assert "is not the result of afd compare" in failed(capsys, saved(tmp_path / "odd", {}))
    (damaged / "compare.json").write_text("{")
    assert "compare.json cannot be read" in failed(capsys, damaged)
    assert failed(capsys, tmp_path) == f"afd: error: {tmp_path} holds no results.json\n"
    os.mkfifo(tmp_path / "pipe")
    assert "results is pipe, which is a device or pipe" in failed(capsys, "pipe")
    assert "File name too long" in failed(capsys, "x" * 300)
    assert "holds the runs of a comparison; name another folder" in failed(capsys, one, "--out", one, "--overwrite")
    assert "which is one of the results; name another" in failed(capsys, other, "--out", other, "--overwrite")
    assert (other / "results.json").exists()
    assert main(["compare"]) == 2
    assert "methods is missing; name them" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_report_is_replaced_only_where_that_is_asked_for(tmp_path, capsys):
    one, out = saved(tmp_path / "one", made("at")), tmp_path / "out"
    other = evaluation(tmp_path / "other")
    words = ["compare", "--results", str(one), "--out", str(out)]
    assert main(words) == 0
    assert "holds a table of results; name another folder, or pass --overwrite" in failed(capsys, one, "--out", out)
    assert f"{other}, which holds a finished evaluation; name" in failed(capsys, one, "--out", other)
    (out / "table.md").unlink()  # as a kill leaves it
    assert main(words) == 0
    assert main([*words, "--overwrite"]) == 0
    assert (out / "table.md").exists()


def test_evaluate_compare_is_understood_and_warns(tmp_path, capsys):
    folders = [str(evaluation(tmp_path / name)) for name in ("one", "two")]
    with pytest.warns(OldSpellingWarning, match="^afd evaluate --compare is now afd compare --results$"):
        assert main(["evaluate", "--compare", *folders, "--out", str(tmp_path / "out")]) == 0
    assert "AFD-WGAN (two)" in (tmp_path / "out" / "tables.md").read_text()
    assert deprecated.compared_words(["runs/0001", "--protocol", "quick"]) is None
    with pytest.warns(OldSpellingWarning):
        assert deprecated.compared_words(["--compare=a", "--out", "b"]) == ["--results=a", "--out", "b"]
