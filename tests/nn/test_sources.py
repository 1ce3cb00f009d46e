"""Networks by name that are not afd's own: functions of the user's, and libraries that are not here.

The libraries themselves are in tests/models.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from afd.cli import main
from afd.errors import InputError
from afd.installation import ExtraMissingError
from afd.nn import FeatureClassifier, FeatureSplit, Normalized, build_named, split
from afd.nn.networks import check_model, from_recipe, recipe_of
from afd.nn.sources import UnusableModelError, build_foreign, with_new_head

SHAPE = (1, 8, 8)


def plain(num_classes=7):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, num_classes))


def own():
    return FeatureClassifier(nn.Flatten(), 64, 10)


def fails():
    raise ValueError("of its own")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setitem(sys.modules, "networks_of_mine", sys.modules[__name__])


def test_a_function_that_takes_the_number_of_classes_gets_it():
    model = build_named("networks_of_mine:plain", SHAPE, 4)
    assert isinstance(model, FeatureSplit)
    assert model(torch.rand(2, *SHAPE)).shape == (2, 4)
    assert model.normalize is None
    assert build_named("networks_of_mine:plain", SHAPE, 4, normalize=False).normalize is False


def test_a_network_is_built_again_from_its_recipe_until_it_is_changed():
    torch.manual_seed(0)
    stats = ((0.5,), (0.25,))
    model = build_named("networks_of_mine:plain", SHAPE, 4, new_head=4, input_stats=stats, normalize=False)
    recipe = recipe_of(model)
    assert recipe["input_stats"] == {"mean": [0.5], "std": [0.25]}
    again = from_recipe(recipe)
    again.model.load_state_dict(model.model.state_dict())
    x = torch.rand(3, *SHAPE)
    assert torch.equal(again(x), model(x))
    assert again.normalize is False
    model.model.model[2] = nn.Tanh()
    assert recipe_of(model) is None


def test_a_function_may_split_by_itself():
    assert isinstance(build_named("networks_of_mine:own", SHAPE, 10), FeatureClassifier)
    with pytest.raises(InputError, match=r"input-stats are given, but model .* returns a FeatureClassifier, split alr"):
        build_named("networks_of_mine:own", SHAPE, 10, input_stats=((0.5,), (0.5,)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("networks_of_mine:fails", "failed with ValueError: of its own"),
        ("networks_of_mine:SHAPE", "is a tuple; it must be a function"),
        ("networks_of_mine:dict", "has no 'dict'"),
        ("networks_of_mine:torch.rand", "has no 'torch.rand'"),
        ("nowhere_at_all:f", "cannot be imported: No module named 'nowhere_at_all'"),
    ],
)
def test_functions_that_make_no_network_are_told(name, told):
    with pytest.raises(UnusableModelError, match=told):
        build_foreign(name, SHAPE, 4)


def test_a_new_head_is_the_last_linear_layer_and_all_else_stays():
    model = plain()
    body, old = model[1].weight.clone(), model[3]
    changed = with_new_head(model, 3)
    assert changed is model
    assert model[3] is not old
    assert model(torch.rand(2, *SHAPE)).shape == (2, 3)
    assert torch.equal(model[1].weight, body)
    alone = with_new_head(nn.Linear(4, 2, bias=False).double(), 5)
    assert (alone.out_features, alone.bias, alone.weight.dtype) == (5, None, torch.float64)
    with pytest.raises(InputError, match="without a linear layer"):
        with_new_head(nn.Flatten(), 3)


def test_names_of_no_network_are_told():
    with pytest.raises(
        InputError, match=r"model is 'resnet'; allowed are .*vgg19-bn, timm:NAME, torchvision:NAME, hf:NAM"
    ):
        check_model("resnet")
    for name in ("resnet50", "timm:x", "torchvision:x", "hf:x", "a.b:c"):
        assert check_model(name) == name


@pytest.mark.parametrize(
    ("name", "package"),
    [("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision"), ("hf:vit", "transformers")],
)
def test_a_library_that_is_not_installed_is_named_with_how_to_add_it(name, package, monkeypatch, capsys):
    monkeypatch.setattr("afd.installation.installed", lambda module: module != package)
    told = f"model {name} needs {package}, which is not installed; add it with: pip install 'afd-torch\\[models\\]'"
    with pytest.raises(ExtraMissingError, match=told):
        build_named(name, (3, 32, 32), 10)
    words = ["--limit", "40", "--epochs", "1", "--out", "nothing"]
    assert main(["train", "at", "--model", name, *words]) == 2
    assert f"needs {package}, which is not installed" in capsys.readouterr().err


def normalising():
    return Normalized(plain(4), 0.5, 0.25)


def in_parallel():
    return nn.DataParallel(plain(4))


def split_already():
    return split(plain(4), "1")


@pytest.mark.parametrize("name", ["normalising", "in_parallel", "split_already"])
def test_what_a_function_returns_is_built_again_as_it_was(name):
    torch.manual_seed(0)
    model = build_named(f"networks_of_mine:{name}", SHAPE, 4)
    again = from_recipe(recipe_of(model))
    again.model.load_state_dict(model.model.state_dict())
    assert again.feature_layer == model.feature_layer
    x = torch.rand(3, *SHAPE)
    assert torch.equal(again(x), model(x))


def test_images_are_not_normalised_twice():
    with pytest.raises(InputError, match="returns a Normalized, which normalises images itself"):
        build_named("networks_of_mine:normalising", SHAPE, 4, input_stats=((0.5,), (0.25,)))


def test_a_split_model_has_its_head():
    with pytest.raises(InputError, match="new-head is 4, but the model is a FeatureSplit, split already"):
        build_named("networks_of_mine:split_already", SHAPE, 4, new_head=4)
