"""`afd train` and `afd evaluate` with networks of somebody else, named on the command line."""

from __future__ import annotations

import json
import tomllib

import pytest
import torch
from torch import nn

from afd import data
from afd.checkpoint import load_checkpoint
from afd.cli import main
from afd.nn import FeatureSplit, Normalized, build_model
from afd.training import save_weights
from afd.training.rebuilt import rebuild

TINY = ["--limit", "40", "--epochs", "1", "--batch-size", "20", "--attack-steps", "1", "--eval-steps", "1"]
MINE = """
import torch
from torch import nn


def body():
    return [nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)]


def ten():
    return nn.Sequential(*body(), nn.ReLU(), nn.Linear(8, 10))


def three():
    return nn.Sequential(*body(), nn.ReLU(), nn.Linear(8, 3))


def any_classes(num_classes=1000):
    return nn.Sequential(*body(), nn.ReLU(), nn.Linear(8, num_classes))


def of_colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))


def of_maps():
    return nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, beside whom runs are written."""
    (tmp_path / "mine_of_networks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return "mine_of_networks:"


def train(*words, out="run", status=0):
    assert main(["train", "at", *TINY, "--out", str(out), *map(str, words)]) == status


def refused(capsys, *words):
    capsys.readouterr()
    train(*words, out="refused", status=2)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_a_function_names_a_network_that_is_trained_measured_rebuilt_and_gone_on_with(mine, tmp_path, capsys):
    words = ("--model", f"{mine}any_classes", "--input-stats", "0.3,0.4")
    train(*words)
    found = rebuild(tmp_path / "run")
    assert isinstance(found.network, FeatureSplit)
    assert isinstance(found.network.model, Normalized)
    assert found.network.normalize is None  # the function that it is
    assert found.network.model.stats == ((0.3,), (0.4,))
    recipe = found.metadata["network"]["recipe"]
    assert (recipe["name"], recipe["classes"]) == (f"{mine}any_classes", 10)
    assert tomllib.loads((tmp_path / "run" / "run.toml").read_text())["model"]["name"] == f"{mine}any_classes"
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8),
        nn.ReLU(), nn.Linear(8, 10),
    )  # fmt: skip
    plain.load_state_dict(torch.load(tmp_path / "run" / "model.pt"))  # by its own names
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(plain.eval()((x - 0.3) / 0.4), found.network(x))
    torch.testing.assert_close(rebuild(tmp_path / "run" / "model.pt").network(x), found.network(x))
    assert main(["evaluate", "run", "--images", "20", "--out", "report"]) == 0
    measured = json.loads((tmp_path / "report" / "results.json").read_text())["subject"]
    assert measured["architecture"] == f"{mine}any_classes"
    train(*words, "--resume", "auto", "--epochs", "2")
    assert load_checkpoint(tmp_path / "run" / "last.pt")[1]["report"]["epoch"] == 2
    capsys.readouterr()
    train("--model", f"{mine}ten", "--resume", "auto", "--epochs", "3", status=2)
    assert "model.name is" in capsys.readouterr().err


def test_no_normalize_scales_features_nowhere(mine, tmp_path):
    train("--model", f"{mine}ten", "--no-normalize")
    assert rebuild(tmp_path / "run").network.normalize is False


def test_a_head_of_other_classes_is_named_and_exchanged(mine, tmp_path, capsys):
    told = refused(capsys, "--model", f"{mine}three")
    assert f"model {mine}three has 3 classes, and digits has 10; --new-head 10 gives it a fresh last layer" in told
    assert "new-head is 5, but the data have 10 classes" in refused(
        capsys, "--model", f"{mine}three", "--new-head", "5"
    )
    assert not (tmp_path / "refused").exists()
    train("--model", f"{mine}three", "--new-head", "10")
    assert rebuild(tmp_path / "run").network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert main(["evaluate", "run", "--images", "20", "--out", "report"]) == 0


def test_weights_of_another_task_keep_all_but_the_head(mine, tmp_path, capsys):
    torch.manual_seed(5)
    theirs = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    torch.save({"model": {f"module.{name}": one for name, one in theirs.state_dict().items()}}, "theirs.pt")
    told = refused(capsys, "--model", f"{mine}any_classes", "--weights", "theirs.pt")
    assert "its last layer, 6, has 3 classes there and 10 here; --new-head 10 gives it a fresh one" in told
    train("--model", f"{mine}any_classes", "--weights", "theirs.pt", "--new-head", "10", "--lr", "1e-12")
    begun = rebuild(tmp_path / "run").network.model
    torch.testing.assert_close(begun[0].weight, theirs[0].weight)
    torch.testing.assert_close(begun[4].bias, theirs[4].bias)
    assert begun[6].weight.shape == (10, 8)
    train("--model", f"{mine}any_classes", "--weights", "run/best.pt", "--lr", "1e-12", out="again")
    torch.testing.assert_close(rebuild(tmp_path / "again").network.model[6].weight, begun[6].weight)


