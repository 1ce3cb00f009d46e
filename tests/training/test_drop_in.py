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
    trainer = afd.Trainer(
        model,
        method=afd.methods.AFD.adam(loss="wgan", lr=3e-3, lr_features=1e-3),
        attack=afd.attacks.PGD.partial(eps=0.1, alpha=0.05, steps=3),
        validation_attack=afd.attacks.PGD.partial(eps=0.1, alpha=0.05, steps=3),
        epochs=3,
        schedule="cosine",
        feature_layer=feature_layer,
    )
    history = trainer.fit(train_loader, val_loader)
    assert history[-1].natural > 0.85
    assert history[-1].robust > 0.5
    assert history[-1].losses["task"] < history[0].losses["task"]
    players = trainer.round.players["discriminator"]
    assert players.num_features == (32 if feature_layer is None else 512)


@pytest.mark.parametrize("normalize", [True, False])
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
        model.load_state_dict(torch.load({str(path)!r}, weights_only=True))
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
    with pytest.raises(CheckpointError, match=r"model.pt does not load into a LeNet: .*Missing key"):
        load_weights(path, LeNet())
    with pytest.raises(CheckpointError, match="does not load into a LeNet"):
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
