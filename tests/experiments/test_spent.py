"""What a run's report says of its cost, and of its plan."""

import dataclasses
import json

import pytest
import torch

from afd.cli import main
from afd.config import TrainConfig
from afd.experiments import spent
from afd.experiments.spent import cost_as_json, cost_lines, described, duration, size
from afd.training.position import Spent

TINY = ["at", "--limit", "60", "--batch-size", "30", "--width", "2", "--attack-steps", "1", "--device", "cpu"]
CPU = torch.device("cpu")


def cost(folder):
    return json.loads((folder / "result.json").read_text())["cost"]


def test_a_run_that_goes_on_counts_all_of_its_hours_and_images(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert main(["train", *TINY, *out, "--epochs", "1"]) == 0
    first = cost(tmp_path)
    assert first["images_seen"] == 60
    assert first["hours"] > 0
    assert first["seconds_per_epoch"] == pytest.approx(3600 * first["hours"])
    assert first["device"].endswith(("thread", "threads"))
    assert first["peak_memory"] > 50 * 2**20
    assert "plan" not in first
    capsys.readouterr()
    assert main(["train", *TINY, *out, "--epochs", "3", "--resume", "auto"]) == 0
    whole = cost(tmp_path)
    assert whole["images_seen"] == 3 * 60
    assert whole["hours"] > first["hours"]
    assert whole["seconds_per_epoch"] == pytest.approx(3600 * whole["hours"] / 3)
    assert "180 images seen, at most " in capsys.readouterr().out


def planned(folder, config, epoch=10.0, memory=2**30):
    plan = {"run": described(config), "time": {"epoch": epoch}, "memory": {"batch": memory}}
    (folder / "plan.json").write_text(json.dumps(plan))


def settled(folder):
    return dataclasses.replace(TrainConfig(epochs=4).settled(), out=folder)


def test_a_plan_is_held_against_what_was_found(tmp_path):
    config = settled(tmp_path)
    planned(tmp_path, dataclasses.replace(config, epochs=2, seed=3, out=None))  # which cost an epoch no more
    found = cost_as_json(Spent(seconds=60.0, images=400, memory=2**50, epochs=4), CPU, config)
    assert found["hours"] == pytest.approx(1 / 60)
    assert found["seconds_per_epoch"] == 15
    assert found["plan"]["seconds_per_epoch"] == {"planned": 10.0, "found": 15.0, "percent": 50}
    assert found["plan"]["peak_memory"]["percent"] == pytest.approx(100 * (2**20 - 1))
    assert cost_lines(found)[0].startswith("cost: 60 s in training, 400 images seen, at most 1,048,576 GiB of memory")
    assert cost_lines(found)[1] == "plan: an epoch, 15 s, is 50% above the 10 s planned"


def test_a_plan_of_another_run_says_nothing_of_this_one(tmp_path):
    config = settled(tmp_path)
    planned(tmp_path, dataclasses.replace(config, precision="bf16"))
    assert "plan" not in cost_as_json(Spent(1.0, 1, 1, 1), CPU, config)


def test_a_plan_that_knows_no_figure_is_not_off(tmp_path):
    config = settled(tmp_path)
    planned(tmp_path, config, epoch=None)
    found = cost_as_json(Spent(seconds=60.0, images=400, memory=1, epochs=0), CPU, config)
    assert found["plan"]["seconds_per_epoch"] == {"planned": None, "found": None, "percent": None}
    assert len(cost_lines(found)) == 2


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"run": {}}'])
def test_a_file_that_is_no_plan_is_refused_before_anything_is_trained(text, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(text)
    assert main(["train", *TINY, "--epochs", "1", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / spent.PLAN} is no plan of afd plan: " in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.25 s"), (9.96, "10 s"), (61, "61 s"), (600, "10 min"), (7200, "2.0 h"), (3.6e6, "1,000 h")],
)
def test_seconds_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (900, "900 B"), (2048, "2.0 KiB"), (50 * 2**20, "50 MiB"), (2**45, "32,768 GiB")]
)
def test_bytes_in_words(count, words):
    assert size(count) == words
