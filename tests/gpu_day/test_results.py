"""OUT's rules, and what other programs' files say, whole or cut off."""

import json

import pytest
from gpu_day import DayError, results

LOG = """\
[gw0] [ 33%] PASSED tests/test_x.py::test_a[cpu-Linf 3]
[gw1] [ 66%] FAILED tests/test_x.py::test_b
[gw0] [100%] SKIPPED tests/test_x.py::test_c
"""
FAILED = "FAILED tests/test_x.py::test_b - assert 1 == 2\nERROR tests/test_y.py - ImportError: no\n"
CLEAN, ERRORS = "========= ERROR SUMMARY: 0 errors", "========= ERROR SUMMARY: 2 errors"
HAZARDS = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
UNSEEN = ["the planted error was not seen, so that silence means nothing"]
EPOCH = {"kind": "epoch", "epoch": 1, "global_step": 9, "images_per_second": 3.5, "natural": 0.5, "robust": 0.1}


def test_a_folder_where_nothing_was_finished_is_taken_and_no_other(tmp_path):
    content = results.opened(tmp_path / "out", "abc")
    (tmp_path / "out" / ".results.json.half").write_text("{")
    assert results.opened(tmp_path / "out", "abc") == content
    results.write(tmp_path / "out" / "results.json", content)
    with pytest.raises(DayError, match=r"^OUT is .*, which is not empty; name another folder"):
        results.opened(tmp_path / "out", "abc")


def test_pytest_whole_and_cut_off(tmp_path):
    figures, cases, wrong, *_ = results.tests(tmp_path, LOG + FAILED)
    assert (figures, len(cases)) == ({"passed": 1, "failed": 1, "skipped": 1}, 3)
    assert cases["tests/test_x.py::test_a[cpu-Linf 3]"] == "passed"
    assert wrong == ["tests/test_x.py::test_b - assert 1 == 2", "tests/test_y.py - ImportError: no"]
    assert results.tests(tmp_path, LOG + "ERROR    afd.train:train.py:12 told\n").wrong == ["tests/test_x.py::test_b"]
    assert results.tests(tmp_path, "").lacking == "not one test passed"


def test_silence_of_a_sanitizer_counts_where_it_saw_the_planted_error(tmp_path):
    for runs, wrong, lacking in (
        *(([seen, CLEAN], [], "") for seen in (ERRORS, HAZARDS)),
        *(([unseen, CLEAN], UNSEEN, "") for unseen in (CLEAN, "nothing")),
        *(([ERRORS, found], ["2 errors"], "") for found in (ERRORS, HAZARDS)),
        *((cut, [], "no verdict") for cut in ([ERRORS, "Segmentation fault"], [ERRORS], [])),
    ):
        log = "".join(["$ nvcc planted.cu\n", *(f"$ compute-sanitizer --tool memcheck\n{run}\n" for run in runs)])
        assert results.sanitizer(tmp_path, log)[2:] == (wrong, lacking, "")
        absent = results.sanitizer(tmp_path, f"{log}========= Error: Device not supported").unsupported
        assert absent == "compute-sanitizer does not support this machine"


def test_documents_case_by_case(tmp_path):
    timed = {"floor": {"seconds": {"p50": 2e-6}}, "afd": {"seconds": {"p50": 3e-6}}, "memory": {"seconds": None}}
    for cases, figures, wrong in (
        ({"pgd_step": {"candidates": timed}}, {"cases": 1, "pgd_step": "floor 2 us, afd 3 us"}, []),
        ({"a": {"ok": True}, "b": {"ok": False, "words": "off by 2"}}, {"cases": 2}, ["b: off by 2"]),
    ):
        for finished, lacking in ((True, ""), (False, "its file is not whole")):
            results.write(tmp_path / "it.json", {"cases": cases, "finished": finished})
            assert results.documents(tmp_path, "") == (figures, cases, wrong, lacking, "")
    (tmp_path / "it.json").write_text('{"cases": {')
    assert results.documents(tmp_path, "") == ({}, {}, [], "its file is not whole", "")


def test_epochs_of_a_run_that_was_cut_off(tmp_path):
    (tmp_path / "log.jsonl").write_text(f'{{"kind": "interval"}}\n{json.dumps(EPOCH)}\n{{"kind": {{}}')
    figures = {name: EPOCH[name] for name in EPOCH if name != "kind"}
    assert results.training(tmp_path, "") == (figures, {"epoch 1": EPOCH}, [], "", "")
    assert results.training(tmp_path / "absent", "").lacking == "no epoch was finished"
