"""The runs that come with afd: each can be read, settled and said on the command line, and claims nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import afd
from afd.config import TrainConfig, recipes
from afd.data import load
from afd.experiments.costs import StepCosts
from afd.options import train_config

FOLDER = Path(afd.__file__).parent / "recipes"
IMAGENET = [name for name in recipes() if name.startswith("imagenet-")]
PEAKS = {"H100": 989e12, "A100": 312e12}  # FLOP a second in bfloat16
IMAGES = 1_281_167


def comment(name):
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


def test_there_is_one_for_each_kind_of_network():
    assert IMAGENET == ["imagenet-convnext-tiny", "imagenet-resnet50", "imagenet-vit-small"]


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_run(name):
    config = TrainConfig.read(Path(name)).settled()
    assert config.warnings() == []
    assert TrainConfig.from_json(config.as_json()) == config
    assert comment(name).startswith(f"afd train --config {name}")


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_is_said_with_the_folder_of_the_user(name):
    config = train_config(["--config", name, "--data", "folder:/data/imagenet", "--batch-size", "64"], "").settled()
    recipe = TrainConfig.read(Path(name)).settled()
    assert config.data.name == "folder:/data/imagenet"
    assert config.data.batch_size == 64
    assert config.method == recipe.method
    assert config.model == recipe.model
    assert config.epochs == recipe.epochs
    assert config.data.image_size == 224
    assert (config.test.norm, config.test.eps) == ("Linf", pytest.approx(4 / 255))
    assert config.attack.eps == pytest.approx(4 / 255)


def test_the_attack_of_a_residual_network_is_that_of_its_source():
    attack = TrainConfig.read(Path("imagenet-resnet50")).settled().attack
    assert (attack.steps, attack.random_start) == (3, False)
    assert attack.alpha == pytest.approx(2 / 3 * 4 / 255)


def test_transformers_have_their_habits():
    config = TrainConfig.read(Path("imagenet-vit-small")).settled()
    method = config.method
    assert (method.optimizer, method.decay_norms, method.layer_decay, method.clip) == ("adamw", False, 0.75, 1.0)
    assert config.eps_warmup == 10


@pytest.mark.parametrize("name", IMAGENET)
def test_a_comment_names_its_source_and_claims_no_figure_of_ours(name):
    said = comment(name)
    assert "Never run by us" in said
    assert re.search(r"Source: \w+ et al\. 20\d\d", said)
    assert "that afd does not do:" in said
    assert "Expected cost, an estimate:" in said
    assert not re.findall(r"accura|robust accuracy|AutoAttack|\d%? (clean|under)", said)
    assert re.findall(r"[\d.]+%", said) in ([], ["8%"])  # of a crop


@pytest.mark.parametrize("name", IMAGENET)
def test_an_estimate_is_the_product_of_its_factors(name):
    said = comment(name)
    passes, each = (float(re.search(words, said)[1]) for words in (r"(\d+) passes an image", r"of ([\d.]+) GFLOP"))
    in_all, flops = (
        float(re.search(words, said)[1]) for words in (r"each, ([\d.e]+) passes", r"and ([\d.e]+) FLOP in")
    )
    epochs = TrainConfig.read(Path(name)).epochs
    assert in_all == pytest.approx(passes * epochs * IMAGES, rel=0.05)
    assert flops == pytest.approx(in_all * each * 1e9, rel=0.05)
    hours = {"H100": r"(\d+) GPU hours of an H100 at a quarter", "A100": r"(\d+) of an A100 at a quarter"}
    for gpu, words in hours.items():
        assert float(re.search(words, said)[1]) == pytest.approx(flops / (0.25 * PEAKS[gpu]) / 3600, rel=0.1)


@pytest.mark.parametrize("name", IMAGENET)
def test_passes_are_counted_and_not_guessed(name):
    small = train_config(["--data", "digits", "--width", "2", "--device", "cpu"], "").settled()
    config = replace(small, method=TrainConfig.read(Path(name)).method)
    steps = StepCosts(config, load("digits").limited(20).train, torch.device("cpu"))
    assert f"{steps.first.cost:.0f} passes an image" in comment(name)
