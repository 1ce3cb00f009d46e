"""Exact resume: a run that was interrupted anywhere ends bit for bit as one that was not."""

import functools
import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_methods import Perturbed, Replays

from afd.attacks import APGDSettings, PGDSettings
from afd.cli import main
from afd.data import Batches, Images
from afd.data.images import CropAndFlip
from afd.methods import AFD, AT, Execution, Natural
from afd.nn import FeatureClassifier
from afd.training import CheckpointError, Trainer, load_checkpoint, load_weights

EPOCHS, BATCHES = 3, 4


def images(count=30):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 1, 6, 6), generator=generator).to(torch.uint8)
    return Images(pixels, torch.arange(count) % 3, scale=255.0, num_classes=3, name="noise")


def model():
    """Draws at random in training (dropout), and gathers statistics (BatchNorm)."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 5)
    )
    return FeatureClassifier(encoder, 5, 3)


class Noisy(TensorDataset):
    """Augments from all three global generators."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + 0.01 * torch.rand(()) + 0.01 * random.random() + 0.01 * np.random.rand()).float().clamp(0, 1), y


def batches():
    return Batches(images(), 8, shuffle=True, augment=CropAndFlip(padding=1))


def data_loader():
    return DataLoader(Noisy(images().images(), images().labels), batch_size=8, shuffle=True)


JUDGE = {"validation_attack": PGDSettings(eps=0.05, alpha=2 / 255, steps=1)}
PGD_1, PGD_2 = (PGDSettings(eps=0.1, alpha=0.05, steps=steps) for steps in (1, 2))
SGD = AFD(attack=PGD_2, **JUDGE)
CASES = {
    "sgd": (batches, {"method": SGD}),
    "data_loader": (data_loader, {"method": SGD, "ema": 0.9}),
    "adam": (
        batches,
        {
            "method": AFD.adam(
                loss="dcgan",
                penalty=1.0,
                clip=1.0,
                discriminator_steps=2,
                attack=APGDSettings(eps=0.1, steps=2),
                **JUDGE,
            ),
            "schedule": "one-cycle",
            "eps_warmup": 2.0,
            "ema": 0.9,
        },
    ),
    "at": (
        data_loader,
        {
            "method": AT(lr=0.05, clip=1.0, attack=replace(PGD_2, batchnorm="train"), **JUDGE),
            "eps_warmup": 1.5,
            "ema": 0.9,
        },
    ),
    "natural": (batches, {"method": Natural(lr=0.05, micro_batches=2)}),
    "replays": (batches, {"method": Replays(lr=0.05)}),
    "wrapped": (data_loader, {"method": Perturbed(AT(lr=0.05, attack=PGD_2, **JUDGE)), "schedule": "cosine"}),
    "alternating": (
        data_loader,
        {
            "method": AFD(schedule="alternating", micro_batches=2, label_smoothing=0.1, attack=PGD_1, **JUDGE),
            "schedule": "cosine",
            "execution": Execution("bf16"),
        },
    ),
}


def trainer(case, folder, **settings):
    defaults = {"epochs": EPOCHS, "log_every": 3}
    return Trainer(model(), folder=folder, **{**defaults, **CASES[case][1], **settings})


def seed(number):
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(number)


def assert_same(left, right):
    """Nested containers of tensors, equal to the last bit."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def told(history):
    """Reports without what a clock says."""
    return [{**vars(report), "images_per_second": 0} for report in history]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The last checkpoint's state and the history of each case."""

    @functools.cache
    def run(case):
        folder = tmp_path_factory.mktemp(case)
        seed(5)
        history = trainer(case, folder).fit(CASES[case][0](), batches())
        return load_checkpoint(folder / "last.pt")[0], told(history)

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop_after", [1, 6, 7, 8])
def test_goes_on_from_any_round(case, stop_after, uninterrupted, tmp_path):
    """Round 8 ends an epoch of four, 6 and 7 lie beside a report."""
    seed(5)
    first = trainer(case, tmp_path, log_every=1)
    first.callbacks = [lambda report: first.stop() if report.global_step == stop_after else None]
    first.fit(CASES[case][0](), batches())
    assert first.position.global_step == stop_after
    seed(99)  # another process: its generators stand elsewhere
    second = trainer(case, tmp_path, resume="auto")
    history = second.fit(CASES[case][0](), batches())
    state, expected = uninterrupted(case)
    assert_same(load_checkpoint(tmp_path / "last.pt")[0], state)
    assert told(history) == expected


