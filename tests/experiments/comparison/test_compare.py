"""Comparisons: one cost for all, whatever ends them they go on, and compare.json says what was measured."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from few_attacks import DATA, TINY, weaken

from afd.cli import main
from afd.data import load
from afd.entries import made
from afd.evaluation.outcome import read_results
from afd.experiments import comparison, costs
from afd.experiments.comparison import budget, runs
from afd.experiments.comparison.record import waiting
from afd.methods import Natural
from afd.metrics import unpacked
from afd.passes import counted
from afd.training import TrainingError
from afd.training.trainer import Trainer

WORDS = ["compare", *TINY, "--images", "12"]
FIGURES = ("clean", "pgd-40", "autoattack", "transfer", "worst")


@pytest.fixture(autouse=True)
def few_attacks(monkeypatch):
    weaken(monkeypatch)


def compared(out, *words):
    """Status of a comparison of natural and at for two epochs, and what its record says."""
    said = [*WORDS, *(words or ("--methods", "natural,at", "--epochs", "2"))]
    return main([*said, "--out", str(out)]), record(out)


def record(out):
    return json.loads((out / "compare.json").read_text())


def runs_of(content):
    return {(name, seed): run for name, entry in content["entries"].items() for seed, run in entry["runs"].items()}


def told(content):
    """What a record says, but for what a clock does, and which commit it is of."""
    plain = json.loads(json.dumps(content)) | {"commit": None}
    for run in runs_of(plain).values():
        run["seconds"] = None
        if run["made"] is not None:
            run["made"]["commit"] = None
        if run["evaluation"] is not None:
            run["evaluation"]["seconds"] = None
    return plain


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished comparison, for tests to copy."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        weaken(patch)
        assert compared(out)[0] == 0
    return out


# --- One cost ---------------------------------------------------------------------------------------------------------

METHODS = {
    "natural": "natural",
    "at": "at",
    "free": "free --replays 3",
    "trades+awp": "trades+awp",
    "late": "at+awp --start-epoch 3",
    "afd": "afd --discriminator-steps 3",
    "gat": "gat --growth-epoch 2",
    "jarn": "jarn --start-step 5 --update-interval 3 --discriminator-width 2",
    "growing": "at --ramps attack.steps=2:3 --attack-steps 4",
}


def test_planned_passes_are_those_that_runs_really_take(tmp_path, monkeypatch):
    """Every step of whole runs is counted as it is taken."""
    passes, spent = 60 * 9 * 4.6, {}
    real = Trainer._train_step

    def step(self, x, y, index):
        here = self.config["out"]
        took = counted(lambda: real(self, x, y, index), self.model, x)
        spent[here] = spent.get(here, 0.0) + took.cost * len(x)

    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr(runs.Runs, "evaluate", lambda *_: None)
    asked = made(METHODS, TINY, budget="1s", passes=passes, images=12)
    content = comparison.compare(asked, tmp_path / "out")
    assert content["budget"]["passes"] == passes
    for name, entry in content["entries"].items():
        found = spent[str(tmp_path / "out" / name / "seed-0")]
        assert entry["passes"] == pytest.approx(found), name
        assert entry["passes_per_image"] == pytest.approx(found / (entry["epochs"] * entry["epoch_images"])), name
        # to a batch: some steps cost more than others
        assert found == pytest.approx(passes, abs=30 * entry["passes_per_image"]), name


def test_a_budget_is_so_many_seconds_of_adversarial_training_here(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "images_per_second", lambda *_: 100.0)
    monkeypatch.setattr(runs.Runs, "run", lambda _: None)
    status, content = compared(tmp_path / "out", "--methods", "natural,trades", "--budget", "2.5s")
    assert status == 0
    assert content["budget"] == {"asked": "2.5s", "passes": 2.5 * 100 * 5, "at_images_per_second": 100.0}
    assert content["entries"]["natural"]["epochs"] * content["entries"]["natural"]["epoch_images"] == 7 * 60
    assert content["entries"]["trades"]["passes_per_image"] == 8 + 1
    assert "passes = 1250.0" in (tmp_path / "out" / "table.toml").read_text()
    monkeypatch.setattr(comparison, "images_per_second", lambda *_: 1.0)  # nobody asks again
    status, content = compared(tmp_path / "out", "--methods", "natural,trades,at", "--budget", "0m2.5s")
    assert status == 0
    assert content["budget"]["passes"] == 1250.0


@pytest.mark.parametrize(
    ("seconds", "asked", "steps"),
    [(0.5, 100.0, 10), (0.5, 900.0, 10), (0.1, 40.0, 20), (0.5, 40.0, 6), (20.0, 100.0, 6)],
)
def test_a_speed_is_measured_in_a_twentieth_of_the_budget_or_a_few_steps(seconds, asked, steps, monkeypatch):
    config = made({"at": "at"}, TINY, epochs=1).timed
    images = load("digits").limited(60).train
    clock, taken = Clock(monkeypatch), []
    build = Trainer._build_step

    def timed(self):
        build(self)
        self.step.update = lambda _: taken.append(clock.taking(seconds, lambda: None)())

    monkeypatch.setattr(Trainer, "_build_step", timed)
    assert costs.images_per_second(config, images, torch.device("cpu"), asked) == pytest.approx(30 / seconds)
    assert len(taken) == pytest.approx(steps, abs=1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("300s", 300), ("2h", 7200), ("1h30m", 5400), ("0.5m", 30), ("1h1m1s", 3661)]
)
def test_a_budget_is_a_time(text, seconds):
    assert budget.seconds_in(text) == seconds


def test_epochs_are_those_of_train_and_their_passes_are_stated(undisturbed):
    entries = record(undisturbed)["entries"]
    assert entries["natural"]["epochs"] == entries["at"]["epochs"] == 2
    assert entries["natural"]["passes"] == 2 * 60 * 3
    assert entries["at"]["passes"] == 2 * 60 * 5
    assert record(undisturbed)["budget"] == {"asked": "2 epochs", "passes": None, "at_images_per_second": None}


# --- What is measured -------------------------------------------------------------------------------------------------


def test_the_record_says_what_runs_and_evaluations_say(undisturbed):
    content = record(undisturbed)
    assert content["finished"]
    assert content["data"] == {"name": "digits", "images": 12, "classes": 10, "train": 60, "validation": 60}
    assert content["ball"] == {"norm": "Linf", "eps": 0.2, "text": "0.2"}
    assert content["reference"] == "at"
    for (name, seed), run in runs_of(content).items():
        folder = undisturbed / name / f"seed-{seed}"
        result, results = json.loads((folder / "result.json").read_text()), read_results(folder / "evaluation")
        assert result["images"] == results["data"]["count"] == 12
        assert run["measured"] == result["measured"]
        found = run["evaluation"]
        assert found["folder"] == f"{name}/seed-{seed}/evaluation"
        assert found["clean"] == results["clean"] == result["measured"]["best"]["natural"]
        assert found["worst"] == results["worst_case"]["Linf"]["0.2"]
        by_stage = {one["name"]: one["accuracies"][0]["accuracy"] for one in results["attacks"]}
        assert found["pgd-40"] == by_stage["pgd-40"]
        assert found["autoattack"] == by_stage["square"]
        assert found["transfer"] == by_stage.get("transfer")
        assert (found["transfer"] is None) == (name == "natural")
        assert (found["verdict"], found["checks"]) == (results["verdict"], results["checks"])


def test_the_bits_of_each_image_agree_with_the_shares(undisturbed):
    for run in runs_of(record(undisturbed)).values():
        found = run["evaluation"]
        bits = {name: unpacked(one, 12) for name, one in found["withstood"].items()}
        assert bits.keys() == {name for name in FIGURES if found[name] is not None}
        for name, one in bits.items():
            assert float(one.double().mean()) == pytest.approx(found[name]), name
            assert not (one & ~bits["clean"]).any()
        for name in set(bits) - {"clean"}:
            assert not (bits["worst"] & ~bits[name]).any()


class Clock:
    """A clock that goes on only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def taking(self, seconds, real):
        """What takes so many seconds, and nothing else does."""

        def timed(*arguments):
            self.now += seconds
            return real(*arguments)

        return timed


