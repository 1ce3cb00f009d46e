"""Weights by the names of RobustBench's classes, and of others that are published, in networks of afd's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afd.cli import main
from afd.nn import FeatureClassifier, PreActResNet, WideResNet, build_model
from afd.training import CheckpointError, load_weights, save_weights
from afd.training.rebuilt import rebuild

NAMES = ("wideresnet28-10", "preactresnet18", "vgg11-bn", "resnet18")
HEADS = {"wideresnet28-10": "fc", "preactresnet18": "linear", "vgg11-bn": "classifier", "resnet18": "linear"}


def network(name, width=1):
    return build_model(name, (1, 8, 8), 10, width)


def trained(name):
    """A network that scales nothing, as others' do, and its state_dict by their names."""
    torch.manual_seed(1)
    model = network(name)
    model.normalize = False
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 1.5)
    state = {}
    for key, value in model.state_dict().items():
        theirs = key.removeprefix("encoder.").replace("classifier.", f"{HEADS[name]}.")
        if name == "resnet18":
            theirs = theirs.replace("stem.", "conv1.") if theirs.startswith("stem.") else theirs
            theirs = f"bn1.{theirs[3:]}" if theirs.startswith("bn.") else theirs
            for block in range(8):
                theirs = theirs.replace(f"stages.{block}.", f"layer{block // 2 + 1}.{block % 2}.")
        state[theirs] = value
    return model.eval(), state


