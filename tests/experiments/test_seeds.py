"""Several seeds of one run: each in a folder of its own, gone on with, and one table of all."""

import json
import signal
import statistics

import pytest
import torch

from afd.cli import main
from afd.experiments import seeds, train
from afd.options import train_config
from afd.training import load_checkpoint

QUICK = ["train", "natural", "--epochs", "2", "--width", "2", "--batch-size", "30", "--limit", "60"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(train, "TEST_STEPS", 1)


def test_each_seed_is_the_run_that_it_is_alone_and_all_stand_in_one_table(tmp_path, capsys, monkeypatch):
    out = tmp_path / "all"
    words = [*QUICK, "--ema", "0.5", "--out", str(out), "--seeds", "3,1,4"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["seed-1", "seed-3", "seed-4"]
    assert main([*QUICK, "--ema", "0.5", "--out", str(tmp_path / "one"), "--seed", "1"]) == 0
    alone, among = (torch.load(path / "model.pt") for path in (tmp_path / "one", out / "seed-1"))
    assert all(torch.equal(alone[name], among[name]) for name in alone)
    assert load_checkpoint(out / "seed-4" / "last.pt")[1]["config"]["seed"] == 4
    found = json.loads((out / "seeds.json").read_text())
    assert list(found["seeds"]) == ["3", "1", "4"]
    results = [json.loads((out / f"seed-{seed}" / "result.json").read_text())["measured"] for seed in (3, 1, 4)]
    assert list(found["seeds"].values()) == results
    for name in ("best", "last", "EMA"):
        for figure in ("natural", "robust"):
            values = [one[name][figure] for one in results]
            assert found["spread"][name][figure] == pytest.approx(
                {"mean": sum(values) / 3, "std": statistics.stdev(values), "min": min(values), "max": max(values)}
            )
    assert f"± {found['spread']['last']['natural']['std']:.2%}" in told
    assert f"{found['seeds']['4']['best']['natural']:.2%}" in told

    trained = []
    monkeypatch.setattr(train.Trainer, "_train_step", lambda *_: trained.append(1))
    before = (out / "seeds.json").read_text()
    assert main([*words, "--resume", "auto"]) == 0
    assert not trained
    assert (out / "seeds.json").read_text() == before


def test_a_seed_that_ends_early_is_named_and_gone_on_with(tmp_path, capsys, monkeypatch):
    out = tmp_path / "all"
    words = [*QUICK, "--out", str(out), "--seeds", "0", "1"]
    real = train.Trainer._close_epoch

    def stopping(self, validation):
        closed = real(self, validation)
        if self.seed == 1:
            self.stop(signal.SIGTERM)
        return closed

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_close_epoch", stopping)
        assert main(words) == 128 + signal.SIGTERM
    told = capsys.readouterr().err
    assert "seed 1: SIGTERM: stopped in epoch 2" in told
    assert f"go on with the same command and --resume auto --out {out}\n" in told
    assert not (out / "seeds.json").exists()
    assert main([*words, "--resume", "auto"]) == 0
    assert main([*QUICK, "--out", str(tmp_path / "one"), "--seed", "1"]) == 0
    alone, among = (torch.load(path / "model.pt") for path in (tmp_path / "one", out / "seed-1"))
    assert all(torch.equal(alone[name], among[name]) for name in alone)
    assert main(words) == 2
    assert "which holds a run (seeds.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [("--seeds 0,1,2", (0, 1, 2)), ("--seeds=5,7 natural", (5, 7)), ("--seeds 0 1 natural", (0, 1)), ("natural", ())],
)
def test_seeds_are_a_list(words, expected):
    assert train_config(words.split(), None).seeds == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seed 0 --seeds 0,1", "seed and seeds are both given; name one of the two"),
        ("--seeds 1,1", "seeds are 1, 1, of which two are the same"),
        ("--seeds=-1,1", "one of the seeds is -1; it must be in"),
        ("--seeds 1,x", "'x' is no whole number"),
        ("--seeds", "'' is no whole number"),
        ("--seeds 1,2 --resume a.pt", "resume is a.pt, of one run; several seeds go on with auto"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    assert main([*QUICK, "--out", str(tmp_path / "out"), *words.split()]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_other_seeds_do_not_take_the_place_of_a_study(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "seeds.json").write_text("{}")
    assert main([*QUICK, "--out", str(out), "--seeds", "2"]) == 2
    assert "which holds a run (seeds.json); go on with it by --resume auto" in capsys.readouterr().err
    assert (out / "seeds.json").read_text() == "{}"


def test_a_file_repeats_seeds_only_as_it_was_told(tmp_path):
    (tmp_path / "run.toml").write_text("seed = 4\n[method]\nname = 'natural'\n")
    assert train_config(["--config", str(tmp_path / "run.toml"), "--seeds", "1,2"], None).seed == 0
    (tmp_path / "run.toml").write_text("seeds = [1, 2]\n[method]\nname = 'natural'\n")
    assert train_config(["--config", str(tmp_path / "run.toml")], None).seeds == (1, 2)


def test_the_spread_of_one_value_has_no_deviation():
    assert seeds.spread([0.5]) == {"mean": 0.5, "min": 0.5, "max": 0.5}
