"""How many epochs, of what, and that `afd` understands every command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from gpu_day import training
from gpu_day.child import Command, Exit
from gpu_day.readers import write_json
from gpu_day.steps import Box

from afd.config import TrainConfig
from afd.evaluate import EvaluateConfig

PACE = {"seconds_an_epoch": 10.0, "seconds_of_start": 2.0, "seconds_of_test": 8.0}


@pytest.mark.parametrize(("seconds", "epochs"), [(30, 1), (60, 2), (200, 14), (600, 20)])
def test_epochs_fit_beside_start_and_test(seconds, epochs):
    assert training.epochs_in(seconds, PACE, most=20) == epochs
    used = training.START + 2 + 8 + 10 * epochs
    assert used <= seconds or epochs == 1


def understood(config, command):
    """The config that `afd train` or `afd evaluate` makes of a command's words."""
    assert command.words[1:3] == ("-m", "afd")
    words = command.words[4:]
    return tyro.cli(
        Annotated[config, tyro.conf.arg(name="")],
        args=words,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


@pytest.fixture
def data(tmp_path):
    """A folder with both data sets, CIFAR-10 as originals."""
    for name in ("mnist", "cifar-10-batches-bin"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


def test_both_data_sets_are_trained_as_the_issue_asks(make_setting, data):
    setting = make_setting(gpu="NVIDIA H100", data=data)
    steps = {step.name: step for step in training.steps(setting)}
    box = Box(setting, setting.results / "6-training" / "mnist-dcgan", 300)
    mnist = understood(TrainConfig, steps["mnist-dcgan"].commands(box)[0]).settled()
    assert (mnist.model.name, mnist.model.width, mnist.attack.steps) == ("resnet18", 16, 40)
    assert (mnist.method.name, mnist.method.loss, mnist.lr_schedule, mnist.device) == (
        "afd",
        "dcgan",
        "one-cycle",
        "cuda",
    )
    assert mnist.data.root == data
    assert mnist.attack.eps == 0.3
    cifar = understood(TrainConfig, steps["cifar10-wgan"].commands(box)[0]).settled()
    assert (cifar.data.name, cifar.model.name, cifar.method.loss) == ("cifar10", "resnet18", "wgan")
    assert cifar.attack.eps == 8 / 255
    assert understood(TrainConfig, steps["mnist-natural"].commands(box)[0]).method.name == "natural"


def test_the_pace_that_was_measured_sets_the_epochs(make_setting, data):
    setting = make_setting(gpu="NVIDIA H100", data=data)
    (step,) = [step for step in training.steps(setting) if step.name == "mnist-dcgan"]
    box = Box(setting, setting.results / "6-training" / "mnist-dcgan", 200)
    assert understood(TrainConfig, step.commands(box)[0]).epochs == 1, "nothing was measured"
    write_json(box.folder.with_name("mnist-pace") / "wgan.json", PACE)
    assert understood(TrainConfig, step.commands(box)[0]).epochs == 14
    assert understood(TrainConfig, step.commands(replace(box, seconds=1e6))[0]).epochs == 20


def test_what_the_runs_left_is_evaluated_the_best_where_there_is_one(make_setting, data):
    setting = make_setting(gpu="NVIDIA H100", data=data)
    steps = {step.name: step for step in training.steps(setting)}
    box = Box(setting, setting.results / "6-training" / "cifar10-autoattack", 60)
    assert steps["cifar10-autoattack"].commands(box) == []
    assert "no run" in steps["cifar10-autoattack"].read(box, []).missing
    for run, names in (("natural", ["last.pt", "best.pt"]), ("dcgan", ["last.pt"])):
        for name in names:
            path = setting.results / "6-training" / f"cifar10-{run}" / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    asked = [understood(EvaluateConfig, command) for command in steps["cifar10-autoattack"].commands(box)]
    assert [Path(config.model).parts[-3:] for config in asked] == [
        ("cifar10-natural", "run", "best.pt"),
        ("cifar10-dcgan", "run", "last.pt"),
    ]
    assert {(config.protocol, config.images, config.device) for config in asked} == {("autoattack", 256, "cuda")}
    assert {understood(EvaluateConfig, one).images for one in steps["cifar10-quick"].commands(box)} == {1000}


def test_a_jpeg_copy_is_unpacked_and_named_beside_every_figure(make_setting, tmp_path):
    data = tmp_path / "data"
    (data / "cifar10-jpeg").mkdir(parents=True)
    (data / "cifar10-jpeg" / "images.tar.xz").touch()
    (data / "unpack_cifar10.py").touch()
    setting = make_setting(gpu="NVIDIA H100", data=data)
    steps = {step.name: step for step in training.steps(setting)}
    box = Box(setting, setting.results / "6-training" / "cifar10-wgan", 60)
    (unpack,) = steps["cifar10-unpack"].commands(box)
    assert unpack.words[1:] == (str(data / "unpack_cifar10.py"), str(setting.work / "data"))
    (train,) = steps["cifar10-wgan"].commands(box)
    assert understood(TrainConfig, train).data.root == setting.work / "data"
    found = steps["cifar10-wgan"].read(box, [Exit(train, box.folder / "train.log", 0, 1.0)])
    assert found.figures["note"] == "CIFAR-10 (JPEG copy)"


@pytest.mark.parametrize("gpu", [None, "NVIDIA H100"])
def test_digits_stand_in_for_absent_data_and_it_is_said(make_setting, tmp_path, gpu):
    (tmp_path / "data").mkdir()
    (task,) = training.tasks(make_setting(gpu=gpu, data=tmp_path / "data"))
    assert task.data == "digits"
    assert training.noted(task)["note"]


def test_figures_are_read_from_what_a_run_left(make_setting, tmp_path):
    box = Box(make_setting(), tmp_path / "digits-wgan", 60)
    epoch = {"kind": "epoch", "natural": 0.91, "robust": 0.8, "images_per_second": 1234.5}
    write_json(box.folder / "run" / "unused", {})
    (box.folder / "run" / "log.jsonl").write_text(f"{epoch}\n".replace("'", '"') * 3)
    exits = [Exit(Command("train", ("afd", "--epochs", "4")), tmp_path, 0, 1.0)]
    figures = training.read_training(training.DIGITS, box, exits).figures
    assert figures == {
        "epochs": "3 of 4", "images/s": 1234, "validation natural": "91.00%", "validation PGD-20": "80.00%",
        "note": training.DIGITS.note,
    }  # fmt: skip


def test_evaluations_are_read_run_by_run(make_setting, tmp_path):
    box = Box(make_setting(), tmp_path, 60)
    results = {"clean": 0.9, "worst_case": {"Linf": {"0.2": 0.5}}, "verdict": "pass"}
    write_json(box.folder / "wgan" / "results.json", results)
    commands = [Command(method, ("afd", "--images", "256")) for method in ("wgan", "dcgan", "natural")]
    exits = [Exit(commands[0], tmp_path, 0, 1.0), Exit(commands[1], tmp_path, 0, 1.0)]
    exits.append(Exit(commands[2], tmp_path, None, 1.0, timed_out=True))
    found = training.read_evaluations(training.MNIST, box, exits)
    assert found.figures == {
        "wgan": "clean 90.00%, worst case 50.00% at 0.2 Linf (first 256 test images; checks: pass)"
    }
    assert found.problems == ["dcgan left no results.json"]