FORMS = {
    "plain": lambda state: state,
    "of DataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "within": lambda state: {"epoch": 3, "state_dict": {f"module.model.{name}": one for name, one in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_published_names_load_and_scale_nothing(name, form, tmp_path):
    model, state = trained(name)
    path, x = tmp_path / "theirs.pt", torch.rand(4, 1, 8, 8)
    torch.save(FORMS[form](state), path)
    fresh = network(name)
    assert fresh.normalize
    loaded = load_weights(path, fresh).eval()
    assert loaded is fresh
    assert not loaded.normalize
    assert torch.equal(loaded(x), model(x))
    found = rebuild(path, model=network(name))
    assert found.published
    assert torch.equal(found.network(x), model(x))


def test_the_names_are_those_of_their_classes():
    """Some of each, by hand; the lists of layers are in the tests of the networks."""
    wide, preact, vgg, resnet = (trained(name)[1] for name in NAMES)
    assert {
        "conv1.weight",
        "block1.layer.0.convShortcut.weight",
        "block3.layer.3.bn2.running_var",
        "fc.bias",
    } < wide.keys()
    assert {"layer2.0.shortcut.0.weight", "layer4.1.conv2.weight", "bn.weight", "linear.weight"} < preact.keys()
    assert {"features.0.bias", "features.1.running_mean", "classifier.weight"} < vgg.keys()
    assert {"bn1.weight", "layer1.0.conv1.weight", "layer3.0.shortcut.1.bias", "linear.bias"} < resnet.keys()


def test_the_stage_that_trades_never_calls_is_left_out(tmp_path):
    model, state = trained("wideresnet28-10")
    unused = {f"sub_{name}": value for name, value in state.items() if name.startswith("block1.")}
    torch.save({**state, **unused}, tmp_path / "theirs.pt")
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(load_weights(tmp_path / "theirs.pt", network("wideresnet28-10")).eval()(x), model(x))


def test_a_network_that_normalises_images_is_another_one(tmp_path):
    state = trained("preactresnet18")[1]
    torch.save({**state, "mu": torch.zeros(1, 1, 1, 1), "sigma": torch.ones(1, 1, 1, 1)}, tmp_path / "theirs.pt")
    for load in (load_weights, lambda path, model: rebuild(path, model=model)):
        model = network("preactresnet18")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"theirs.pt holds mu and sigma: its network normalises images"):
            load(tmp_path / "theirs.pt", model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_two_kinds_of_pre_activation_networks_are_told_apart_by_their_names(tmp_path):
    torch.manual_seed(0)
    plain = FeatureClassifier(PreActResNet(1, 1, final_norm=False), 8, 10, normalize=False).eval()
    state = {
        name.removeprefix("encoder.").replace("classifier", "linear"): one for name, one in plain.state_dict().items()
    }
    torch.save(state, tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match=r"theirs.pt does not load .* 4 missing \(encoder.bn.weight"):
        load_weights(tmp_path / "theirs.pt", network("preactresnet18"))
    other = FeatureClassifier(PreActResNet(1, 1, final_norm=False), 8, 10)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(load_weights(tmp_path / "theirs.pt", other).eval()(x), plain(x))


def test_weights_of_another_network_are_refused_in_a_line(tmp_path):
    torch.save(trained("preactresnet18")[1], tmp_path / "theirs.pt")
    for model in (network("resnet18"), network("wideresnet28-10"), network("preactresnet18", 2), network("convnet")):
        with pytest.raises(CheckpointError) as refused:
            load_weights(tmp_path / "theirs.pt", model)
        assert len(str(refused.value)) < 600
        assert model.normalize


def test_afds_own_files_are_read_as_before(tmp_path):
    """Whether features are scaled is theirs to say, whatever the layers are called."""
    for normalize in (True, False):
        torch.manual_seed(0)
        model = network("vgg11-bn").eval()
        model.normalize = normalize
        save_weights(tmp_path / "ours.pt", model)
        found, x = rebuild(tmp_path / "ours.pt"), torch.rand(4, 1, 8, 8)
        assert (found.published, found.network.normalize) == (False, normalize)
        assert torch.equal(found.network(x), model(x))
        assert load_weights(tmp_path / "ours.pt", network("vgg11-bn")).normalize is normalize


# --- The command line -------------------------------------------------------------------------------------------------

TINY = ["--limit", "40", "--epochs", "1", "--batch-size", "20", "--attack-steps", "1"]


def test_a_wide_resnet_of_smooth_activations_is_trained_and_rebuilt(tmp_path, capsys):
    words = [
        "--model",
        "wideresnet28-10",
        "--width",
        "1",
        "--activation",
        "silu",
        *TINY,
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", "at", *words]) == 0
    network = rebuild(tmp_path / "run").network
    assert isinstance(network.encoder, WideResNet)
    assert isinstance(network.encoder.relu, nn.SiLU)
    assert 'activation = "silu"' in (tmp_path / "run" / "run.toml").read_text()
    assert main(["train", "at", *words, "--resume", "auto", "--epochs", "2"]) == 0
    capsys.readouterr()
    assert main(["train", "at", *words, "--resume", "auto", "--epochs", "3", "--activation", "relu"]) == 2
    assert "model.activation is silu there and not set here" in capsys.readouterr().err


def test_training_begins_with_published_weights_if_it_scales_no_features(tmp_path, capsys):
    model, state = trained("preactresnet18")
    torch.save(state, tmp_path / "theirs.pt")
    words = ["--model", "preactresnet18", "--width", "1", *TINY, "--weights", str(tmp_path / "theirs.pt")]
    assert main(["train", "at", *words, "--out", str(tmp_path / "one")]) == 2
    assert (
        "theirs.pt, of a network that gives its features to the last layer as they are; go on with --no-normalize"
        in (capsys.readouterr().err)
    )
    assert not (tmp_path / "one").exists()
    still = ["--lr", "1e-12", "--no-normalize", "--out", str(tmp_path / "two")]
    assert main(["train", "at", *words, *still]) == 0
    begun = rebuild(tmp_path / "two").network
    torch.testing.assert_close(begun.encoder.conv1.weight, model.encoder.conv1.weight)
    assert not begun.normalize


def test_weights_of_a_network_with_another_activation_are_refused(tmp_path):
    save_weights(tmp_path / "smooth.pt", build_model("convnet", (1, 8, 8), 3, 4, "silu"))
    with pytest.raises(
        CheckpointError, match="is of a network with silu, and this one has relu; build it with the same"
    ):
        load_weights(tmp_path / "smooth.pt", build_model("convnet", (1, 8, 8), 3, 4))
    load_weights(tmp_path / "smooth.pt", build_model("convnet", (1, 8, 8), 3, 4, "silu"))
