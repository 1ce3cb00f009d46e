"""Classifiers of torchvision, timm and Hugging Face train as they are, by name, and are built again by it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from afd.checkpoint import CheckpointError
from afd.cli import main
from afd.errors import InputError
from afd.experiments.train import train
from afd.installation import needed_by
from afd.nn import FeatureSplit, Normalized, build_model, build_named
from afd.nn.networks import from_recipe, recipe_of
from afd.nn.sources import UnusableModelError
from afd.options import train_config
from afd.training import load_weights
from afd.training.rebuilt import rebuild

with needed_by("these tests"):
    from rich.console import Console

TINY = ["--batch-size", "8", "--epochs", "1", "--attack-steps", "1", "--eval-steps", "1", "--augment", "False"]
RATES = ["--optimizer", "adamw", "--lr", "1e-4"]
HF = {  # tiny ones, whose default sizes are their papers'
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 8,
    },
    "convnext": {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]},
    "resnet": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "embedding_size": 8, "layer_type": "basic"},
    "swin": {"depths": [1, 2], "num_heads": [1, 2], "embed_dim": 16, "window_size": 4},
}
NAMES = [
    "timm:resnet18",
    "timm:resnet18d.ra2_in1k",  # of pretrained weights the name, and not the weights
    "timm:convnext_atto",
    "timm:vit_tiny_patch16_224",
    "timm:deit_tiny_patch16_224",
    "timm:efficientnet_b0",
    "timm:mobilenetv3_small_050",
    "timm:regnetx_002",
    "timm:xcit_nano_12_p16_224",
    "timm:pvt_v2_b0",
    "timm:densenet121",
    "timm:test_vit",
    "timm:test_resnet",
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:efficientnet_b0",
    "torchvision:googlenet",  # three outputs in training
    *(f"hf:{kind}" for kind in HF),
]


@pytest.fixture
def named(tmp_path):
    """A name, and for Hugging Face's a folder with a small config of that kind."""

    def of(name):
        if not name.startswith("hf:"):
            return name
        from transformers import AutoConfig

        kind = name.removeprefix("hf:")
        AutoConfig.for_model(kind, **HF[kind]).save_pretrained(tmp_path / kind)
        return f"hf:{tmp_path / kind}"

    return of


def trained(method, name, folder, splits, *words):
    words = [method, "--data", "cifar10", "--model", name, *TINY, *RATES, "--out", str(folder), *words]
    return train(train_config(words, None), Console(quiet=True), splits)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_trained_saved_by_its_own_names_and_built_again(name, named, noise, tmp_path, recwarn):
    name = named(name)
    model = trained("afd", name, tmp_path / "run", noise()).model.eval()
    x = torch.rand(4, 3, 32, 32)
    for file in ("best.pt", "model.pt"):
        again = rebuild(tmp_path / "run" / file).network
        assert isinstance(again, FeatureSplit)
        torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-4)  # layouts differ
    with torch.no_grad():
        plain = from_recipe(recipe_of(model)).model  # the library's own class
        plain.load_state_dict(torch.load(tmp_path / "run" / "model.pt"))
    assert type(plain).__module__.partition(".")[0] in ("timm", "torchvision", "transformers")


@pytest.mark.parametrize(
    "name", ["timm:resnet18", "timm:convnext_atto", "timm:test_vit", "hf:vit", "torchvision:resnet18"]
)
def test_it_is_normalised_frozen_and_gone_on_with(name, named, noise, tmp_path):
    name = named(name)
    head = [one for one, _ in build_named(name, (3, 32, 32), 10).model.named_parameters() if one.endswith("weight")][-1]
    words = ["--input-stats", "imagenet", "--checkpoint-activations", "--freeze", f"{head.rpartition('.')[0]}.*"]
    model = trained("at", name, tmp_path / "run", noise(), *words).model
    assert isinstance(model.model, Normalized)
    fixed = model.model.state_dict()[head]
    more = trained("at", name, tmp_path / "run", noise(), *words, "--resume", "auto", "--epochs", "2").model
    assert torch.equal(more.model.state_dict()[head], fixed)


def test_every_command_takes_a_name(tmp_path, monkeypatch, capsys):
    """Digits: one channel, 8x8."""
    monkeypatch.chdir(tmp_path)
    words = ["--limit", "40", "--batch-size", "20", "--epochs", "1", "--model", "timm:test_resnet", *RATES]
    few = ["--attack-steps", "1", "--eval-steps", "1"]
    assert main(["train", "at", *words, *few, "--out", "run"]) == 0
    assert main(["evaluate", "run", "--images", "20", "--out", "report"]) == 0
    measured = json.loads((tmp_path / "report" / "results.json").read_text())["subject"]
    assert measured["architecture"] == "timm:test_resnet"
    evaluated = ["evaluate", "run/model.pt", "--model", "timm:test_resnet", "--data", "digits", "--images", "20"]
    assert main([*evaluated, "--out", "again"]) == 0
    clean = [json.loads((tmp_path / out / "results.json").read_text())["clean"] for out in ("report", "again")]
    assert clean[0] == clean[1]
    assert main(["compare", "--methods", "natural,at", *words, "--images", "20", "--out", "compared"]) == 0
    bench = [
        "bench",
        "attacks",
        "--model",
        "timm:test_resnet",
        "--shape",
        "1",
        "8",
        "8",
        "--batch",
        "4",
        "--steps",
        "1",
    ]
    assert main([*bench, "--repeats", "1", "--against", "eager", "--eps", "0.1", "--norm", "Linf"]) == 0
    capsys.readouterr()
    assert main(["train", "at", *words[:-6], "--model", "torchvision:resnet18", "--out", "x"]) == 2
    assert "takes images of 3 channels, and these have 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("timm:resnt18", "near names are resnet18"),
        ("timm:hf-hub:someone/model", "which timm does not have"),
        ("torchvision:resnet19", "near names are resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "which torchvision does not have"),
        ("hf:vitt", "near names are vit"),
        ("hf:someone/model", "Hugging Face's cache has no config of that name, and nothing is fetched"),
        ("hf:bert", "which transformers does not have"),
    ],
)
def test_names_that_there_are_not_are_told_with_near_ones(name, told):
    with pytest.raises(UnusableModelError, match=told):
        build_named(name, (3, 32, 32), 10)


