"""What other programs print, as they print it."""

from __future__ import annotations

import json

import pytest
from gpu_day import readers

PTXAS = """
[1/9] Building CUDA object
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5quickPf' for 'sm_90'
ptxas info    : Function properties for _Z5quickPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compile time = 4.0 ms
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90'
ptxas info    : Function properties for _Z4slowPf
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Function properties for _Z6calledf
    99 bytes stack frame, 99 bytes spill stores, 99 bytes spill loads
"""
JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="4">
<testcase classname="tests.ops" name="test_a"/>
<testcase classname="tests.ops" name="test_b"><failure>x</failure></testcase>
<testcase classname="tests.ops" name="test_c"><skipped/></testcase>
<testcase classname="" name="tests.ops.test_d"><error message="collection failure">x</error></testcase>
</testsuite></testsuites>"""


def test_ptxas():
    quick, slow = readers.ptxas(PTXAS)
    assert quick == {
        "kernel": "_Z5quickPf", "architecture": "sm_90",
        "registers": 12, "stack": 0, "spill_stores": 0, "spill_loads": 0,
    }  # fmt: skip
    assert (slow["registers"], slow["stack"], slow["spill_stores"], slow["spill_loads"]) == (255, 8, 16, 24)


def test_junit_counts_and_a_report_cut_off_half_way(tmp_path):
    (tmp_path / "whole.xml").write_text(JUNIT)
    (tmp_path / "half.xml").write_text(JUNIT[:150])
    counts, failed = readers.junit(sorted(tmp_path.glob("*.xml")))
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failed == ["tests.ops::test_b", "::tests.ops.test_d"]


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 1 error\n========= ERROR SUMMARY: 3 errors\n", 4),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        ("========= Error: No attachable process found\n", None),
    ],
)
def test_sanitizers(tmp_path, text, errors):
    (tmp_path / "log").write_text(text)
    assert readers.sanitizer_errors(tmp_path / "log") == errors


def test_medians_of_a_benchmark():
    timing = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    candidates = {"afd": {"seconds": timing, "figures": {}}, "untimed": {"seconds": None, "figures": {"bytes": 3}}}
    document = {"format": "afd-bench", "cases": {"PGD-10 Linf": {"settings": {}, "candidates": candidates}}}
    assert readers.medians(document) == {"PGD-10 Linf": {"afd": 2.0}}
    assert readers.medians({}) == {}


def test_epochs_of_a_run_that_was_cut_off(tmp_path):
    epoch = {"kind": "epoch", "natural": 0.5}
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "interval"}) + "\n" + json.dumps(epoch) + '\n{"kind": "ep')
    assert readers.epochs(tmp_path / "log.jsonl") == [epoch]
    assert readers.epochs(tmp_path / "absent") == []


def test_json_is_whole_or_empty(tmp_path):
    readers.write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert readers.read_json(tmp_path / "a" / "b.json") == {"x": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    (tmp_path / "half.json").write_text('{"x": ')
    assert readers.read_json(tmp_path / "half.json") == {} == readers.read_json(tmp_path / "absent.json")