def test_afds_own_network_takes_weights_of_other_classes_with_a_new_head(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    theirs = build_model("convnet", (1, 8, 8), 3, 4)
    save_weights("theirs.pt", theirs)
    words = ("--width", "4", "--weights", "theirs.pt")
    assert "its last layer, classifier, has 3 classes there and 10 here; --new-head 10" in refused(capsys, *words)
    train(*words, "--new-head", "10", "--lr", "1e-12")
    torch.testing.assert_close(
        rebuild(tmp_path / "run").network.encoder.layers[0].weight, theirs.encoder.layers[0].weight
    )


def test_what_does_not_fit_is_one_line_before_the_first_step(mine, tmp_path, capsys):
    assert "does not take digits's 1x8x8 images: RuntimeError" in refused(capsys, "--model", f"{mine}of_colour")
    assert "without a linear layer" in refused(capsys, "--model", f"{mine}of_maps")
    assert "mine_of_networks has no 'nothing'" in refused(capsys, "--model", f"{mine}nothing")
    assert "No module named 'there_is_none'" in refused(capsys, "--model", "there_is_none:at_all")
    assert "activation is silu, but model" in refused(capsys, "--model", f"{mine}ten", "--activation", "silu")
    assert "drop-path is 0.1, but model" in refused(capsys, "--model", f"{mine}ten", "--drop-path", "0.1")
    assert "drop-path is 0.1, but model convnet has no" in refused(capsys, "--drop-path", "0.1")
    assert "drop-path is 1.0; it must be a share in [0, 1)" in refused(capsys, "--drop-path", "1")
    assert "new-head is 1" in refused(capsys, "--new-head", "1")
    assert "input-stats is imagenet, of 3 channels, but images have 1" in refused(capsys, "--input-stats", "imagenet")
    assert "input-stats is '1,2,3', 3 numbers" in refused(capsys, "--input-stats", "1,2,3")
    torch.save({"6.weight": torch.zeros(10, 8), "0.weight": torch.zeros(1), "other": torch.zeros(1)}, "part.pt")
    told = refused(capsys, "--model", f"{mine}ten", "--weights", "part.pt")
    assert "of 11 tensors, 8 missing (0.bias, 1.weight, 1.bias, …); 1 not of the model (other); 1 of another" in told
    assert "0.weight: [1] there, [4, 1, 3, 3] here" in told
    assert not (tmp_path / "refused").exists()


def test_frozen_parameters_and_their_statistics_stay(mine, tmp_path, capsys):
    told = refused(capsys, "--model", f"{mine}ten", "--freeze", "conv*")
    assert "freeze is 'conv*', which no parameter is called; near names are" in told
    assert "which are all parameters" in refused(capsys, "--model", f"{mine}ten", "--freeze", "*")
    train("--model", f"{mine}ten", "--freeze", "0.*", "1.*")
    state = load_checkpoint(tmp_path / "run" / "last.pt")[0]["model"]
    assert torch.equal(state["1.running_mean"], torch.zeros(4))
    assert not state["1.num_batches_tracked"]
    train("--model", f"{mine}ten", "--freeze", "0.*", out="other")
    other = load_checkpoint(tmp_path / "other" / "last.pt")[0]["model"]
    assert torch.equal(other["0.weight"], state["0.weight"])
    assert not torch.equal(other["6.weight"], state["6.weight"])
    assert other["1.num_batches_tracked"] > 0


def test_activation_checkpointing_changes_no_weight(mine, tmp_path):
    for out, more in (("plain", ()), ("sparing", ("--checkpoint-activations",))):
        train("--model", "resnet18", "--width", "2", *more, out=out)
    one, other = (load_checkpoint(tmp_path / out / "last.pt")[0]["model"] for out in ("plain", "sparing"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    train(
        "--model",
        "resnet18",
        "--width",
        "2",
        "--checkpoint-activations",
        "--resume",
        "auto",
        "--epochs",
        "2",
        out="plain",
    )


def test_a_file_of_weights_is_evaluated_in_a_network_that_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    theirs = build_model("vgg11-bn", (1, 8, 8), 10, 64, input_stats=((0.5,), (0.25,))).eval()
    theirs.normalize = False
    state = {f"module.{name.removeprefix('encoder.')}": one for name, one in theirs.state_dict().items()}
    state = {name.replace("classifier.classifier", "classifier"): one for name, one in state.items()}
    stats = {"module.mean": torch.full((1, 1, 1, 1), 0.5), "module.std": torch.tensor([0.25])}
    torch.save(state | stats, "theirs.pt")
    words = ["evaluate", "theirs.pt", "--model", "vgg11-bn", "--images", "20", "--eps", "0.1"]
    assert main([*words, "--data", "digits", "--out", "refused"]) == 2
    told = capsys.readouterr().err
    assert "holds mean and std: its network normalises images, and this one takes them as they are" in told
    assert "--input-stats 0.5,0.25" in told
    assert main([*words, "--data", "digits", "--input-stats", "0.5,0.25", "--out", "report"]) == 0
    test = data.load("digits").test
    right = theirs(test.images()[:20]).argmax(1) == test.labels[:20]
    measured = json.loads((tmp_path / "report" / "results.json").read_text())["clean"]
    assert measured == pytest.approx(right.float().mean().item())
    capsys.readouterr()
    assert main([*words, "--out", "x"]) == 2
    assert "data is missing; model vgg11-bn is built for the images of a data set" in capsys.readouterr().err
    assert main(["evaluate", "theirs.pt", "--input-stats", "1,2", "--data", "digits", "--out", "x"]) == 2
    assert "input-stats is 1,2, but model is missing" in capsys.readouterr().err
