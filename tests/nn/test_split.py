"""Any classifier as C(F(x)): which layer features enter, what they are, and that the model stays the user's own."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.errors import InputError, InputTypeError
from afd.nn import FeatureClassifier, FeatureSplit, split
from afd.nn.classifier import MARKER, unit_length


class Own(nn.Module):
    """A user's network: registered head first, an auxiliary use of features, two linear layers in a row."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.hidden = nn.Linear(48, 7)
        self.head = nn.Linear(7, 4)

    def raw(self, x):
        return torch.relu(self.hidden(self.stem(x).flatten(1)))

    def forward(self, x):
        return self.head(self.raw(x))


class WithLogits(Own):
    """Answers as Hugging Face's classifiers do."""

    def forward(self, x):
        return SimpleNamespace(loss=None, logits=super().forward(x))


@pytest.fixture
def x():
    return torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Own, WithLogits])
@pytest.mark.parametrize("normalize", [None, True, False])
def test_features_are_what_enters_the_last_linear_layer(kind, normalize, x):
    model = kind()
    raw = model.raw(x)
    whole = split(model, normalize=normalize)
    unit = raw / raw.square().sum(1, keepdim=True).sqrt()
    z, logits = whole.features_and_logits(x)
    torch.testing.assert_close(z, raw if normalize is False else unit)
    torch.testing.assert_close(logits, F.linear(unit if normalize else raw, model.head.weight, model.head.bias))
    torch.testing.assert_close(whole(x), logits)
    torch.testing.assert_close(whole.features(x), z)
    assert (whole.num_features, whole.num_classes, whole.feature_layer) == (7, 4, "head")
    own = model(x)
    torch.testing.assert_close(own if kind is Own else own.logits, logits)  # the user's own model computes the same


def test_another_layer_may_be_named(x):
    model = Own()
    whole = split(model, feature_layer="hidden", normalize=False)
    assert (whole.num_features, whole.num_classes) == (48, 4)
    torch.testing.assert_close(whole.features(x), model.stem(x).flatten(1))


def test_the_state_dict_is_the_users_own():
    model = Own()
    names = list(model.state_dict())
    split(model)
    assert list(model.state_dict()) == names
    assert list(split(model).model.state_dict()) == names
    split(model, normalize=True)
    assert set(model.state_dict()) - set(names) == {f"head.{MARKER}"}
    split(model, normalize=False)
    assert list(model.state_dict()) == names


def test_gradients_reach_features_and_logits(x):
    model = Own()
    z, logits = split(model).features_and_logits(x)
    torch.autograd.backward([z.sum(), logits.sum()])
    assert model.stem.weight.grad.abs().sum() > 0
    assert model.head.weight.grad.abs().sum() > 0


def test_splitting_again_renews_the_setting(x):
    model = Own()
    first = split(model, normalize=True)
    second = split(model, normalize=False)
    assert len(model.head._forward_pre_hooks) == 1
    assert not first.normalize
    torch.testing.assert_close(second.features(x), model.raw(x))


def test_lengths_are_taken_in_float32_or_wider():
    z = torch.rand(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert unit_length(z).dtype == torch.float64
        assert unit_length(z.bfloat16()).dtype == torch.float32


def test_a_copy_has_its_own_entrance(x):
    whole = split(Own())
    twin = copy.deepcopy(whole)
    with torch.no_grad():
        twin.model.stem.weight.mul_(2)
    assert not torch.allclose(twin.features(x), whole.features(x))
    assert twin.entrance is not whole.entrance


def test_no_graph_is_kept(x):
    whole = split(Own())
    whole.features(x)
    assert whole.entrance.seen == []
    whole(x)
    assert whole.entrance.seen == []


def test_a_split_model_is_left_as_it_is():
    ours = FeatureClassifier(nn.Flatten(), 36, 4, normalize=False)
    assert split(ours) is ours
    assert split(split_model := FeatureSplit(Own())) is split_model
    with pytest.raises(InputError, match="normalize is True; the model was built with normalize=False"):
        split(ours, normalize=True)
    with pytest.raises(InputError, match="feature_layer is 'head'; the model is a FeatureClassifier, already split"):
        split(ours, feature_layer="head")


@pytest.mark.parametrize("normalize", [True, False])
def test_normalisation_of_a_feature_classifier_can_be_switched(normalize, x):
    model = FeatureClassifier(nn.Flatten(), 36, 4, normalize=normalize)
    lengths = model.features(x).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(5)) is normalize