def test_what_a_network_does_not_take_is_told(noise, tmp_path):
    with pytest.raises(InputError, match="model is a SqueezeNet without a linear layer"):
        trained("at", "torchvision:squeezenet1_1", tmp_path / "run", noise())
    with pytest.raises(
        UnusableModelError, match=r"name the layer that the features enter as feature_layer of afd.nn.split"
    ):
        trained("at", "timm:levit_128s", tmp_path / "run", noise())
    with pytest.raises(
        UnusableModelError, match=r"drop-path is 0.1, but model torchvision:resnet18 has no stochastic de"
    ):
        build_named("torchvision:resnet18", (3, 32, 32), 10, drop_path=0.1)
    with pytest.raises(
        UnusableModelError, match=r"drop-path is 0.1, but model timm:densenet121 has no stochastic depth"
    ):
        build_named("timm:densenet121", (3, 32, 32), 10, drop_path=0.1)
    with pytest.raises(UnusableModelError, match="torchvision:vit_b_16 takes square images, and these are 32x64"):
        build_named("torchvision:vit_b_16", (3, 32, 64), 10)
    with pytest.raises(UnusableModelError, match=r"timm:vit_tiny_patch16_224 (cannot be built|does not take|is of no)"):
        trained("at", "timm:vit_tiny_patch16_224", tmp_path / "run", noise((3, 8, 8)))


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_torchvisions_resnet50_is_afds_to_the_last_bits():
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs = resnet50(weights=None).double().eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    ours = build_model("resnet50", (3, 224, 224), 1000, 64).double().eval()
    ours.normalize = False
    state = theirs.state_dict()
    ours.classifier.load_state_dict({name: state.pop(f"fc.{name}") for name in ("weight", "bias")})
    ours.encoder.load_state_dict(state)
    for side in (224, 97):
        x = torch.rand(2, 3, side, side, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.manual_seed(1)
        theirs = resnet50(weights=None)
        torch.manual_seed(1)
        drawn = build_model("resnet50", (3, 224, 224), 1000, 64)
    for name, one in drawn.encoder.named_parameters():
        if one.dim() == 4:
            assert one.std().item() == pytest.approx(theirs.get_parameter(name).std().item(), rel=0.05), name


def test_files_of_torchvision_load_into_afds_resnet50(tmp_path):
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs = resnet50(weights=None, num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    ours = load_weights(tmp_path / "resnet50.pth", build_model("resnet50", (3, 64, 64), 10, 64)).eval()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_safetensors_load_and_say_what_is_wrong(noise, tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=7, img_size=(32, 32))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    words = ["--weights", str(tmp_path / "model.safetensors"), "--lr", "1e-12"]
    with pytest.raises(CheckpointError, match="its last layer, head, has 7 classes there and 10 here; --new-head 10"):
        trained("at", "timm:test_vit", tmp_path / "run", noise(), *words)
    model = trained("at", "timm:test_vit", tmp_path / "run", noise(), *words, "--new-head", "10").model
    assert torch.allclose(model.model.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"bad.safetensors cannot be read"):
        trained("at", "timm:test_vit", tmp_path / "x", noise(), "--weights", str(tmp_path / "bad.safetensors"))


def test_hugging_faces_own_files_load(noise, tmp_path):
    from transformers import AutoConfig, AutoModelForImageClassification

    torch.manual_seed(3)
    config = AutoConfig.for_model("vit", **HF["vit"], image_size=32, num_labels=10)
    theirs = AutoModelForImageClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    words = ["--weights", str(tmp_path / "theirs" / "model.safetensors"), "--lr", "1e-12", "--weight-decay", "0"]
    model = trained("at", f"hf:{tmp_path / 'theirs'}", tmp_path / "run", noise(), *words).model.eval()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), theirs(x).logits, rtol=1e-4, atol=1e-5)


def test_what_is_missing_in_a_file_of_hugging_faces_is_told(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model("vit", **HF["vit"], image_size=32, num_labels=10)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    del state["vit.layernorm.weight"]
    save_file({**state, "strange": torch.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(vit.layernorm.weight\); 1 not of the model \(strange\)"):
        load_weights(tmp_path / "part.safetensors", AutoModelForImageClassification.from_config(config))


def test_dills_pickles_are_refused(noise, tmp_path):
    import dill

    torch.save(
        {"model": nn.Linear(2, 2).state_dict(), "schedule": lambda lr: lr}, tmp_path / "w.pt", pickle_module=dill
    )
    with pytest.raises(CheckpointError, match="holds pickled Python objects beside its tensors"):
        trained("at", "timm:test_vit", tmp_path / "run", noise(), "--weights", str(tmp_path / "w.pt"))


def test_nothing_of_them_is_imported_before_a_name_asks_for_it():
    code = (
        "import sys, afd, afd.nn, afd.cli, afd.options, afd.experiments.train\n"
        "print([one for one in ('timm', 'torchvision', 'transformers', 'safetensors') if one in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
