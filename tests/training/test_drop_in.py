"""Somebody's own network and DataLoader, three lines of afd, and weights that load without it."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import afd
from afd import data
from afd.evaluation import accuracy
from afd.training import CheckpointError, load_weights, save_weights


class LeNet(nn.Module):
    def __init__(self, wrapped=False):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.fc1, self.fc2 = nn.Linear(512, 32), nn.Linear(32, 10)
        self.wrapped = wrapped

    def forward(self, x):
        logits = self.fc2(torch.relu(self.fc1(self.convolutions(x).flatten(1))))
        return SimpleNamespace(logits=logits) if self.wrapped else logits


def loaders():
    digits = data.load("digits")

    def loader(images, **settings):
        return DataLoader(TensorDataset(images.images(), images.labels), batch_size=32, **settings)

    return loader(digits.train, shuffle=True), loader(digits.validation)


@pytest.mark.parametrize(("wrapped", "feature_layer"), [(False, None), (True, "fc1")])
def test_three_lines_train_somebodys_network(wrapped, feature_layer):
    train_loader, val_loader = loaders()
    torch.manual_seed(0)
    model = LeNet(wrapped)
    attack = afd.attacks.PGDSettings(eps=0.1, alpha=0.05, steps=3)
    trainer = afd.Trainer(
        model,
        method=afd.methods.AFD.adam(loss="wgan", lr=3e-3, lr_features=1e-3, attack=attack, validation_attack=attack),
        epochs=3,
        schedule="cosine",
        feature_layer=feature_layer,
    )
    history = trainer.fit(train_loader, val_loader)
    assert history[-1].natural > 0.85
    assert history[-1].robust > 0.5
    assert history[-1].losses["task"] < history[0].losses["task"]
    players = trainer.step.players["discriminator"]
    assert players.num_features == (32 if feature_layer is None else 512)


def torchvision_resnet():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models.resnet18(num_classes=10), 512


def timm_resnet():
    pytest.importorskip("torchvision", reason="torchvision, which timm imports, is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("resnet10t", num_classes=10), 512


def hugging_face_resnet():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config), 16


def hugging_face_vit():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), 16


@pytest.mark.parametrize("build", [torchvision_resnet, timm_resnet, hugging_face_resnet, hugging_face_vit])
def test_a_librarys_classifier_trains_as_it_is(build, tmp_path):
    torch.manual_seed(0)
    model, features = build()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    attack = afd.attacks.PGDSettings(eps=8 / 255, alpha=2 / 255, steps=2)
    trainer = afd.Trainer(model, afd.methods.AFD(attack=attack, validation_attack=attack))
    (report,) = trainer.fit(list(zip(x.split(8), y.split(8), strict=True)), [(x, y)])
    assert report.losses.keys() == {"task", "discriminator", "features"}
    assert report.robust is not None
    assert trainer.network.num_classes == 10
    assert trainer.step.players["discriminator"].num_features == features
    still = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert not [name for name in still if "pooler" not in name]
    save_weights(tmp_path / "model.pt", trainer.network)
    torch.manual_seed(1)
    again = load_weights(tmp_path / "model.pt", build()[0])
    trainer.network.eval(), again.eval()
    torch.testing.assert_close(again(x), trainer.network(x))


@pytest.mark.parametrize("normalize", [None, True, False])
def test_weights_load_with_torch_alone_and_mean_the_same(normalize, tmp_path):
    torch.manual_seed(0)
    network = afd.nn.split(LeNet(), normalize=normalize)
    path = tmp_path / "model.pt"
    save_weights(path, network)
    x = torch.rand(3, 1, 8, 8)
    torch.save((x, network(x).detach()), tmp_path / "expected.pt")
    script = f"""
        import sys
        sys.modules["afd"] = None  # importing it fails
        import torch
        from torch import nn
        class LeNet(nn.Module):
            def __init__(self):
                super().__init__()
                self.convolutions = nn.Sequential(
                    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                    nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                )
                self.fc1, self.fc2 = nn.Linear(512, 32), nn.Linear(32, 10)
            def forward(self, x):
                z = torch.relu(self.fc1(self.convolutions(x).flatten(1)))
                return self.fc2(nn.functional.normalize(z) if {normalize} else z)
        model = LeNet()
        state = torch.load({str(path)!r}, weights_only=True)
        if {normalize}:  # the entry that keeps it from being loaded unawares
            del state["fc2.scales_features_to_length_1__load_with_afd_training_load_weights"]
        model.load_state_dict(state)
        x, expected = torch.load({str(tmp_path / "expected.pt")!r})
        torch.testing.assert_close(model(x).detach(), expected)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    fresh = load_weights(path, LeNet())
    assert fresh.normalize is normalize
    torch.testing.assert_close(fresh(x), network(x))


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "model.pt"
    save_weights(path, nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match=r"model.pt does not load into a LeNet: of 8 tensors, 8 missing"):
        load_weights(path, LeNet())
    with pytest.raises(CheckpointError, match=r"absent.pt cannot be read: .*No such file"):
        load_weights(tmp_path / "absent.pt", LeNet())


def test_the_average_of_the_weights_is_what_is_validated():
    train_loader, val_loader = loaders()
    torch.manual_seed(0)
    trainer = afd.Trainer(LeNet(), afd.methods.Natural(lr=0.05), epochs=1, ema=0.9)
    (report,) = trainer.fit(train_loader, val_loader)
    assert report.natural == pytest.approx(accuracy(trainer.evaluated, val_loader))
    last, average = trainer.model.fc1.weight, trainer.evaluated.model.fc1.weight
    assert not torch.equal(last, average)
    torch.testing.assert_close(last, average, rtol=0, atol=0.05)
