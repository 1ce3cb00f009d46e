"""`afd train` from the command line to its files, on real digits."""

import json
import os
import signal
import tomllib

import pytest
import torch

from afd import data
from afd.attacks import CaptureWarning
from afd.checkpoint import load_checkpoint
from afd.cli import main
from afd.evaluation import accuracy
from afd.experiments import train
from afd.methods import METHODS
from afd.nn import build_model
from afd.options import fraction


def run(out, *arguments):
    attack = [] if "natural" in arguments else ["--attack-steps", "2"]
    return main(["train", "--out", str(out), "--epochs", "2", "--width", "4", *attack, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert run(out) == 0
    return out


def test_leaves_checkpoints_and_tensorboard_events(trained):
    names = sorted(path.name for path in trained.iterdir())
    assert [name for name in names if "tfevents" not in name] == [
        "best.pt",
        "curves.png",
        "last.pt",
        "log.jsonl",
        "model.pt",
        "previous.pt",
        "result.json",
        "run.toml",
    ]
    assert len(names) == 9


def test_tensorboard_has_every_scalar(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/task", "loss/discriminator", "loss/features", "lr/task", "lr/discriminator",
        "epoch/loss/task", "epoch/loss/discriminator", "epoch/loss/features", "epoch/lr/task", "epoch/lr/discriminator",
        "validation/natural", "validation/robust", "validation/one_step", "speed/images_per_second",
    }  # fmt: skip
    assert [event.step for event in events.Scalars("validation/robust")] == [11, 22]


def test_a_checkpoint_rebuilds_the_model_and_its_accuracy(trained):
    state, metadata = load_checkpoint(trained / "best.pt")
    config = metadata["config"]
    assert config["data"]["name"] == "digits"
    assert config["method"]["attack"]["eps"] == config["test"]["eps"] == 0.2
    assert metadata["method"] == config["method"]["name"] == "afd"
    model = build_model("convnet", (1, 8, 8), 10, config["model"]["width"])
    model.load_state_dict(state["model"])
    validation = train.Batches(data.load("digits").validation, 50)
    assert accuracy(model, validation) == pytest.approx(metadata["report"]["natural"])
    assert set(state["players"]) == {"discriminator"}
    assert set(state["optimizers"]) == {"task", "discriminator"}


@pytest.mark.parametrize(
    "words",
    [
        ["--loss", "dcgan", "--attack-steps", "1", "--eval-steps", "2", "--eps", "1/10", "--milestones", "0.5"],
        ["afd", "--optimizer", "adam", "--schedule", "alternating", "--attack-steps", "1", "--clip", "1"],
        ["at", "--attack", "apgd", "--norm", "L2", "--eps", "0.7", "--attack-steps", "2", "--eps-warmup", "0.5"],
        ["natural", "--lr", "1/30", "--ema", "0.9", "--lr-schedule", "cosine", "--augment", "True", "--no-normalize"],
    ],
)
def test_a_run_leaves_a_file_that_repeats_it(words, tmp_path, monkeypatch):
    """All but where its results go; an option beside the file changes it."""
    monkeypatch.setattr(train, "TEST_STEPS", 1)
    few = ["--limit", "60", "--epochs", "1", "--width", "2", "--batch-size", "20", "--seed", "3"]
    assert main(["train", *words, *few, "--out", str(tmp_path / "first")]) == 0
    file = tmp_path / "first" / "run.toml"
    assert "out" not in tomllib.loads(file.read_text())
    assert str(tmp_path) not in file.read_text()
    again = ["train", "--config", str(file), "--out"]
    assert main([*again, str(tmp_path / "again")]) == 0
    assert main([*again, str(tmp_path / "other"), "--seed", "4"]) == 0
    weights, same, other = (torch.load(tmp_path / name / "model.pt") for name in ("first", "again", "other"))
    assert weights.keys() == same.keys()
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert any(not torch.equal(value, other[name]) for name, value in weights.items())
    one, two, three = (load_checkpoint(tmp_path / name / "last.pt")[1] for name in ("first", "again", "other"))
    assert {**one["config"], "out": None} == {**two["config"], "out": None}
    assert {**one["config"], "out": None, "seed": 4} == {**three["config"], "out": None}
    assert (tmp_path / "again" / "run.toml").read_text() == file.read_text()


def test_the_same_seed_trains_the_same_weights(trained, tmp_path):
    assert run(tmp_path) == 0
    first, second = (load_checkpoint(folder / "last.pt")[0]["model"] for folder in (trained, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run(tmp_path, "--seed", "1", "--overwrite") == 0
    other = load_checkpoint(tmp_path / "last.pt")[0]["model"]
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_the_best_epoch_is_chosen_on_validation_images(tmp_path, monkeypatch):
    """The test images are looked at after training only: clean and attacked, by the best weights and by the last."""
    looked_at = []
    real = train.shared_accuracy
    monkeypatch.setattr(
        train,
        "shared_accuracy",
        lambda model, batches, *a, **kw: (looked_at.append(len(batches.images)), real(model, batches, *a, **kw))[1],
    )
    config = train.TrainConfig(out=tmp_path, epochs=2)
    splits = data.load("digits")
    result = train.train(config, splits=splits)
    same = result.measured["best"] == result.measured["last"]
    assert looked_at == [len(splits.test)] * (2 if same else 4)
    reports = [json.loads(json.dumps(load_checkpoint(tmp_path / n)[1]["report"])) for n in ("best.pt", "last.pt")]
    assert reports[0]["epoch"] == result.epoch
    assert reports[0]["robust"] >= reports[1]["robust"]


def test_training_against_apgd_in_low_precision(tmp_path):
    assert run(tmp_path, "--attack", "apgd", "--precision", "auto") == 0
    assert load_checkpoint(tmp_path / "last.pt")[1]["config"]["method"]["attack"]["name"] == "apgd"


def test_a_graph_where_there_is_none_is_told(tmp_path):
    with pytest.warns(CaptureWarning, match="steps run without a CUDA graph, because the model is on cpu"):
        assert run(tmp_path, "--graph", "--device", "cpu") == 0


def test_natural_training(tmp_path):
    assert run(tmp_path, "natural") == 0
    assert set(load_checkpoint(tmp_path / "last.pt")[0]["optimizers"]) == {"task"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "-0.1"], "eps is -0.1; it must be a finite number >= 0"),
        (["--eps", "nan"], "eps is nan"),
        (["--epochs", "-3"], "epochs is -3"),
        (["--epochs", "0"], "epochs is 0"),
        (["--batch-size", "0"], "batch-size is 0"),
        (["--width", "0"], "width is 0"),
        (["--limit", "0"], "limit is 0; it must be a finite number >= 1"),
        (["--limit", "-5"], "limit is -5"),
        (["--validation", "1.5"], "validation is 1.5; it must be a share between 0 and 1"),
        (["--milestones", "2"], r"milestones are (2.0,)"),
        (["--lr", "0"], "lr is 0.0"),
        (["--ema", "1"], "ema is 1.0; it must be in [0, 1)"),
        (["--device", "tpu9"], "device is 'tpu9'; allowed are auto, cpu, cuda"),
        (["--data", "mnist", "--data-root", "{here}"], "{here}"),
        (["--eps", "8"], "eps is 8; images lie in [0, 1], so it is at most 1; did you mean 8/255?"),
        (["--alpha", "2"], "alpha is 2; images lie in [0, 1], so it is at most 1; did you mean 2/255?"),
        (["--eps", "8/0"], "--eps: '8/0' is neither a number such as 0.3 nor a fraction such as 8/255"),
        (["--epochs", "2.5"], "--epochs: '2.5' is no whole number"),
        (["--epochs", str(10**20)], "epochs is 100000000000000000000; it must be at most 2147483647"),
        (["--batch-size", "1" + 400 * "0"], "it must be at most 2147483647"),
        (["--seed", str(10**20)], "seed is 100000000000000000000; it must be in [0, 2**62)"),
        (["--seed", "-1"], "seed is -1"),
        (["--width", str(10**9)], "out of memory; a smaller batch, width or model takes less"),
        (["--device", "meta"], "device is 'meta'; allowed are auto, cpu"),
        (["--device", "cpu:7"], "device is 'cpu:7'; allowed are auto, cpu"),
        (["--device="], "device is ''; it must not be empty"),
        (["natural", "--momentum", "1"], "momentum is 1.0; it must be below 1"),
        (["natural", "--weight-decay", "nan"], "weight-decay is nan"),
        (["--label-smoothing", "nan"], "label-smoothing is nan"),
        (["--clip", "0"], "clip is 0.0"),
        (["--penalty", "inf"], "penalty is inf"),
        (["--micro-batches", "0"], "micro-batches is 0"),
        (["--discriminator-steps", "0"], "discriminator-steps is 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--sync-batchnorm", "--device", "cpu"], "sync-batchnorm is True, but the device is cpu"),
        (["--weights", ""], "weights is ''; it must not be empty"),
        (["--resume="], "resume is ''; it must not be empty"),
        (["--data-root", ""], "data-root is ''; it must not be empty"),
        (["--weights", "x" * 300], "x…: File name too long"),
        (["--resume", "x" * 300], "File name too long"),
        (["--data-root", "x" * 300], "File name too long"),
        (["--weights", "a\0b"], "a path has no null byte"),
        (["--weights", "/tmp"], "weights is /tmp, which is a folder"),
        (["--resume", "/dev/zero"], "resume is /dev/zero, which is a device or pipe"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    def no_network(*_, **__):
        raise ConnectionError("no network in this test")

    monkeypatch.setattr("pooch.retrieve", no_network)
    here, out = str(tmp_path / "data"), tmp_path / "out"
    assert main(["train", "--out", str(out), *(word.format(here=here) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("afd: error: ")
    assert error.count("\n") == 1
    assert message.format(here=here) in error
    assert not out.exists() or not list(out.iterdir())


def test_numbers_are_checked_before_data_are_read(monkeypatch, tmp_path):
    def read(*_, **__):
        raise AssertionError("data were read")

    monkeypatch.setattr(data, "load", read)
    for wrong in (["--lr", "nan"], ["--device", "meta"], ["--penalty", "-1"], ["--eps", "8"]):
        assert main(["train", "--out", str(tmp_path / "out"), *wrong]) == 2


@pytest.mark.parametrize("out", ["{here}/file", "{here}/file/below", "/proc/nowhere", "/proc"])
def test_a_folder_that_cannot_be_used_is_named_before_training(out, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = out.format(here=tmp_path)
    assert run(out) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"afd: error: {out} ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "out is ''; it must not be empty"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
        ("loop", "out is loop: Too many levels of symbolic links"),
        ("dangling", "out is dangling, a link that leads nowhere"),
        ("dangling/below", "below dangling, a link that leads nowhere"),
    ],
)
def test_a_path_that_can_be_none_is_one_line(out, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert run(out) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "loop"]


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(tmp_path, capsys, monkeypatch):
    def drawn(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "plot_curves", drawn)
    assert run(tmp_path, "natural", "--limit", "30") == 0
    told = capsys.readouterr()
    assert "afd: warning: " in told.err
    assert "curves.png was not drawn: [Errno 28] No space left on device\n" in told.err
    assert "30 test images" in told.out
    assert (tmp_path / "model.pt").is_file()


def test_nothing_to_go_on_from_is_said_so(tmp_path, capsys):
    out = tmp_path / "a run"
    assert run(out, "--lr", "1e30", "--limit", "30") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "smaller learning rates may help" in told
    assert "--resume auto" not in told
    assert not (out / "last.pt").exists()


def test_what_is_to_be_pasted_is_quoted(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a run; of mine"
    real = train.json_lines

    def stopping(path):
        def write(report):
            real(path)(report)
            if report.epoch == 1 and hasattr(report, "natural"):
                os.kill(os.getpid(), signal.SIGTERM)

        return write

    monkeypatch.setattr(train, "json_lines", stopping)
    assert run(out, "--limit", "30") == 128 + signal.SIGTERM
    assert f"--resume auto --out '{out}'\n" in capsys.readouterr().err


def test_a_radius_at_which_nothing_can_be_learnt_is_warned_of(tmp_path, capsys):
    assert run(tmp_path, "--epochs", "1", "--eps", "1") == 0
    assert "afd: warning: eps is 1: from 0.5 on, any image may become the same grey" in capsys.readouterr().err
    assert train.TrainConfig().settled().warnings() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss", "gan"],
        ["--eps", "much"],
        ["--speed", "9"],
    ],
)
def test_words_that_are_not_allowed_are_refused_by_the_parser(arguments, capsys):
    assert main(["train", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("afd: error: ")
    assert told.count("\n") == 1
    assert arguments[0] in told
    assert told.endswith("; see afd train --help\n")


@pytest.mark.parametrize(("name", "value"), [("data", "faces"), ("model", "vgg")])
def test_a_data_set_or_network_that_there_is_not_is_refused(name, value, capsys):
    assert main(["train", f"--{name}", value]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"afd: error: {name} is '{value}'; ")
    assert told.count("\n") == 1


def test_a_method_that_there_is_not_is_refused(capsys):
    assert main(["train", "magic", "--epochs", "1"]) == 2
    allowed = f"{', '.join(METHODS)} and somebody's own as package.module:Class"
    told = f"afd: error: method is 'magic'; allowed are {allowed}\n"
    assert capsys.readouterr().err == told
    assert main(["train", "--epochs", "1", "magic"]) == 2
    assert capsys.readouterr().err == told


def test_eps_may_be_a_fraction():
    assert train.TrainConfig().settled().attack.eps == 0.2
    assert fraction("8/255") == 8 / 255
    assert fraction("0.3") == 0.3
    assert fraction("0.5/255") == 0.5 / 255
    assert fraction("1e-2") == 0.01
    for text in ("8/0", "a/b", "", "1/2/3", "/"):
        with pytest.raises(ValueError, match=r"is neither a number such as 0\.3 nor a fraction such as 8/255"):
            fraction(text)


def test_a_limit_holds_for_every_part_and_for_the_run_that_goes_on(tmp_path, capsys):
    assert run(tmp_path, "--limit", "30", "--batch-size", "10") == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["global_step"] == 2 * 3
    assert log[-1]["natural"] * 30 == pytest.approx(round(log[-1]["natural"] * 30))
    assert "30 test images" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "last.pt")[1]["config"]["data"]["limit"] == 30
    for other in ([], ["--limit", "40"]):
        assert run(tmp_path, *other, "--batch-size", "10", "--resume", "auto") == 2
        assert "data.limit is 30 there and" in capsys.readouterr().err


def test_a_run_without_a_limit_says_nothing_of_it(trained):
    """Checkpoints of the time when there was none are gone on with."""
    assert "limit" not in load_checkpoint(trained / "last.pt")[1]["config"]["data"]


@pytest.mark.parametrize("limit", ["1", "2", "9999999999999999999"])
def test_any_limit_trains_or_is_one_line(tmp_path, capsys, limit):
    status = run(tmp_path, "natural", "--limit", limit)
    told = capsys.readouterr().err
    assert (status, told.count("\n")) in {(0, 0), (2, 1)}, told


@pytest.mark.parametrize("columns", ["20", "80"])
def test_the_path_of_the_checkpoint_is_never_cut(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    out = tmp_path / ("[bold]a long name of a folder, as one has them" * 3)
    assert run(out, "natural", "--limit", "30") == 0
    assert f"\ncheckpoint: {out / 'best.pt'}\n" in capsys.readouterr().out


def test_best_last_and_average_are_measured_and_written(tmp_path, monkeypatch, capsys):
    """By the weights that their checkpoints hold; what is the same is not measured again."""
    calls = []
    real = train.shared_accuracy
    monkeypatch.setattr(train, "shared_accuracy", lambda *a, **kw: (calls.append(a), real(*a, **kw))[1])
    monkeypatch.setattr(train, "TEST_STEPS", 2)
    few = ["at", "--limit", "90", "--batch-size", "30", "--epochs", "3", "--lr", "0.05"]
    for name, words, states in (
        ("plain", [], ["best", "last"]),
        ("average", ["--ema", "0.9"], ["best", "last", "EMA"]),
    ):
        calls.clear()
        assert run(tmp_path / name, *few, *words) == 0
        out = json.loads((tmp_path / name / "result.json").read_text())
        told = capsys.readouterr().out
        assert list(out["measured"]) == states
        assert all(f" {state} " in told for state in states)
        assert (out["data"], out["method"], out["seed"], out["images"], out["attack"]) == (
            "digits",
            "at",
            0,
            90,
            "PGD-2",
        )
        best, last = (load_checkpoint(tmp_path / name / f"{one}.pt") for one in ("best", "last"))
        assert out["measured"]["last"]["epoch"] == last[1]["report"]["epoch"] == 3
        assert out["measured"]["best"]["epoch"] == best[1]["report"]["epoch"]
        weights = {"best": train.weights_in(tmp_path, best[0]), "last": last[0]["model"]}
        if words:
            weights["EMA"] = last[0]["average"]["weights"]
        model = build_model("convnet", (1, 8, 8), 10, 4)
        test = train.Batches(data.load("digits").limited(90).test, 90)
        for state, kept in weights.items():
            model.load_state_dict(kept)
            assert out["measured"][state]["natural"] == pytest.approx(accuracy(model, test))
        again = out["measured"]["best"]["epoch"] == 3
        assert len(calls) == 2 * (len(states) - again)
        model.load_state_dict(torch.load(tmp_path / name / "model.pt"))
        assert out["measured"]["best"]["natural"] == pytest.approx(accuracy(model, test))
    assert out["measured"]["best"]["robust"] <= out["measured"]["best"]["natural"]


def test_weights_that_are_the_best_and_the_last_are_measured_once(tmp_path, monkeypatch):
    calls = []
    real = train.shared_accuracy
    monkeypatch.setattr(train, "shared_accuracy", lambda *a, **kw: (calls.append(a), real(*a, **kw))[1])
    result = train.train(train.TrainConfig(out=tmp_path, epochs=1), splits=data.load("digits").limited(60))
    assert len(calls) == 2
    assert result.measured["best"] == result.measured["last"]
    assert (result.epoch, result.natural) == (1, result.measured["best"].natural)
