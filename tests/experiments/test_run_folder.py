"""The folder of `afd train`: numbered, locked, never overwritten without a word, gone on with by --resume auto."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from afd.cli import main
from afd.training import load_checkpoint

QUICK = ["natural", "--epochs", "2", "--width", "2", "--batch-size", "512"]


def train(*arguments):
    return main(["train", *QUICK, *arguments])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("afd.experiments.train.TEST_STEPS", 1)
    return tmp_path


def test_runs_are_numbered_and_the_link_leads_to_the_newest(here, capsys):
    for number in ("0001", "0002"):
        assert train("--seed", number) == 0
        assert (here / "runs" / "latest").readlink().name == number
        assert f"runs/{number}/best.pt" in capsys.readouterr().out
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["0001", "0002", "latest"]
    seeds = [load_checkpoint(here / "runs" / number / "last.pt")[1]["config"]["seed"] for number in ("0001", "0002")]
    assert seeds == [1, 2]


def test_resume_auto_goes_on_in_the_newest_with_more_epochs_too(here, capsys):
    assert train("--resume", "auto") == 0  # there is none yet
    assert train("--resume", "auto", "--epochs", "3") == 0
    assert "is of a run of 2 epochs" in capsys.readouterr().err
    assert [path.name for path in (here / "runs").iterdir() if not path.is_symlink()] == ["0001"]
    assert len(load_checkpoint(here / "runs" / "latest" / "last.pt")[1]["history"]) == 3
    assert train("--resume", "auto", "--epochs", "2") == 2
    assert "epochs is 3 there and 2 here" in capsys.readouterr().err


def test_another_run_is_not_overwritten_without_a_word(here, capsys):
    assert train("--out", "one") == 0
    before = (here / "one" / "best.pt").read_bytes()
    assert train("--out", "one", "--seed", "5") == 2
    assert capsys.readouterr().err == (
        "afd: error: out is one, which holds a run (last.pt); go on with it by --resume auto, name another folder, or "
        "discard it by --overwrite\n"
    )
    assert (here / "one" / "best.pt").read_bytes() == before
    assert train("--out", "one", "--overwrite", "--resume", "auto") == 2
    assert train("--out", "one", "--seed", "5", "--epochs", "1", "--overwrite") == 0
    assert (here / "one" / "best.pt").read_bytes() != before
    names = [path.name for path in (here / "one").iterdir() if "tfevents" not in path.name]
    assert sorted(names) == ["best.pt", "curves.png", "last.pt", "log.jsonl", "model.pt", "result.json", "run.toml"]
    assert sum("tfevents" in path.name for path in (here / "one").iterdir()) == 1


def test_a_log_without_checkpoints_is_a_run_too(here, capsys):
    (here / "one").mkdir()
    (here / "one" / "log.jsonl").write_text("{}\n")
    assert train("--out", "one") == 2
    assert "out is one, which holds a run (log.jsonl)" in capsys.readouterr().err


def test_a_folder_with_other_things_is_used_and_they_stay(here):
    (here / "one").mkdir()
    (here / "one" / "notes.txt").write_text("mine")
    assert train("--out", "one") == 0
    assert (here / "one" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("out", [[], ["--out", "new/folder"]])
def test_a_mistake_leaves_no_folder_behind(out, here, capsys):
    assert train("--seed", "1") == 0
    assert train("--lr", "0", *out) == 2
    assert "lr is 0" in capsys.readouterr().err
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["0001", "latest"]
    assert (here / "runs" / "latest").readlink().name == "0001"
    assert not (here / "new" / "folder").exists()


@pytest.mark.parametrize("out", [[], ["--out", "new/folder"]])
def test_the_first_mistake_leaves_nothing_at_all(out, here):
    assert train("--data", "mnist", "--data-root", str(here / "runs.txt" / "x"), *out) == 2
    assert train("--weights", "nowhere.pt", *out) == 2
    assert list(here.iterdir()) == []


def test_overwrite_needs_a_folder_and_discards_late(here, capsys):
    assert train("--overwrite") == 2
    assert "overwrite is set, but out is not" in capsys.readouterr().err
    assert train("--out", "one") == 0
    before = sorted(path.name for path in (here / "one").iterdir())
    for word, file in (("--weights", "model.pt"), ("--weights", "best.pt"), ("--resume", "last.pt")):
        assert train("--out", "one", "--overwrite", word, f"one/{file}") == 2
        assert f"{word[2:]} is one/{file}, which overwrite would discard; name another" in capsys.readouterr().err
    torch.save({"a": torch.zeros(1)}, "other.pt")
    assert train("--out", "one", "--overwrite", "--weights", "other.pt") == 2
    assert train("--out", "one", "--overwrite", "--resume", "other.pt") == 2
    assert sorted(path.name for path in (here / "one").iterdir()) == before


def test_two_live_runs_do_not_share_a_folder(here):
    def start(seed):
        words = [sys.executable, "-m", "afd", "train", *QUICK, "--epochs", "500", "--out", "two", "--seed", str(seed)]
        return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    first = start(1)
    try:
        deadline = time.monotonic() + 120
        while not (here / "two" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = start(2)
        _, said = second.communicate(timeout=120)
        assert second.returncode == 2
        assert said.startswith(f"afd: error: two is in use by another process (process {first.pid} on ")
    finally:
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM
    assert said.endswith("saved two/last.pt; go on with the same command and --resume auto --out two\n")


def test_what_a_killed_process_left_is_removed(here):
    (here / "one").mkdir()
    left = here / "one" / f".last.pt.{2**22 + 99}.part"
    left.write_bytes(b"half")
    living = here / "one" / f".last.pt.{os.getppid()}.part"
    living.write_bytes(b"half")
    assert train("--out", "one") == 0
    assert (left.exists(), living.exists()) == (False, True)


@pytest.mark.parametrize("file", ["best.pt", "model.pt"])
def test_a_run_may_begin_with_the_weights_of_another(file, here, capsys):
    assert train("--out", "one") == 0
    assert train("--out", "two", "--weights", f"one/{file}", "--epochs", "1", "--lr", "1e-12") == 0
    found, expected = (load_checkpoint(path)[0]["model"] for path in ("two/last.pt", "one/best.pt"))
    assert torch.allclose(found["classifier.weight"], expected["classifier.weight"], atol=1e-7)
    assert train("--out", "three", "--weights", f"one/{file}", "--width", "3") == 2
    assert "one/" in capsys.readouterr().err
    assert train("--out", "three", "--weights", "nowhere.pt") == 2
    assert "there is no checkpoint nowhere.pt" in capsys.readouterr().err


def test_an_older_checkpoint_goes_on_in_a_folder_of_its_own(here, capsys):
    assert train() == 0
    assert train("--resume", "runs/0001/previous.pt") == 0
    assert (here / "runs" / "latest").readlink().name == "0002"
    last, other = (load_checkpoint(here / "runs" / number / "last.pt") for number in ("0001", "0002"))
    assert torch.equal(last[0]["model"]["classifier.weight"], other[0]["model"]["classifier.weight"])
    assert train("--resume", "runs/0001/previous.pt", "--out", "runs/0001") == 2
    assert "which holds a run (last.pt)" in capsys.readouterr().err