def test_seconds_are_those_of_the_training_steps(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Trainer, "_train_step", clock.taking(3.0, Trainer._train_step))
    monkeypatch.setattr(Trainer, "_validate", clock.taking(1000.0, Trainer._validate))
    out = tmp_path / "out"
    assert main(["compare", *DATA, "--images", "12", "--methods", "free", "--epochs", "2", "--out", str(out)]) == 0
    # two epochs of two batches, each of which is stepped on four times
    assert record(out)["entries"]["free"]["runs"]["0"]["seconds"] == pytest.approx(2 * 2 * 4 * 3.0)


def test_a_union_is_judged_in_all_its_balls(tmp_path):
    status, content = compared(tmp_path / "out", "--methods", "natural,at", "--epochs", "1", "--attack", "union")
    assert status == 0
    assert content["ball"] == {"union": {"Linf": "0.2", "L2": "0.75", "L1": "2"}}
    results = read_results(tmp_path / "out" / "at" / "seed-0" / "evaluation")
    found = content["entries"]["at"]["runs"]["0"]["evaluation"]
    assert found["worst"] == pytest.approx(results["union"]["accuracy"])
    assert {"pgd-40-linf", "pgd-40-l1", "transfer-l2"} <= {one["name"] for one in results["attacks"]}
    assert found["worst"] <= min(found["pgd-40"], found["autoattack"], found["transfer"])


