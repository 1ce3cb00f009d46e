"""Processes under torchrun end together and say why; one that has trained well ends well."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from afd.runtime import Agreement, Group
from afd.training import load_checkpoint, signals

SCRIPT = Path(__file__).with_name("uneven.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ABORTED = ("SIGABRT", "terminate called", "exitcode  : -6", "outlive the group")
SECONDS = 120  # that a run may take before it counts as one that hangs


def torchrun(*arguments):
    command = [*TORCHRUN, str(SCRIPT), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert not [word for word in ABORTED if word in ran.stderr], ran.stderr
    return ran


@pytest.mark.parametrize("how", ["as README says", "joined by itself"])
def test_processes_end_well_after_training(how):
    """Where a thread of torch's has to wait for the interpreter until that ends; see `afd.processes`."""
    ran = torchrun("well", how)
    assert ran.returncode == 0, ran.stderr
    assert "did not find any unused parameters" not in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["leave()", "several trainers", "lasting workers", "a model in DistributedDataParallel"]
)
def test_processes_end_well_however_they_have_trained(how):
    assert torchrun("well", how).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("how", "shown"), [("an error", "the script's own"), ("its own status", ": 3")])
def test_processes_end_as_their_script_says(how, shown):
    ran = torchrun("well", how)
    assert ran.returncode == 1
    assert shown in ran.stderr


WRONG = {
    "fewer to train": "processes have different numbers of batches: train and validation have [5, 6] in process 1",
    "fewer to validate": "processes have different numbers of batches: train and validation have [6, 5] in process 1",
    "none to train": "train holds no images",
    "none to validate": "validation holds no images",
    "raises at once": "the disk is gone",
    "fewer than it says": "train has a length of 6 batches, but had no more than 4 in epoch 1",
    "raises in mid-epoch": "the disk is gone",
    "raises in validation": "the disk is gone",
    "not a number": "became nan",
}
PLAIN = ("fewer to train", "raises in mid-epoch")


@pytest.mark.parametrize("what", [pytest.param(one, marks=() if one in PLAIN else pytest.mark.slow) for one in WRONG])
def test_what_goes_wrong_in_one_process_is_shown_once_and_ends_all(what):
    ran = torchrun("wrong", what)
    assert ran.returncode == 1
    assert ran.stderr.count("\n    trainer(method, epochs=2, log_every=2)") == 1, ran.stderr  # tracebacks of the script
    assert WRONG[what] in ran.stderr


@pytest.mark.slow
def test_a_killed_process_ends_the_others_in_one_line():
    ran = torchrun("wrong", "killed")
    assert ran.returncode == 1
    assert "another process of this run was killed or has ended; this process cannot go on alone" in ran.stderr
    assert "in goes_wrong" not in ran.stderr  # no traceback


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "all"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_a_checkpoint(to, number, tmp_path):
    run = subprocess.Popen(
        [*TORCHRUN, str(SCRIPT), "signalled", str(tmp_path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "begun").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if to == "all":  # as Ctrl-C in a terminal does; torchrun then passes it on
        os.killpg(run.pid, number)
    else:
        run.send_signal(number)
    _, error = run.communicate(timeout=SECONDS)
    assert run.returncode != 0
    assert not [word for word in ABORTED if word in error]
    assert f"{number.name}: stopped in epoch" in error
    assert "nothing saved" not in error
    assert load_checkpoint(tmp_path / "last.pt")[1]["position"]["global_step"] >= 3


@pytest.mark.slow
def test_two_processes_go_on_exactly_over_loaders_that_draw(tmp_path):
    runs = {"whole": (0,), "mid-epoch": (8, 0), "at its end": (12, 0)}
    for name, stops in runs.items():
        for stop_after in stops:
            assert torchrun("on", tmp_path / name, stop_after).returncode == 0
    ends = [load_checkpoint(tmp_path / name / "last.pt")[0]["model"] for name in runs]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=0)


def test_torchruns_second_signal_is_the_first_one_passed_on(monkeypatch):
    monkeypatch.setattr(signals, "launched", lambda: True)
    told = []
    with signals.on_signals(told.append):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert told == [signal.SIGINT]
        now = time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 10)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_alone_a_process_agrees_with_itself_at_once():
    agreement = Agreement(Group())
    assert [agreement.on(number) for number in (0, 15, 0)] == [0, 15, 0]