class Skips(Own):
    def forward(self, x):
        return self.raw(x)[:, :4]


class Tuple(Own):
    def forward(self, x):
        return (super().forward(x),)


class Mapped(Own):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Set(Own):
    def forward(self, x):
        return {super().forward(x)}


class Twice(Own):
    def forward(self, x):
        return super().forward(x) + super().forward(1 - x)


@pytest.mark.parametrize("kind", [Tuple, Mapped, WithLogits])
def test_the_logits_may_be_returned_in_any_usual_form(kind, x):
    model = kind()
    torch.testing.assert_close(split(model)(x), model.head(model.raw(x)))


class Tokens(Own):
    def forward(self, x):
        return self.head(self.raw(x)[:, None, :])[:, 0]


def test_what_does_not_fit_is_named(x):
    with pytest.raises(InputError, match="model is a Conv2d without a linear layer"):
        split(nn.Conv2d(1, 1, 1))
    with pytest.raises(InputError, match="feature_layer is 'fc'; the model's linear layers are hidden, head"):
        split(Own(), feature_layer="fc")
    with pytest.raises(InputError, match="feature_layer is 'head', which the model's forward did not call"):
        split(Skips()).features(x)
    with pytest.raises(InputTypeError, match=r"the model returned a set; it must return logits \[N, K\], or a tuple"):
        split(Set())(x)
    with pytest.raises(InputError, match="feature_layer is 'head', which the model's forward called 2 times"):
        split(Twice()).features(x)
    split(FeatureClassifier(nn.Flatten(), 36, 4), num_classes=4)
    with pytest.raises(InputError, match="num_classes is 5; the model was built with num_classes=4"):
        split(FeatureClassifier(nn.Flatten(), 36, 4), num_classes=5)
    with pytest.raises(InputError, match=r"features of shape \[5, 1, 7\] enter 'head'; they must be \[N, 7\]"):
        split(Tokens()).features(x)
    with pytest.raises(InputError, match=r"the model returned shape \[5, 7\]; it must be \[N, 4\]"):
        split(nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ConstantPad1d((0, 3), 0.0)))(x)


def other_library(name):
    """A library that is installed and fits this torch, or a skip."""
    return pytest.importorskip(name, exc_type=(ImportError, RuntimeError))


@pytest.mark.parametrize("build", ["torchvision", "timm", "transformers"])
def test_models_of_other_libraries(build):
    if build == "torchvision":
        model = other_library("torchvision").models.resnet18(num_classes=5)
    elif build == "timm":
        other_library("torchvision")
        model = other_library("timm").create_model("resnet10t", num_classes=5)
    else:
        transformers = other_library("transformers")
        other_library("torchvision")
        config = transformers.ResNetConfig(num_labels=5, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        model = transformers.ResNetForImageClassification(config)
    whole = split(model.eval())
    z, logits = whole.features_and_logits(torch.rand(2, 3, 32, 32))
    assert z.shape == (2, whole.num_features)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))


# --- Layers that are called or computed in other ways ----------------------------------------------------------------


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(input=self.body(x).relu())


@pytest.mark.parametrize("normalize", [None, True, False])
def test_features_that_enter_their_layer_by_name_are_seen(normalize):
    model, x = ByName(), torch.rand(3, 16)
    raw = model.body(x).relu()
    plain = model(x)
    z, logits = split(model, normalize=normalize).features_and_logits(x)
    assert torch.equal(z, raw if normalize is False else nn.functional.normalize(raw))
    expected = model.head(raw) if normalize else plain
    assert torch.equal(logits, expected)
    assert torch.equal(model(x), expected)
    with pytest.raises(TypeError, match="input"):
        model.head()


def test_splitting_leaves_the_power_iteration_of_a_spectral_norm_where_it_is():
    model = nn.Sequential(nn.Linear(16, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = split(model, normalize=True)
    assert all(torch.equal(network.model.state_dict()[name], value) for name, value in before.items())


def test_normalize_is_a_truth_value_or_none():
    with pytest.raises(InputTypeError, match="normalize is 'yes'; it must be True, False or None"):
        split(ByName(), normalize="yes")