# --- Going on ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but what a context manager does."""


def disturb(patch, name, number, *, before):
    """Has the n-th write of a file of that name be the last thing that is done."""
    real, left = Path.replace, iter(range(number, -1, -1))

    def replace(self, target):
        last = Path(target).name == name and next(left, -1) == 0
        if last and before:
            raise Killed
        real(self, target)
        if last:
            raise Killed

    patch.setattr(Path, "replace", replace)


@pytest.mark.parametrize(
    ("name", "number", "before"),
    [
        ("compare.json", 0, True), ("compare.json", 1, False), ("last.pt", 1, False), ("model.pt", 0, True),
        ("result.json", 1, False), ("apgd-ce.0.0.pt", 0, False), ("results.json", 0, False), ("table.md", 3, True),
        *(
            pytest.param(name, number, before, marks=pytest.mark.slow)
            for name in ("table.toml", "compare.json", "run.toml", "best.pt", "curves.png", "results.json")
            for number in (0, 1)
            for before in (True, False)
            if (name, number) != ("table.toml", 1)
        ),
    ],
)  # fmt: skip
def test_whatever_was_written_last_the_same_command_ends_the_same(name, number, before, undisturbed, tmp_path):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, name, number, before=before)
        with pytest.raises(Killed):
            compared(out)
    status, content = compared(out)
    assert status == 0
    assert told(content) == told(record(undisturbed))
    files = {path.relative_to(out) for path in out.rglob("*") if "tfevents" not in path.name}
    wanted = {path.relative_to(undisturbed) for path in undisturbed.rglob("*") if "tfevents" not in path.name}
    assert files == wanted


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["afd.cli", "afd.experiments.comparison"])


