"""What a run will cost: arithmetic on measurements that are given here, and a trial of a real one on digits."""

import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from afd.cli import main
from afd.config import DataConfig, TrainConfig
from afd.errors import AfdError
from afd.experiments import plan, trial
from afd.experiments.trial import Found, at_largest, growth, loading_speed, tried
from afd.options import train_config
from afd.passes import by_operations

pytestmark = pytest.mark.filterwarnings("ignore:.*could not aim")  # at networks that have learnt nothing yet
TINY = ("--data", "digits", "--limit", "64", "--batch-size", "32", "--width", "2", "--epochs", "2", "--device", "cpu")
MIB, GIB = 2**20, 2**30


class Clock:
    """Seconds that go by only where somebody says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def config_of(*words):
    return train_config([*words, *TINY], "").settled()


def measured(**changes):
    """What a trial of 32 images a batch finds, made up."""
    return {
        "fits": True, "device": "a device", "available": 8 * GIB, "memory": 600 * MIB, "images": 32, "seconds": 0.01,
        "stepping": 0.008, "validation": 0.02, "test": 0.05, "checkpoint": 1000, "weights": 300,
        "sizes": {"epoch": 1000, "validation": 100, "test": 200},
        "passes": {"by": "convolutions", "image": {"forwards": 4.0, "input_backwards": 4.0, "weight_backwards": 1.0},
                   "cost": 9.0, "run": 18000.0, "timed": 9.0},
    } | changes  # fmt: skip


def found(config=None, half=400 * MIB, twice=1000 * MIB, **changes):
    """A plan from such trials."""
    trials = {
        "batch": measured(**changes),
        "half": {"fits": True, "memory": half},
        "twice": {"fits": twice is not None, "memory": twice},
    }
    return plan.planned(config_of("at") if config is None else config, trials)


# --- Measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("each", "images", "calls"), [(0.001, 128, 30), (0.02, 128, 4), (0.2, 16, 4), (5.0, 4, 2)])
def test_what_is_slow_is_tried_on_fewer_images(each, images, calls):
    clock, done = Clock(), []

    def work(count):
        done.append(count)
        clock.now += each * count

    result = tried(work, 128, 10.0, clock=clock)
    assert result.images == images
    assert result.seconds == pytest.approx(each)
    assert len(done) >= calls
    assert clock.now - 100.0 <= max(10.0, 6 * each)  # but for the first two numbers, whatever they take


def test_the_first_call_builds_what_stays_and_is_not_counted():
    clock, done = Clock(), []

    def work(count):
        clock.now += (1.0 if count not in done else 0.0) + 0.01 * count
        done.append(count)

    assert tried(work, 4, 10.0, clock=clock).seconds == pytest.approx(0.01)


def test_memory_of_more_images_lies_on_the_line_through_the_largest_that_were_tried():
    result = Found(16, 0.1, {4: 500, 16: 620})
    assert result.memory_at(16) == 620
    assert result.memory_at(128) == 620 + 112 * 10
    assert Found(4, 0.1, {4: 500}).memory_at(128) is None


def test_loading_is_measured_without_what_workers_have_ready():
    clock = Clock()

    def batches():
        for number in range(1000):
            clock.now += 0.0 if number < 4 else 0.5
            yield torch.zeros(10, 1), None

    assert loading_speed(batches(), 6.0, clock) == pytest.approx(20, rel=0.15)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("at", (11, 11, 1)), ("trades", (13, 12, 2)), ("afd", (12, 12, 2))],
)
def test_passes_are_those_of_the_method(method, expected):
    config = config_of(method, "--attack-steps", "10")
    result = trial.trial(config, 0.2, whole=True)
    kinds = result["passes"]["image"]
    assert tuple(kinds.values()) == expected
    assert result["passes"]["run"] == 2 * 64 * sum(expected)
    assert result["passes"]["timed"] == sum(expected)
    assert result["sizes"] == {"epoch": 64, "validation": 64, "test": 64}
    assert result["memory"] > 50 * MIB
    assert 0 < result["images"] <= 32
    assert result["checkpoint"] > result["weights"] > 1000


def test_what_has_no_second_convolution_is_counted_by_operations():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x = torch.rand(4, 1, 8, 8)
    once = by_operations(lambda: model(x), model, x)
    assert (once.forwards, once.cost) == (1.0, 1.0)
    whole = by_operations(lambda: model(x.requires_grad_()).sum().backward(), model, x)
    assert whole.cost == pytest.approx(3.0)


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def test_time_is_that_of_all_images_of_all_epochs_and_of_the_test():
    times = found()["time"]
    assert times["training"] == pytest.approx(1000 * 0.01)
    assert times["validation"] == pytest.approx(100 * 0.02)
    assert times["epoch"] == pytest.approx(12)
    assert times["test"] == pytest.approx(2 * 200 * 0.05)
    assert times["run"] == pytest.approx(2 * 12 + 20)


def test_an_average_is_tested_too_and_each_seed_is_a_run():
    times = found(config_of("at", "--ema", "0.9", "--seeds", "0,1,2"))["time"]
    assert times["test"] == pytest.approx(3 * 200 * 0.05)
    assert times["run"] == pytest.approx(3 * (2 * 12 + 30))


def test_a_run_whose_steps_grow_takes_less_than_the_last_of_them():
    passes = measured()["passes"] | {"cost": 4.5}
    assert found(passes=passes)["time"]["training"] == pytest.approx(5)
    assert found(passes=None)["time"]["training"] == pytest.approx(10)  # nobody knows


def test_ramps_and_repeats_are_in_the_passes():
    counts = trial.trial(config_of("at", "--attack-steps", "4", "--ramps", "attack.steps=2:2"), 0.2, whole=True)
    assert counts["passes"]["timed"] == 4 * 2 + 3
    assert 2 * 2 + 3 < counts["passes"]["cost"] < 4 * 2 + 3
    free = trial.trial(config_of("free", "--replays", "3"), 0.2, whole=True)["passes"]
    assert free["cost"] == free["timed"] == 9


def test_disk_is_that_of_the_checkpoints_a_run_keeps():
    disk = found()["disk"]
    assert (disk["checkpoint"], disk["epoch"], disk["run"]) == (1000, 2000, 3300)
    assert disk["free"] > 2**20  # where the numbered folders are
    assert found(config_of("at", "--on-alarm", "rollback"))["disk"]["run"] == 4300


# --- What to change ---------------------------------------------------------------------------------------------------


def test_nothing_is_to_be_changed_where_all_fits():
    assert found()["advice"] == []


def test_a_batch_beyond_the_memory_is_told_with_what_would_help():
    config = config_of("at")
    (line,) = found(config, available=650 * MIB, twice=None)["advice"]
    assert line.startswith("memory: a batch of 32 takes 600 MiB of 650 MiB; ")
    for option in ("--micro-batches 2", "--checkpoint-activations", "--precision auto", "--batch-size 16", "--width 1"):
        assert option in line
    assert "--image-size" not in line
    half = dataclasses.replace(config, precision="bf16", checkpoint_activations=True)
    (line,) = found(half, available=650 * MIB, twice=None)["advice"]
    assert "--checkpoint-activations" not in line
    assert "--precision" not in line


def test_a_method_that_couples_rows_is_not_told_to_pass_them_in_parts():
    (line,) = found(config_of("nuat"), available=650 * MIB, twice=None)["advice"]
    assert "--micro-batches" not in line


def test_twice_the_batch_that_would_not_fit_is_told_so():
    assert found(available=700 * MIB)["advice"] == ["memory: a batch of 64 would not fit"]


def test_a_batch_that_does_not_fit_has_no_figures_and_no_traceback():
    trials = {"batch": {"fits": False, "told": "CUDA out of memory"}, "half": {"fits": True, "memory": 400 * MIB}}
    plain = plan.planned(config_of("at"), {**trials, "twice": {"fits": False, "memory": None}})
    (line,) = plain["advice"]
    assert line.startswith("memory: a batch of 32 takes more memory than there is; ")
    assert "--batch-size 16" in line
    assert (plain["speed"], plain["passes"], plain["time"]) == (None, None, {"epoch": None})
    said = shown(plain)
    assert "does not fit" in said
    assert "400 MiB" in said


@pytest.mark.parametrize(
    ("loading", "limit", "workers", "told"),
    [
        (500.0, "training", 1, None),
        (50.0, "loading", 5, "--workers 5 would do"),
        (10.0, "loading", 25, "--workers 8 is what the cores allow, of 25 that would do"),
    ],
)
def test_loading_is_compared_with_training(loading, limit, workers, told, monkeypatch):
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 8)
    config = config_of("at")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
    plain = found(config, loading=loading)
    assert plain["speed"]["steps"] == pytest.approx(125)
    assert plain["speed"]["images_per_second"] == pytest.approx(min(100, loading))
    assert plain["speed"]["workers_that_do"] == workers
    assert f"the limit is {limit}" in shown(plain)
    assert len(plain["advice"]) == (told is not None)
    assert told is None or told in plain["advice"][0]


def test_checkpoints_that_no_disk_holds_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
    config = dataclasses.replace(config_of("at"), out=tmp_path / "not" / "there")
    (line,) = found(config)["advice"]
    assert line == "disk: checkpoints take 3.2 KiB of 3.9 KiB that are free; name another --out"


def shown(plain):
    """The table, without its lines."""
    console = Console(width=200)
    with console.capture() as said:
        console.print(plan.table(plain))
    return " ".join(said.get().split())


def test_a_table_says_all_of_it():
    said = shown(found())
    for words in (
        "digits at: 2 epochs on a device", "4 forward, 4 to the input, 1 to the weights", "18,000", "100",
        "12 s", "10 s training, 2 s validation", "44 s", "of it 20 s test", "memory, batches of 16", "600 MiB",
        "memory, batches of 64", "of 8.0 GiB available", "checkpoints of 1,000 B",
    ):  # fmt: skip
        assert words in said, words
    by_hand = measured()["passes"] | {"by": "operations", "image": None}
    assert "by operations" in shown(found(passes=by_hand))
    assert "not counted" in shown(found(passes=None))
    assert "tried on 8 images at once" in shown(found(images=8))


# --- The trials -------------------------------------------------------------------------------------------------------


def test_half_and_twice_the_batch_are_tried_and_what_surely_has_no_room_is_not():
    asked = []

    def given(config, batch, seconds, whole):
        asked.append((batch, whole))
        return {"fits": True, "memory": {32: 600, 16: 400, 64: 1000}[batch], "available": available}

    available = 5000
    found = plan.trials(config_of("at"), 60, given)
    assert asked == [(32, True), (16, False), (64, False)]
    assert [found[name]["memory"] for name in ("half", "batch", "twice")] == [400, 600, 1000]
    asked.clear()
    available = 900
    assert plan.trials(config_of("at"), 60, given)["twice"] == {"fits": False, "memory": 1000}
    assert asked == [(32, True), (16, False)]


def answered(monkeypatch, status=0, out="", err=""):
    done = SimpleNamespace(returncode=status, stdout=out, stderr=err)
    monkeypatch.setattr(plan.subprocess, "run", lambda *_, **__: done)


def test_a_process_that_the_system_has_ended_had_no_memory(monkeypatch):
    answered(monkeypatch, status=-9)
    assert plan.in_process(config_of("at"), 32, 1.0, True)["fits"] is False


def test_what_a_trial_says_of_the_run_is_said_of_it(monkeypatch):
    answered(monkeypatch, out=json.dumps({"error": "labels are soft"}))
    with pytest.raises(AfdError, match="labels are soft"):
        plan.in_process(config_of("at"), 32, 1.0, True)
    answered(monkeypatch, status=1, err="Traceback\nKeyError: 'x'\n")
    with pytest.raises(plan.TrialError, match="ended with status 1: KeyError: 'x'"):
        plan.in_process(config_of("at"), 32, 1.0, True)

    def late(*_, timeout, **__):
        raise subprocess.TimeoutExpired("trial", timeout)

    monkeypatch.setattr(plan.subprocess, "run", late)
    with pytest.raises(plan.TrialError, match="not ended within 63 s"):
        plan.in_process(config_of("at"), 32, 1.0, True)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def untried(monkeypatch):
    """The command, whose trials find at once what is made up here."""
    found = {True: measured(), False: {"fits": True, "memory": 500 * MIB}}
    monkeypatch.setattr(plan.trials, "__defaults__", (lambda _c, _b, _s, whole: found[whole],))


@pytest.mark.usefixtures("untried")
def test_nothing_is_left_behind_but_a_plan_in_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "0001").mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("0001")
    before = sorted(map(str, tmp_path.rglob("*")))
    assert main(["plan", "at", *TINY]) == 0
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    assert "passes, the run" in capsys.readouterr().out
    assert main(["plan", "at", *TINY, "--out", "new/run"]) == 0
    assert sorted(map(str, tmp_path.rglob("*"))) == sorted(
        [*before, *(str(tmp_path / one) for one in ("new", "new/run", "new/run/plan.json"))]
    )
    assert Path("runs/latest").readlink() == Path("0001")
    assert main(["train", "at", *TINY, "--attack-steps", "1", "--out", "new/run"]) == 0  # no run lies there


@pytest.mark.usefixtures("untried")
def test_words_are_those_of_train_and_a_trial_may_stand_anywhere(capsys):
    for words in (["--trial", "5", "trades", *TINY, "--beta", "3"], ["trades", *TINY, "--trial=5/2", "--beta", "3"]):
        assert main(["plan", *words]) == 0
        assert "digits trades: 2 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--trial", "soon"], "trial is 'soon'; it must be a number of seconds"),
        (["--trial"], "trial is ''; it must be a number of seconds"),
        (["--trial", "0"], "trial is 0; it must be a number of seconds above 0"),
        (["--beta", "3"], "see afd plan --help"),
        (["--weights", "no.pt"], "there is no checkpoint no.pt"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, told, capsys):
    assert main(["plan", "at", *TINY, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("afd: error: ")
    assert told in said[-1]


def test_a_real_trial_in_processes_of_their_own(tmp_path, capsys):
    """The planned epoch is within a factor of 20 of the real one: machines are shared, and no test waits for them."""
    words = ["at", *TINY, "--attack-steps", "2", "--out", str(tmp_path / "run")]
    assert main(["plan", *words, "--trial", "2"]) == 0
    plain = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plain["memory"]["fits"] == {"batch": True, "half": True, "twice": True}
    assert all(50 * MIB < plain["memory"][name] < 8 * GIB for name in ("half", "batch", "twice"))
    assert plain["passes"]["cost"] == 2 * 2 + 3
    assert TrainConfig.from_json(plain["run"]).method == config_of("at", "--attack-steps", "2").method
    capsys.readouterr()
    assert main(["train", *words]) == 0
    cost = json.loads((tmp_path / "run" / "result.json").read_text())["cost"]
    epoch = cost["plan"]["seconds_per_epoch"]
    assert epoch["planned"] == plain["time"]["epoch"]
    assert 1 / 20 < epoch["found"] / epoch["planned"] < 20
    assert cost["plan"]["peak_memory"]["planned"] == plain["memory"]["batch"]
    assert "plan: an epoch, " in capsys.readouterr().out


def test_growing_images_are_planned_at_their_largest_and_for_the_mean_of_their_areas():
    data = DataConfig("folder:none", image_size=64, resolutions=("16:1", "64:2", "32:4"))
    config = TrainConfig(data=data, epochs=4)
    assert at_largest(config).data.resolutions == ("64:1",)
    assert growth(config) == pytest.approx((16**2 + 64**2 + 64**2 + 32**2) / 4 / 64**2)
    assert growth(dataclasses.replace(config, data=DataConfig("folder:none", image_size=64))) == 1
