"""Runs on images in files: as from memory, gone on with after a kill, and what is wrong with them said beforehand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from image_files import folder, shard, write

from afd.cli import main
from afd.data import Batches
from afd.data.files import FileSettings, load_files
from afd.data.images import CropAndFlip
from afd.data.sources import FolderSource
from afd.data.stored import stored
from afd.data.streaming import StreamedBatches
from afd.methods import AT
from afd.nn import build_model
from afd.training import Trainer, load_checkpoint

FEW = [
    "--width", "2", "--attack-steps", "1", "--eval-steps", "1", "--batch-size", "8", "--log-every", "1", "--lr", "0.02",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, of a test that is in a hurry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("afd.experiments.train.TEST_STEPS", 1)
    return tmp_path


def weights(run):
    return load_checkpoint(run / "last.pt")[0]["model"]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_on_files_is_bit_for_bit_that_on_the_same_images_in_memory(tmp_path):
    images = stored(FolderSource(folder(tmp_path, {"": 12})), workers=2)
    found = []
    for batches, held in ((StreamedBatches, images), (Batches, images.loaded())):
        torch.manual_seed(0)
        trainer = Trainer(build_model("resnet18", (3, 8, 8), 3, width=2), AT(validation_attack=None), epochs=2)
        trainer.fit(batches(held, 8, shuffle=True, augment=CropAndFlip(2)), batches(held, 20))
        found.append({name: value.clone() for name, value in trainer.network.state_dict().items()})
    assert same(*found)


def command(*words):
    return [sys.executable, "-m", "afd", "train", "at", *FEW, *words]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_run_that_is_killed_in_mid_epoch_goes_on_to_the_same_weights_with_other_workers(here, kind):
    if kind == "folder":
        data = f"folder:{folder(here / 'set', {'train': 40, 'test': 4})}"
    else:
        for number in range(4):
            shard(here / f"train-{number}.tar", 30 * number, 30)
        data = "shards:train-*.tar"
    words = ["--data", data, "--epochs", "2", "--save-every", "2", "--ema", "0.9", "--on-alarm", "off"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(here / "cache"), "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(command(*words, "--out", "whole", "--workers", "1"), env=environment, capture_output=True)
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.Popen(
        command(*words, "--out", "killed", "--workers", "2"), env=environment, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    log = here / "killed" / "log.jsonl"
    while killed.poll() is None and time.monotonic() < end:
        lines = log.read_text().splitlines() if log.exists() else []
        steps = [one["global_step"] for one in map(json.loads, lines[:-1]) if one["kind"] == "interval"]
        if steps and steps[-1] >= 5:
            break
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    at = load_checkpoint(here / "killed" / "last.pt")[1]
    assert at["position"]["epoch"] == 1, "the kill was to come in the first epoch"
    again = command(*words, "--out", "killed", "--workers", "0", "--resume", "auto")
    went_on = subprocess.run(again, env=environment, capture_output=True, text=True)
    assert went_on.returncode == 0, went_on.stderr
    assert same(weights(here / "whole"), weights(here / "killed"))


def test_the_names_of_the_classes_are_in_the_checkpoint_and_other_files_are_refused(here, capsys):
    data = f"folder:{folder(here / 'set', {'train': 8, 'test': 2})}"
    assert main(["train", "at", *FEW, "--data", data, "--epochs", "1", "--out", "run", "--workers", "0"]) == 0
    metadata = load_checkpoint(here / "run" / "last.pt")[1]
    assert metadata["config"]["data"]["classes"] == ["ant", "bee", "cat"]
    resumed = ["train", "at", *FEW, "--data", data, "--epochs", "2", "--out", "run", "--resume", "auto"]
    (here / "set" / "train" / "ant" / "000.png").unlink()
    assert main(resumed) == 2
    assert "other images than the" in capsys.readouterr().err.splitlines()[-1]
    (here / "set" / "train" / "ant").rename(here / "set" / "train" / "dog")
    (here / "set" / "test" / "ant").rename(here / "set" / "test" / "dog")
    assert main(resumed) == 2
    assert "classes" in capsys.readouterr().err.splitlines()[-1]


def test_an_evaluation_sizes_images_as_training_did_and_wants_the_same_classes(here, capsys):
    for number in range(24):
        part = "train" if number < 18 else "test"
        write(here / "set" / part / "abc"[number % 3] / f"{number}.png", number, height=20 + number % 3, width=24)
    run = ["train", "at", *FEW, "--data", "folder:set", "--image-size", "8", "--resize", "10", "--epochs", "1"]
    assert main([*run, "--crop-scale", "0.5", "--out", "run", "--workers", "0"]) == 0
    assert main(["evaluate", "run", "--images", "5", "--out", "found"]) == 0
    found = json.loads((here / "found" / "results.json").read_text())
    assert found["data"]["shape"] == [3, 8, 8]
    assert found["data"]["images"] == "5 (drawn class by class)"
    folder(here / "other", {"train": 2, "test": 2})
    assert main(["evaluate", "run", "--data", "folder:other", "--out", "none"]) == 2
    assert "trained on the 3 classes a, b, c" in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "none").exists()


def test_files_that_are_left_out_are_in_the_report(here, capsys):
    data = folder(here / "set", {"train": 8, "test": 2}, ending=".jpg")
    (data / "train" / "bee" / "001.jpg").write_bytes(b"no image")
    words = ["train", "at", *FEW, "--data", f"folder:{data}", "--epochs", "1", "--out", "run", "--workers", "0"]
    assert main(words) == 2
    assert "1 of 24 files of" in capsys.readouterr().err
    assert not (here / "run").exists()
    assert main([*words, "--bad-images", "skip"]) == 0
    assert "left out, as they hold no whole image: 1 files" in capsys.readouterr().out
    (left,) = json.loads((here / "run" / "result.json").read_text())["damaged"]
    assert left.startswith(f"{data}/train/bee/001.jpg: ")
    assert len(load_files(f"folder:{data}", FileSettings(bad="skip")).train.left_out) == 1


def test_damage_that_only_decoding_shows_is_counted_in_every_part(here, capsys):
    data = folder(here / "set", {"train": 6, "val": 2, "test": 2}, height=32, width=32)
    for part, file in (("train", "ant/001.png"), ("val", "bee/000.png"), ("test", "cat/001.png")):
        content = bytearray((data / part / file).read_bytes())
        content[60:70] = bytes(10)  # in the middle of its pixels
        (data / part / file).write_bytes(content)
    words = ["train", "at", *FEW, "--data", f"folder:{data}", "--epochs", "1", "--workers", "1", "--out", "run"]
    assert main([*words, "--bad-images", "skip"]) == 0
    left = json.loads((here / "run" / "result.json").read_text())["damaged"]
    assert [one.partition(": ")[0].removeprefix(f"{data}/") for one in left] == [
        "train/ant/001.png",
        "val/bee/000.png",
        "test/cat/001.png",
    ]
    assert main(["evaluate", "run", "--images", "6", "--out", "found"]) == 0  # which skips as training did
    assert main(["evaluate", "run", "--images", "6", "--bad-images", "error", "--out", "none"]) == 2
    assert "cat/001.png holds no whole image" in capsys.readouterr().err


def test_test_images_that_would_be_drawn_otherwise_are_refused(here, capsys):
    folder(here / "set", {"": 20})
    words = ["train", "at", *FEW, "--data", "folder:set", "--epochs", "1", "--out", "run", "--workers", "0"]
    assert main(words) == 0
    assert main(["evaluate", "run", "--images", "6", "--out", "found"]) == 0
    write(here / "set" / "ant" / "more.png", 99)
    assert main(["evaluate", "run", "--images", "6", "--out", "again"]) == 2
    assert "holds other files than when" in capsys.readouterr().err


def test_a_run_does_not_lie_among_its_classes(here, capsys, monkeypatch):
    folder(here / "set", {"": 10})
    monkeypatch.chdir(here / "set")
    words = ["train", "at", *FEW, "--data", "folder:.", "--epochs", "1", "--workers", "0"]
    for out in ([], ["--out", "run"], ["--out", "."]):
        assert main([*words, *out]) == 2
        assert "among the class folders of" in capsys.readouterr().err
    assert sorted(one.name for one in here.joinpath("set").iterdir()) == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "folder:set", "--crop-scale", "0.5", "--augment", "False"], "nothing is cropped then"),
        (["--data", "folder:"], "data is 'folder:'"),
        (["--data", "folder:nowhere"], "which is not there"),
        (["--data", "folder:set", "--workers", "99"], "workers is 99; there are 24 images"),
        (["--data", "folder:set", "--workers", "-1"], "workers is -1"),
        (["--data", "folder:set", "--resize", "9"], "resize is 9, but image-size is missing"),
        (["--data", "folder:set", "--resolutions", "8:1"], "image-size is missing"),
        (["--data", "folder:set", "--image-size", "8", "--resolutions", "8:2"], "must begin with epoch 1"),
        (["--data", "folder:set", "--crop-scale", "2"], "crop-scale is 2"),
        (["--data", "folder:set", "--data-root", "."], "data-root is given, but data is folder:"),
        (["--data", "folder:set", "--epoch-images", "9"], "epoch-images is given, but data is folder:"),
        (["--data", "folder:set", "--test-share", "0.2"], "there are test images in"),
        (["--data", "digits", "--image-size", "8"], "image-size is given, but data is digits"),
        (["--data", "shards:set/*.tar"], "no shard is named"),
        (["--data", "folder:set", "--bad-images", "ignore"], "bad-images"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(here, capsys, words, told):
    folder(here / "set", {"train": 8, "test": 2})
    assert main(["train", "at", *FEW, *words, "--out", "run"]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert error.count("\n") == 0
    assert not (here / "run").exists()


def test_images_grow_over_the_run_and_a_network_that_does_not_take_a_size_is_said_beforehand(here, capsys):
    folder(here / "set", {"train": 8, "test": 2}, height=24, width=24)
    words = ["--data", "folder:set", "--image-size", "16", "--resolutions", "8:1", "16:2", "--epochs", "2"]
    assert main(["train", "at", *FEW, *words, "--out", "run", "--workers", "0"]) == 0
    assert main(["train", "at", *FEW, *words, "--out", "fixed", "--model", "convnet"]) == 2
    assert "resolutions has 8, which" in capsys.readouterr().err