def in_a_process(out):
    """A whole comparison; its words go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    weaken(pytest.MonkeyPatch())
    sys.exit(compared(out)[0])


def test_killed_at_random_moments_it_goes_on(undisturbed, tmp_path):
    draw, kills, out = random.Random(3), 0, tmp_path / "out"
    for attempt in range(20):
        process = FORKED.Process(target=in_a_process, args=(out,))
        process.start()
        if attempt < 4:
            deadline = time.monotonic() + 60  # some time after it has begun to write
            while process.is_alive() and not (out / "compare.json").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            process.join(draw.uniform(0, 1.5))
            if process.exitcode is None:
                process.kill()
                kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert kills >= 1
    assert told(record(out)) == told(record(undisturbed))


def test_what_is_finished_is_not_done_again(undisturbed, tmp_path, monkeypatch):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    for name in ("train", "evaluate_to_folder"):
        monkeypatch.setattr(runs, name, None)
    monkeypatch.setattr(comparison, "images_per_second", None)
    status, content = compared(out)
    assert status == 0
    assert content == record(undisturbed) | {"commit": content["commit"]}


def test_methods_and_seeds_join_a_table(undisturbed, tmp_path, monkeypatch):
    out, trained = shutil.copytree(undisturbed, tmp_path / "out"), []
    real = runs.train

    def noting(config, *more, **told):
        trained.append(config.out)
        return real(config, *more, **told)

    monkeypatch.setattr(runs, "train", noting)
    status, content = compared(out, "--methods", "natural,at,fgsm-rs", "--epochs", "2")
    assert status == 0
    assert trained == [out / "fgsm-rs" / "seed-0"]
    assert list(content["entries"]) == ["natural", "at", "fgsm-rs"]
    assert content["entries"]["fgsm-rs"]["runs"]["0"]["evaluation"]["transfer"] is not None
    trained.clear()
    status, content = compared(out, "--methods", "at", "--epochs", "2", "--seeds", "0,4")
    assert status == 0
    assert trained == [out / "at" / "seed-4"]
    assert content["seeds"] == [0, 4]
    assert content["entries"]["natural"]["runs"]["4"]["state"] == "waiting"
    assert not content["finished"]
    assert content["entries"]["at"]["runs"]["4"]["measured"] != content["entries"]["at"]["runs"]["0"]["measured"]
    before = told(record(undisturbed))["entries"]
    assert all(told(content)["entries"][name]["runs"]["0"] == before[name]["runs"]["0"] for name in before)


def test_overwrite_keeps_what_is_finished_of_this_very_comparison(undisturbed, tmp_path, monkeypatch):
    out, trained, real = shutil.copytree(undisturbed, tmp_path / "out"), [], runs.train

    def noting(config, *more, **told):
        trained.append(config.out)
        return real(config, *more, **told)

    monkeypatch.setattr(runs, "train", noting)
    before = record(out)["entries"]
    status, content = compared(out, "--methods", "natural,at,fgsm-rs", "--epochs", "2", "--overwrite")
    assert status == 0
    assert trained == [out / "fgsm-rs" / "seed-0"]
    assert {name: content["entries"][name] for name in before} == before


def test_what_is_not_asked_for_fails_no_command(undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    content = record(out)
    content["entries"]["natural"]["runs"]["0"] = waiting() | {"state": "failed", "error": "the disk was full"}
    (out / "compare.json").write_text(json.dumps(content))
    status, content = compared(out, "--methods", "at", "--epochs", "2")
    assert status == 0
    said = capsys.readouterr().out
    assert "not asked for this time, and not finished: natural (seed 0)\n" in said
    assert content["entries"]["natural"]["runs"]["0"]["state"] == "failed"


def test_what_is_left_is_of_what_is_asked_for(undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    content = record(out)
    for entry in content["entries"].values():
        entry["runs"]["0"]["seconds"] = 60.0 * entry["passes"]  # a minute a pass
        entry["runs"]["0"]["evaluation"]["seconds"] = 3600.0
    content["entries"]["natural"]["runs"]["0"] = waiting()
    (out / "compare.json").write_text(json.dumps(content))
    assert compared(out, "--methods", "at,fgsm-rs", "--epochs", "2")[0] == 0
    # two epochs of 60 images of fgsm-rs, of 5 passes each as at, and one evaluation
    assert "[2/2] fgsm-rs, seed 0: training takes about 10 h 00 min; left in all: about 11 h 00 min" in (
        capsys.readouterr().out
    )


def test_each_run_says_where_it_was_made(undisturbed, tmp_path, monkeypatch):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    content = record(undisturbed)
    where = {name: content[name] for name in ("machine", "versions", "commit")}
    assert all(run["made"] == where for run in runs_of(content).values())
    monkeypatch.setattr("afd.experiments.train.commit", lambda: "fedcba9")
    monkeypatch.setattr("afd.machine.device_name", lambda _: "Imaginary H200")
    status, content = compared(out, "--methods", "natural,at,fgsm-rs", "--epochs", "2")
    assert status == 0
    made_here = content["entries"]["fgsm-rs"]["runs"]["0"]["made"]
    assert (made_here["commit"], made_here["machine"]["device"]) == ("fedcba9", "Imaginary H200, 1 thread")
    assert content["entries"]["at"]["runs"]["0"]["made"] == where
    assert (
        "- made otherwise: fgsm-rs (seed 0): device Imaginary H200, 1 thread, commit fedcba9"
        in (out / "table.md").read_text()
    )


def test_a_record_of_before_is_gone_on_with(undisturbed, tmp_path):
    """Which said "1 epochs", and nothing of who made a run."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    content = record(out)
    content["budget"]["asked"] = "2 epochs"
    for run in runs_of(content).values():
        del run["made"]
    (out / "compare.json").write_text(json.dumps(content))
    assert compared(out)[0] == 0
    asked = made({"at": "at"}, TINY, epochs=1, images=12, reference="at")
    content |= {"budget": {"asked": "1 epochs", "passes": None}, "entries": {}}
    assert asked.asked == "1 epoch"
    assert asked.completed(content, 60).differences(content) == []
    assert "budget is '3 epochs' there" in asked.differences(content | {"budget": {"asked": "3 epochs"}})[0]


