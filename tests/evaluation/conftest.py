"""Small real models for the evaluation tests, on one thread: their operations are tiny."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from afd import data, nn
from afd.attacks import PGD
from afd.data import Batches
from afd.evaluation.attacks import Epsilon, ascending
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.model import Model
from afd.evaluation.protocol import Protocol, Stage, probes

EPS = "0.15"


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def splits():
    return data.load("digits")


@pytest.fixture(scope="package")
def images(splits):
    """The first 100 test digits."""
    return splits.test.take(torch.arange(100))


def train(images, epochs, attack=None, width=8):
    torch.manual_seed(0)
    model = nn.build_model("convnet", images.shape, 10, width)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = Batches(images, 64, shuffle=True)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for x, y in batches:
            x_adv = x if attack is None else attack(model)(x, y)
            loss = F.cross_entropy(10 * model(x_adv), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        model.classifier.weight *= 10
        model.classifier.bias *= 10
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="package")
def natural(splits):
    """A classifier of digits, trained on clean images."""
    return train(splits.train, 8)


@pytest.fixture(scope="package")
def robust(splits):
    """One trained on attacked images."""
    return train(splits.train, 9, PGD.partial(eps=float(EPS), alpha=0.06, steps=4))


@pytest.fixture(scope="package")
def mnist_models():
    """The first 500 MNIST test images, and a natural and an adversarially trained classifier of them by name."""
    repository = Path(__file__).parents[2]
    root = Path(os.environ.get("AFD_DATA_ROOT") or repository.parent / "shared" / "data") / "mnist"
    if not root.is_dir():
        pytest.skip(f"no {root}; set AFD_DATA_ROOT to a folder that has mnist/")
    mnist = data.load("mnist", root)
    some = mnist.train.take(torch.arange(20_000))
    models = {"natural": train(some, 1), "robust": train(some, 3, PGD.partial(eps=0.2, alpha=0.07, steps=5))}
    return mnist.test.take(torch.arange(500)), models


@pytest.fixture
def judged(images, tmp_path):
    """evaluate_to_folder() with one cheap attack and all probes: returns the results, and the checks by name."""

    def run(model, surrogate=None, out="out", taken=images, **options):
        reference = Epsilon.of(EPS)
        stages = [Stage("pgd", "pgd", "Linf", ascending((EPS,)), {"steps": 10})]
        if surrogate is not None:
            stages.append(
                Stage("transfer", "pgd", "Linf", (reference,), {"steps": 10}, scope="correct", role="transfer")
            )
            surrogate = Model("surrogate", "test", surrogate)
        for stage in probes("Linf", reference):
            fewer = {"queries": 200} if stage.attack == "square" else stage.settings
            stages.append(dataclasses.replace(stage, settings=fewer))
        protocol = Protocol("paper", "Linf", reference, tuple(stages))
        model = model if isinstance(model, Model) else Model("model", "test", model)
        results = evaluate_to_folder(
            model, taken, protocol, tmp_path / out, surrogate=surrogate, batch_size=60, **options
        )
        return results, {check["name"]: check for check in results["checks"]}

    return run
