"""A step of one's own asks of its batches what a trainer asks of its loaders', before anything is trained."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from afd.attacks import PGDSettings
from afd.errors import InputError, InputTypeError
from afd.methods import AFD, AT, Natural
from afd.nn import FeatureClassifier, split

X, Y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
SOFT = torch.full((6, 3), 1 / 3)
ATTACK = PGDSettings(eps=0.1, steps=2)
METHODS = [Natural(lr=0.01), AT(lr=0.01, attack=ATTACK), AFD(lr=0.01, attack=ATTACK)]


def network():
    torch.manual_seed(0)
    return FeatureClassifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU()), 5, 3)


WRONG = {
    "a list": ((X.tolist(), Y), InputTypeError, "x is a list; it must be a torch.Tensor"),
    "an array": ((X.numpy(), Y), InputTypeError, "x is a ndarray"),
    "bytes": (((X * 255).byte(), Y), InputTypeError, "x is torch.uint8"),
    "doubles": ((X.double(), Y), InputError, "x is torch.float64 and the model torch.float32"),
    "no images": ((X[:0], Y[:0]), InputError, "a batch must hold at least one image"),
    "a number": ((torch.tensor(0.5), Y), InputError, r"x has shape \[\]; it must be images"),
    "0 to 255": ((X * 255, Y), InputError, r"x has values in .*; images must be finite and in \[0.0, 1.0\]"),
    "NaN": ((X * torch.nan, Y), InputError, "images must be finite"),
    "another device": ((X.to("meta"), Y.to("meta")), (InputError, InputTypeError), "meta"),
    "labels of int32": ((X, Y.int()), InputTypeError, "y is torch.int32; labels must be torch.int64"),
    "labels as an array": ((X, Y.numpy()), InputTypeError, "y is a ndarray"),
    "few labels": ((X, Y[:5]), InputError, r"y has shape \[5\]; it must be \[6\]"),
    "columns of labels": ((X, Y[:, None]), InputError, r"y has shape \[6, 1\]"),
    "a label too many": ((X, Y + 1), InputError, r"y holds the label 3; the model has classes 0 \.\.\. 2"),
    "a negative label": ((X, Y - 1), InputError, "y holds the label -1"),
    "no labels": ((X, None), InputError, "y is None"),
    "soft labels of fewer": ((X, SOFT[:, :2]), InputError, r"y has shape \[6, 2\]; soft labels of this model are"),
    "soft labels below 0": ((X, SOFT - 1), InputError, "soft labels must be finite and >= 0"),
}  # fmt: skip
BESIDE = {
    "x_adv of fewer": ({"x_adv": X[:5]}, InputError, r"x_adv has shape \[5, 1, 4, 4\]; it must match x"),
    "x_adv of doubles": ({"x_adv": X.double()}, InputTypeError, "x_adv is torch.float64"),
    "x_adv outside": ({"x_adv": X + 2}, InputError, "x_adv has values that are not finite or not in"),
    "x_adv of NaN": ({"x_adv": X * torch.nan}, InputError, "x_adv has values that are not finite"),
    "x_adv as an array": ({"x_adv": np.ones((6, 1, 4, 4))}, InputTypeError, "x_adv is a ndarray"),
    "index of fewer": ({"index": Y[:5]}, InputTypeError, r"index is torch.int64 \[5\]; it must be torch.int64 \[6\]"),
    "index as numbers": ({"index": Y.float()}, InputTypeError, "index is torch.float32"),
    "index of int32": ({"index": Y.int()}, InputTypeError, "index is torch.int32"),
    "index as a list": ({"index": [0] * 6}, InputTypeError, "index is a list"),
}


def refused(method, error, message, *batch, **beside):
    model = network()
    step = method.build(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        step(*batch, **beside)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_batch_is_named_and_trains_nothing(method, case):
    batch, error, message = WRONG[case]
    if isinstance(method, AFD) and case.startswith("soft"):
        error, message = InputError, "y (is soft labels|has shape)|soft labels must be|labels are soft"
    refused(method, error, message, *batch)


@pytest.mark.parametrize("case", BESIDE)
def test_what_lies_beside_is_looked_at_too(case):
    beside, error, message = BESIDE[case]
    refused(METHODS[1], error, message, X, Y, **beside)


def test_values_of_the_first_batches_are_looked_at_and_forms_of_all():
    step = METHODS[0].build(network())
    for _ in range(3):
        step(X, Y)
    step(X * 255, Y)  # which later batches are not looked at for: it would wait for the device
    with pytest.raises(InputTypeError, match=r"y is torch\.int32"):
        step(X, Y.int())


def test_images_in_the_bounds_of_the_attack_are_allowed():
    step = AT(lr=0.01, attack=PGDSettings(eps=0.1, steps=2, bounds=(-1.0, 1.0))).build(network())
    assert step(2 * X - 1, Y)["task"].isfinite()
    with pytest.raises(InputError, match=r"in \[-1\.0, 1\.0\]"):
        step(2 * X, Y)


def test_images_are_to_be_where_the_model_is_now():
    model = network()
    step = METHODS[0].build(model)
    step(X, Y)
    model.to("meta")
    with pytest.raises(InputError, match="x is on cpu; it must be on the model's device, meta"):
        step(X, Y)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: type(method).__name__)
def test_a_model_may_move_after_its_step_was_built(method, cuda):
    model = network()
    step = method.build(model)
    model.to(cuda)
    assert step(X.to(cuda), Y.to(cuda))["task"].isfinite()


class Headed(nn.Module):
    """Its head is registered before another layer, of which nothing says that the logits are not made by it."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aside = nn.Linear(16, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        z = self.body(x.flatten(1)).relu()
        self.aside(z.detach())
        return self.head(z)


def test_features_that_are_not_those_of_the_logits_are_named():
    step = AFD(lr=0.01, attack=ATTACK).build(Headed())
    with pytest.raises(InputError, match="head"):
        step(X, Y)
    step = AFD(lr=0.01, attack=ATTACK).build(split(Headed(), "head"))
    assert step(X, Y)["task"].isfinite()


def test_a_wrapper_of_somebody_elses_is_taken_off():
    model = network()
    with pytest.warns(UserWarning, match="model is compiled; the module inside of it is trained"):
        step = METHODS[0].build(torch.compile(model))
    step(X, Y)
    assert step.network is model