def test_what_was_trained_in_any_precision_is_measured_in_float32(tmp_path):
    words = ["--methods", "at", "--epochs", "1", "--precision", "auto"]
    folder = tmp_path / "at" / "seed-0" / "evaluation"
    status, first = compared(tmp_path, *words)
    assert status == 0
    assert read_results(folder)["precision"] == {"asked": "fp32", "attacks": "fp32", "confirmed": None}
    found = read_results(folder) | {"precision": {"asked": "auto", "attacks": "bf16", "confirmed": 12}}
    (folder / "results.json").write_text(json.dumps(found))  # as of a version that measured otherwise, not noted yet
    first["entries"]["at"]["runs"]["0"].update(state="trained", evaluation=None)
    (tmp_path / "compare.json").write_text(json.dumps(first))
    assert compared(tmp_path, *words)[0] == 0
    assert read_results(folder)["precision"]["asked"] == "fp32"


def test_natural_training_that_joins_late_is_transferred_from_where_one_asks(tmp_path, capsys):
    out = tmp_path / "out"
    compared(out, "--methods", "at", "--epochs", "1")
    status, content = compared(out, "--methods", "natural,at", "--epochs", "1")
    assert status == 0
    assert "measured before natural was there, and so without attacks from it: at (seed 0)" in capsys.readouterr().out
    assert content["entries"]["at"]["runs"]["0"]["evaluation"]["transfer"] is None
    shutil.rmtree(out / "at" / "seed-0" / "evaluation")
    _, content = compared(out, "--methods", "natural,at", "--epochs", "1")
    assert content["entries"]["at"]["runs"]["0"]["evaluation"]["transfer"] is not None


def test_the_file_of_a_comparison_repeats_it(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "images_per_second", lambda *_: 200.0)
    status, content = compared(tmp_path / "one", "--methods", "natural,at", "--budget", "1s", "--seeds", "2")
    assert status == 0
    monkeypatch.setattr(comparison, "images_per_second", None)
    assert main(["compare", "--config", str(tmp_path / "one" / "table.toml"), "--out", str(tmp_path / "two")]) == 0
    again = record(tmp_path / "two")
    assert again["budget"].pop("at_images_per_second") is None
    assert content["budget"].pop("at_images_per_second") > 0
    assert told(again) == told(content)
    assert (tmp_path / "one" / "table.toml").read_text() == (tmp_path / "two" / "table.toml").read_text()