def test_the_cases_tell_runs_apart(uninterrupted):
    """Were training not to depend on what is restored, the test above could not fail."""
    weights = [uninterrupted(case)[0]["model"]["classifier.weight"] for case in CASES]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


def test_nothing_to_go_on_from_starts_anew(tmp_path, uninterrupted):
    seed(5)
    history = trainer("sgd", tmp_path / "new", resume="auto").fit(batches(), batches())
    assert told(history) == uninterrupted("sgd")[1]


def damage(path, how):
    whole = bytearray(path.read_bytes())
    if how == "flipped":
        whole[len(whole) // 3] ^= 4
    else:
        del whole[len(whole) * how // 10 :]
    path.write_bytes(whole)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with checkpoints of step 8 (previous) and step 10 (last)."""
    folder = tmp_path_factory.mktemp("stopped")
    seed(5)
    run = trainer("sgd", folder, log_every=1)
    run.callbacks = [lambda report: run.stop() if report.global_step == 10 else None]
    run.fit(batches(), batches())
    return folder


@pytest.mark.parametrize("how", ["flipped", *range(10)])
def test_a_damaged_checkpoint_is_passed_over(how, stopped, tmp_path, capsys, uninterrupted):
    for file in ("last.pt", "previous.pt"):
        (tmp_path / file).write_bytes((stopped / file).read_bytes())
    damage(tmp_path / "last.pt", how)
    run = trainer("sgd", tmp_path, resume="auto")
    history = run.fit(batches(), batches())
    assert "last.pt is damaged" in capsys.readouterr().err
    assert told(history) == uninterrupted("sgd")[1]
    assert_same(load_checkpoint(tmp_path / "last.pt")[0], uninterrupted("sgd")[0])


def test_damaged_checkpoints_only_are_an_error(stopped, tmp_path):
    (tmp_path / "last.pt").write_bytes((stopped / "last.pt").read_bytes())
    damage(tmp_path / "last.pt", 5)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read; the last failure: .* is damaged"):
        trainer("sgd", tmp_path, resume="auto").fit(batches(), batches())
    with pytest.raises(CheckpointError, match="is damaged"):
        trainer("sgd", tmp_path, resume=tmp_path / "last.pt").fit(batches(), batches())


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"method": replace(SGD, lr=0.2)}, "run: method.lr is 0.1 there and 0.2 here$"),
        ({"method": replace(SGD, attack=replace(PGD_2, eps=0.2))}, "run: method.attack.eps is 0.1 there and 0.2 here$"),
        (
            {"method": replace(SGD, attack=APGDSettings(eps=0.1, steps=2))},
            "run: method.attack.alpha is 0.05 there and not set here; .*; method.attack.name is PGDSettings there and",
        ),
        ({"method": Natural(**JUDGE)}, "method.name is AFD there and Natural here"),
        (
            {"method": replace(SGD, validation_attack=PGDSettings(eps=0.06, alpha=2 / 255, steps=1))},
            "run: method.validation_attack.eps is 0.05 there and 0.06 here$",
        ),
        ({"epochs": 2}, "epochs is 3 there and 2 here"),
        ({"schedule": "cosine"}, "schedule is step there and cosine here"),
        ({"ema": 0.9}, "ema is None there and 0.9 here"),
        ({"execution": Execution("bf16")}, "execution.precision is fp32 there and bf16 here"),
    ],
)
def test_another_run_is_refused_by_what_differs(settings, difference, stopped):
    other = trainer("sgd", stopped, resume="auto", **settings)
    with pytest.raises(CheckpointError, match=difference):
        other.fit(batches(), batches())


def test_another_version_is_refused(stopped, monkeypatch):
    monkeypatch.setattr("afd.training.settings.__version__", "9.9")
    with pytest.raises(CheckpointError, match=r"afd is \S+ there and 9.9 here"):
        trainer("sgd", stopped, resume="auto").fit(batches(), batches())


# --- Whole processes ------------------------------------------------------------------------------------------------

COMMAND = [
    "--epochs",
    "4",
    "--width",
    "4",
    "--attack-steps",
    "2",
    "--save-every",
    "5",
    "--log-every",
    "4",
    "--ema",
    "0.9",
]


def afd(out, *arguments):
    return main(["train", "--out", str(out), *COMMAND, *arguments])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert afd(out) == 0
    return out


def assert_same_run(out, whole_run):
    for name in ("last.pt", "best.pt"):
        states = [load_checkpoint(folder / name)[0] for folder in (out, whole_run)]
        for state in states:  # nothing here draws from the other generators, and nobody seeds them
            state["generators"] = [at["now"]["torch"] for at in state["generators"]]
        assert_same(*states)
    assert_same(torch.load(out / "model.pt"), torch.load(whole_run / "model.pt"))


def test_kill_9_in_mid_epoch(tmp_path, whole_run):
    script = f"""
        import os, signal
        from afd.cli import main
        from afd.training import trainer
        def killing(network, *batch, real=trainer.Trainer._tell):
            if network.position.global_step == 28:
                os.kill(os.getpid(), signal.SIGKILL)
            real(network, *batch)
        trainer.Trainer._tell = killing
        main({["train", "--out", str(tmp_path), *COMMAND]!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "last.pt")[1]["position"] == {"epoch": 3, "batch": 3, "global_step": 25}
    assert afd(tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, whole_run)
    steps = [json.loads(line)["global_step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 44


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_finish_the_round_save_and_say_so(number, tmp_path, whole_run):
    log = tmp_path / "log.jsonl"
    run = subprocess.Popen(
        [sys.executable, "-m", "afd", "train", "--out", str(tmp_path), *COMMAND],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not log.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert f"afd: {number.name}: stopped in epoch" in error
    assert f"saved {tmp_path / 'last.pt'}; go on with" in error
    assert "Traceback" not in error
    assert afd(tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, whole_run)


def test_another_config_is_refused_by_the_command(whole_run, capsys):
    assert afd(whole_run, "--resume", "auto", "--eps", "0.25", "--clip", "1") == 2
    error = capsys.readouterr().err
    assert "method.attack.eps is 0.2 there and 0.25 here; method.clip is None there and 1.0 here" in error


def test_the_weights_load_into_the_same_network(whole_run):
    state, metadata = load_checkpoint(whole_run / "best.pt")
    from afd.nn import build_model

    network = load_weights(whole_run / "model.pt", build_model("convnet", (1, 8, 8), 10, 4))
    assert_same(dict(network.state_dict()), dict(state["average"]["weights"]))
    assert metadata["commit"] is None or len(metadata["commit"]) >= 40


class Late(Replays):
    """Keeps a player from its first batch on only."""

    def update(self, step, batch):
        step.players.setdefault("kept", nn.Linear(1, 1))
        return super().update(step, batch)


def test_a_player_that_a_new_step_has_not_is_named_instead_of_lost(tmp_path):
    Trainer(model(), Late(lr=0.05), folder=tmp_path).fit(batches(), batches())
    with pytest.raises(CheckpointError, match="holds the players kept, and the method's step has none; what"):
        Trainer(model(), Late(lr=0.05), epochs=2, folder=tmp_path, resume="auto").fit(batches(), batches())