def test_without_a_folder_an_unfinished_comparison_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "--methods", "natural,at", "--epochs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, "result.json", 1, before=True)
        with pytest.raises(Killed):
            main(words)
    assert main(words) == 0
    folder = Path("runs/compare")
    assert sorted(path.name for path in folder.iterdir()) == ["0001", "latest"]
    assert record(folder / "latest")["finished"]
    assert main([*words, "--seeds", "1"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["0001", "0002", "latest"]


def test_a_signal_in_training_says_how_to_go_on(undisturbed, tmp_path, capsys, monkeypatch):
    real = Trainer._close_epoch

    def stopping(self, validation):
        closed = real(self, validation)
        if "at" in Path(self.config["out"]).parts:
            self.stop(signal.SIGTERM)
        return closed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_close_epoch", stopping)
        assert compared(tmp_path / "out")[0] == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "SIGTERM: stopped in epoch 2" in said
    assert said.endswith("; the same command goes on from there\n")
    assert told(compared(tmp_path / "out")[1]) == told(record(undisturbed))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_beside_the_training_loop_keeps_its_number(number, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("afd.experiments.train._measured", lambda *_: os.kill(os.getpid(), number))
    assert compared(tmp_path / "out")[0] == 128 + number
    assert f"afd: {number.name}: stopped; " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_an_evaluation_says_how_to_go_on(number, undisturbed, tmp_path, capsys, monkeypatch):
    real = runs.evaluate_to_folder

    def signalled(model, *more, **told):
        if more[2].parent.parent.name == "at":
            os.kill(os.getpid(), number)
        return real(model, *more, **told)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate_to_folder", signalled)
        assert compared(tmp_path / "out")[0] == 128 + number
    assert (
        f"afd: {number.name}: stopped; what is finished is kept, and the same command goes" in capsys.readouterr().err
    )
    assert told(compared(tmp_path / "out")[1]) == told(record(undisturbed))


# --- What fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "evaluate_to_folder"])
def test_an_entry_that_fails_stops_no_other_and_is_tried_again(stage, undisturbed, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "out", getattr(runs, stage)

    def failing(*arguments, **told):
        folder = arguments[0].out if stage == "train" else arguments[3]
        if "natural" in folder.parts:
            raise TrainingError("the loss 'task' became nan")
        return real(*arguments, **told)

    with monkeypatch.context() as patch:
        patch.setattr(runs, stage, failing)
        status, content = compared(out)
    assert status == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "afd: failed: natural (seed 0): the loss 'task' became nan; the same command tries them again"
    )
    assert {name: run["state"] for (name, _), run in runs_of(content).items()} == {"natural": "failed", "at": "done"}
    assert content["finished"]  # as far as it goes
    assert content["entries"]["at"]["runs"]["0"]["evaluation"]["transfer"] is None
    assert main(["compare", "--results", str(out), "--out", str(tmp_path / "table")]) == 0
    assert "failed: the loss 'task' became nan" in (tmp_path / "table" / "table.md").read_text()
    shutil.rmtree(out / "at" / "seed-0" / "evaluation")
    status, content = compared(out)
    assert status == 0
    assert told(content) == told(record(undisturbed))


def test_a_loss_that_is_not_finite_is_noted(tmp_path):
    (tmp_path / "table.toml").write_text(
        f"epochs = 1\nimages = 12\ntrain = '{' '.join(TINY)}'\n[entries]\nwild = 'at --lr 1e30'\ntame = 'at'\n"
    )
    assert main(["compare", "--config", str(tmp_path / "table.toml"), "--out", str(tmp_path / "out")]) == 1
    entries = record(tmp_path / "out")["entries"]
    assert "became nan" in entries["wild"]["runs"]["0"]["error"]
    assert entries["tame"]["runs"]["0"]["state"] == "done"


def test_a_run_that_an_alarm_has_stopped_is_noted_with_what_it_came_to(tmp_path, capsys):
    out = tmp_path / "out"
    words = [*DATA, "--on-alarm", "stop", "--lr", "1e-9", "--images", "12", "--methods", "natural", "--epochs", "60"]
    for _ in range(2):
        assert main(["compare", *words, "--out", str(out)]) == 1
        run = record(out)["entries"]["natural"]["runs"]["0"]
        assert run["state"] == "failed"
        assert "stopped by an alarm" in run["error"]
        assert run["measured"]["last"]["epoch"] < 60
        assert run["alarms"]
        assert "failed: natural (seed 0): stopped by an alarm" in capsys.readouterr().err


def test_somebody_elses_exception_is_shown_and_noted(tmp_path, capsys, monkeypatch):
    real = runs.train

    def failing(config, *more, **told):
        if config.out.parent.name == "at":
            raise ZeroDivisionError("of a method of my own")
        return real(config, *more, **told)

    monkeypatch.setattr(runs, "train", failing)
    status, content = compared(tmp_path / "out")
    assert status == 1
    assert "Traceback" in capsys.readouterr().err
    assert content["entries"]["at"]["runs"]["0"]["error"] == "of a method of my own"
    assert content["entries"]["natural"]["runs"]["0"]["state"] == "done"


@dataclass(frozen=True, kw_only=True)
class Broken(Natural):
    """Whose step raises."""

    def losses(self, model, batch):
        return {"task": (1 // 0) * model(batch.x).sum()}


def test_a_method_whose_step_raises_is_named_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = (*WORDS[1:], "--methods", f"natural,{__name__}:Broken", "--epochs", "1", "--out", str(out))
    told = refused(capsys, *words)
    assert f"entry '{__name__}.Broken' cannot be trained on digits: ZeroDivisionError in test_compare.py, line" in told
    assert told.endswith(": integer division or modulo by zero\n")
    assert not (out / "compare.json").exists()


def test_without_a_folder_what_failed_is_tried_again_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "--methods", "natural", "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", lambda *_, **__: 1 / 0)
        assert main(words) == 1
    assert main(words) == 0
    assert record(Path("runs/compare/0001"))["entries"]["natural"]["runs"]["0"]["state"] == "done"


def test_an_entry_that_never_began_and_is_not_asked_for_leaves_the_record(undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    content = record(out)
    content["entries"] |= {"x" * 300: {**content["entries"]["at"], "runs": {"0": waiting()}}}
    (out / "compare.json").write_text(json.dumps(content | {"finished": False}))
    status, content = compared(out, "--methods", "at", "--epochs", "2")
    assert status == 0
    assert content["finished"]
    assert list(content["entries"]) == ["natural", "at"]  # which is not asked for, but there
    assert "x" * 300 not in (out / "table.toml").read_text()


# --- What cannot be ---------------------------------------------------------------------------------------------------


def refused(capsys, *words):
    """The one line that a comparison is refused with."""
    assert main(["compare", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("afd: error: ")
    assert told.count("\n") == 1
    return told


def test_a_folder_of_other_settings_is_left_alone(undisturbed, capsys, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    same = (*WORDS[1:], "--methods", "natural,at", "--out", str(out))
    before = (out / "compare.json").read_text()
    there = f"out is {out}, which holds a comparison of other settings: "
    end = "; name another folder, or discard it by --overwrite\n"
    cases = {
        ("--epochs", "3"): "budget is '2 epochs' there and '3 epochs' here",
        ("--budget", "5m"): "budget is '2 epochs' there and '5m' here",
        ("--epochs", "2", "--images", "13"): "images is 12 there and 13 here",
        ("--epochs", "2", "--reference", "natural"): "reference is 'at' there and 'natural' here",
    }
    for words, said in cases.items():
        assert refused(capsys, *same, *words) == f"afd: error: {there}{said}{end}"
    assert "train is '--data digits" in refused(capsys, *same, "--epochs", "2", "--lr", "0.1")
    table = (out / "table.toml").read_text()
    (out / "table.toml").write_text(table.replace('at = "at"', 'at = "at --lr 0.1"'))
    told = refused(capsys, "--config", str(out / "table.toml"), "--out", str(out))
    assert "entry 'at' is 'at' there and 'at --lr 0.1' here" in told
    assert (out / "compare.json").read_text() == before


def test_overwrite_discards_another_comparison_only_when_the_new_one_can_be(undisturbed, capsys, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    new = (*WORDS[1:], "--methods", "at", "--out", str(out), "--overwrite")
    assert "less than one epoch of 'at'" in refused(capsys, *new, "--budget", "0.001s")
    assert record(out) == record(undisturbed)
    assert main(["compare", *new, "--epochs", "1"]) == 0
    assert list(record(out)["entries"]) == ["at"]
    assert not (out / "natural").exists()


def test_a_folder_of_something_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("notes")
    told = refused(capsys, *WORDS[1:], "--methods", "at", "--epochs", "1", "--out", str(tmp_path), "--overwrite")
    assert "which exists and holds no comparison" in told
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "mine.txt").unlink()
    (tmp_path / "compare.json").write_text("{")
    assert "compare.json cannot be read" in refused(
        capsys, *WORDS[1:], "--methods", "at", "--epochs", "1", "--out", str(tmp_path)
    )


def test_a_budget_of_less_than_an_epoch_says_what_would_be_needed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "images_per_second", lambda *_: 10.0)
    told = refused(capsys, *WORDS[1:], "--methods", "natural,mart", "--budget", "6s", "--out", str(tmp_path / "out"))
    # an image of at is 5 passes: 50 passes a second; one epoch of mart takes 60 images of 8 passes
    assert "the budget of 300 passes is less than one epoch of 'mart', which takes 480" in told
    assert "that needs a budget of 10s here" in told
    assert not (tmp_path / "out").exists()
    table = f"budget = '6s'\npasses = 300.0\ntrain = '{' '.join(TINY)}'\n[entries]\nmart = 'mart'\n"
    (tmp_path / "table.toml").write_text(table)  # measured somewhere else
    told = refused(capsys, "--config", str(tmp_path / "table.toml"), "--out", str(tmp_path / "out"))
    assert told.endswith("the budget of 300 passes is less than one epoch of 'mart', which takes 480\n")


def test_a_method_that_cannot_run_on_the_data_is_found_before_anything_is_trained(capsys, tmp_path):
    words = ("--methods", "at,jarn", "--epochs", "1", "--mixup", "0.5", "--out", str(tmp_path / "out"))
    assert "entry 'jarn' cannot be trained on digits: labels are soft" in refused(capsys, *WORDS[1:], *words)
    assert not (tmp_path / "out").exists()


def test_passes_of_a_network_without_convolutions_are_not_guessed(capsys, tmp_path, monkeypatch):
    def flat(config, images):
        model = real(config, images)
        model.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, model.num_features))
        return model

    real = costs.model_for
    monkeypatch.setattr(costs, "model_for", flat)
    words = (*WORDS[1:], "--methods", "at", "--out", str(tmp_path / "out"))
    assert "cannot be counted; name the length of all runs with --epochs" in refused(capsys, *words, "--budget", "1s")
    table = f"budget = '1s'\npasses = 1e6\ntrain = '{' '.join(TINY)}'\n[entries]\nat = 'at'\n"
    (tmp_path / "table.toml").write_text(table)  # where it could be counted
    said = refused(capsys, "--config", str(tmp_path / "table.toml"), "--out", str(tmp_path / "out"))
    assert "budget is 1s, but passes of at with the network convnet cannot be counted" in said
    monkeypatch.setattr(runs.Runs, "run", lambda _: None)
    assert main(["compare", *words, "--epochs", "1"]) == 0
    assert record(tmp_path / "out")["entries"]["at"]["passes"] is None


def test_more_images_than_there_are_and_radii_beyond_all_images_are_refused(capsys, tmp_path):
    words = ("--methods", "at", "--epochs", "1", "--out", str(tmp_path / "out"))
    assert "images is 61; the test split of digits has images 1 ... 60" in refused(capsys, *WORDS[1:-1], "61", *words)
    assert "eps is 90 in L2; no two images" in refused(capsys, *WORDS[1:], *words, "--norm", "L2", "--eps", "90")
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(comparison, "launched", lambda: True)
    assert "afd compare runs in one process" in refused(capsys, *WORDS[1:], "--methods", "at", "--epochs", "1")


def test_a_run_of_another_config_in_its_place_is_an_error_of_that_entry(undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    content = record(out)
    content["entries"]["at"]["runs"]["0"] = waiting()
    (out / "compare.json").write_text(json.dumps(content))
    other = (out / "at" / "seed-0" / "run.toml").read_text().replace("epochs = 2", "epochs = 9")
    (out / "at" / "seed-0" / "run.toml").write_text(other)
    status, content = compared(out)
    assert status == 1
    assert "holds another run: epochs is 9 there and 2 here" in content["entries"]["at"]["runs"]["0"]["error"]
