"""Attacks on models with habits: layouts they insist on, draws and state of their own, hooks, wrong values."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from afd.attacks import APGD, FAB, FGSM, MIM, PGD, ModelWarning
from afd.errors import InputError, InputTypeError, ModelError

KINDS = {
    "PGD": PGD.partial(steps=2),
    "PGD kl": PGD.partial(steps=2, loss="kl"),
    "FGSM": FGSM.partial(),
    "MIM": MIM.partial(steps=2),
    "APGD": APGD.partial(steps=3),
    "APGD early stop": APGD.partial(steps=3, early_stop=True),
    "FAB": FAB.partial(eps=1.0, steps=6),
    "FAB-T L2": FAB.partial(norm="L2", eps=50.0, steps=3, n_target_classes=2, early_stop=False),
    "APGD-T L1": APGD.partial(norm="L1", eps=5.0, steps=3, loss="dlr-targeted", n_target_classes=2),
}
TRUTHS = ("fold_batchnorm", "validate", "targeted")
each_kind = pytest.mark.parametrize("kind", KINDS)


class Flat(nn.Module):
    """LeNet's way to end: its last layer takes a view of the features."""

    def __init__(self, channels=3, flatten=lambda h: h.view(h.size(0), -1)):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 5)
        self.norm.running_mean.normal_()
        self.flatten = flatten

    def forward(self, x):
        return self.linear(self.flatten(self.norm(self.conv(x)).relu()))


def batch(count=4, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, 8, 8, generator=generator), torch.arange(count) % 5


# --- Layouts --------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_that_takes_a_view_is_attacked_like_one_that_reshapes(kind, channels):
    x, y = batch(70, channels)
    found = KINDS[kind](Flat(channels))(x, y)
    expected = KINDS[kind](Flat(channels, flatten=lambda h: h.reshape(len(h), -1)))(x, y)
    assert (found - expected).abs().gt(1e-5).float().mean() < 0.01
    assert not found.equal(x)


def test_that_a_model_takes_a_view_is_found_once():
    calls = []
    attack = PGD(Flat(flatten=lambda h: (calls.append(1), h.view(len(h), -1))[1]), steps=2)
    attack(*batch())
    assert len(calls) == 3  # one that fails
    attack(*batch())
    assert len(calls) == 5


def test_another_error_of_the_model_is_its_own():
    with pytest.raises(RuntimeError, match=r"shape '.*' is invalid"):
        PGD(Flat(flatten=lambda h: h.reshape(len(h), 7)))(*batch())


# --- Draws and state ------------------------------------------------------------------------------------------------


class Drawing(Flat):
    """Adds noise of three generators and counts its calls."""

    def __init__(self):
        super().__init__(flatten=lambda h: h.flatten(1))
        self.calls, self.memory = 0, None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.memory = torch.zeros(len(x), 3, 8, 8) if self.memory is None else self.memory
        noise = torch.randn_like(x) + random.random() + np.random.rand()
        return super().forward(x + self.memory + 0.1 * noise + 0.01 * self.seen)


def seeded(attack, x, y):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    attack.model.seen.zero_()
    return attack(x, y)


def test_the_look_at_a_models_size_leaves_no_trace():
    x, y = batch(65)
    attack = PGD(Drawing(), steps=2, chunk_size=None)
    first = seeded(attack, x, y)
    assert attack.model.calls == 2
    assert attack.model.memory.shape == x.shape
    assert first.equal(seeded(attack, x, y))
    assert first.equal(seeded(PGD(Drawing(), steps=2, chunk_size=65), x, y))


def test_a_hook_is_told_of_the_batch_and_of_nothing_else():
    model, sizes = Flat(flatten=lambda h: h.flatten(1)), []
    model.conv.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    PGD(model, steps=2)(*batch(100))
    assert sizes == [100, 100]


@each_kind
def test_an_attack_that_has_run_can_be_copied_and_sent(kind):
    attack, (x, y) = (
        KINDS[kind](nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))),
        batch(),
    )
    expected = attack(x, y)
    attack._graphs.cache.met("some steps", threading.Lock())  # a graph can be neither copied nor sent
    for other in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert other.model is not attack.model
        assert other(x, y).equal(expected)


# --- Wrong values ---------------------------------------------------------------------------------------------------


class Spoilt(nn.Module):
    """Logits of NaN for some samples."""

    def __init__(self, share):
        super().__init__()
        self.linear, self.share = nn.Linear(192, 5), share

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        return torch.where(x[:, 0, 0, 0, None] <= self.share, torch.nan, logits)


NO_STEPS = {
    "PGD, no steps": PGD.partial(steps=0),
    "MIM, no steps": MIM.partial(steps=0),
    "APGD, no steps": APGD.partial(steps=0),
}


@pytest.mark.parametrize("kind", KINDS | NO_STEPS)
def test_nan_at_the_images_is_an_error_that_names_all_of_them(kind):
    x, y = batch()
    x[:, 0, 0, 0] = torch.tensor([0.1, 0.9, 0.1, 0.9])
    settings = {"eps": 0.3 if "L1" in kind else 0.05}  # no start takes 0.9 to 0.5
    for early_wrong in (y, (y + 1) % 5):
        with pytest.raises(ModelError, match="NaN logits, first seen in step 0, for 2 of 4 samples: 0, 2"):
            (KINDS | NO_STEPS)[kind](Spoilt(0.5), **settings)(x, early_wrong)
    with pytest.raises(ModelError, match="for 4 of 4 samples"):
        (KINDS | NO_STEPS)[kind](Spoilt(2.0))(x, y)


@pytest.mark.parametrize("kind", KINDS | NO_STEPS)
def test_a_label_that_is_no_class_is_named_whether_or_not_a_step_is_taken(kind):
    x, _ = batch()
    with pytest.raises(InputError, match=r"y holds the label 7; the model has classes 0 \.\.\. 4"):
        (KINDS | NO_STEPS)[kind](Flat())(x, torch.full((4,), 7))


@pytest.mark.parametrize("bounds", [(0.2, 0.4), (-0.485 / 0.229, (1 - 0.485) / 0.229)])
def test_images_at_the_bounds_as_their_dtype_has_them_are_taken(bounds):
    x, y = batch()
    x = (6 * x - 3).clamp(*bounds)
    attack = PGD(Flat(), eps=1.0, alpha=1.0, steps=2, bounds=bounds)
    attack(attack(x, y), y)
    with pytest.raises(InputError, match="x has values in"):
        attack(x.double().clamp(max=float(np.nextafter(np.float32(bounds[1]), np.float32(9)))) + 1e-6, y)


def test_the_report_of_an_empty_batch_is_not_that_of_the_batch_before():
    attack, (x, y) = PGD(Flat(), steps=1), batch()
    attack(x, y)
    assert attack.report is not None
    attack(x[:0], y[:0])
    assert attack.report is None
    assert PGD(Flat(), eps=torch.zeros(0))(x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_a_doubt_about_the_models_output_is_told_once_a_call():
    class Two(Flat):
        def forward(self, x):
            return super().forward(x), torch.zeros(len(x), 7)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        PGD(Two(), steps=4)(*batch())
    assert [one.category for one in told] == [ModelWarning]


def test_logits_on_another_device_are_named():
    class Elsewhere(Flat):
        def forward(self, x):
            return super().forward(x).to("meta")

    with pytest.raises(InputError, match="logits on meta; they must be on x's device, cpu"):
        PGD(Elsewhere())(*batch())


# --- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        *((PGD, {"steps": value}, "steps is .*; it must be an integer") for value in ("10", None, 2.5, True)),
        *((PGD, {"seed": value}, "seed is .*; it must be an integer") for value in ("0", None, torch.tensor(0))),
        *((PGD, {"bounds": value}, "bounds are .*; they must be a pair") for value in (None, 0.5, (0,), (0, 1, 2))),
        (PGD, {"bounds": ("0", "1")}, "the low bound is .*; it must be a number"),
        (PGD, {"bounds": torch.tensor([0.0, 1.0])}, "bounds are .*; they must be a pair"),
        *((PGD, {"chunk_size": value}, "chunk_size is .*; it must be an integer") for value in ("2", 1.5, True)),
        *(
            (PGD, {name: "no"}, f"{name} is 'no'; it must be True or False")
            for name in ("fold_batchnorm", "validate", "targeted")
        ),
        (PGD, {"random_start": 1}, "random_start is 1; it must be True or False"),
        (APGD, {"early_stop": "no"}, "early_stop is 'no'; it must be True or False"),
        *((PGD, {"eps": value}, "eps is .*; it must be a number") for value in (True, "0.1", 1j)),
        (PGD, {"eps": 10**400}, "eps is an integer that no float holds"),
        (PGD, {"alpha": torch.zeros((), device="meta")}, "alpha is a meta tensor"),
        (PGD, {"alpha": torch.zeros(3, device="meta")}, "alpha is a meta tensor"),
        (APGD, {"rho": "1"}, "rho is .*; it must be a number"),
        *((APGD, {name: 1.5}, f"{name} is 1.5; it must be an integer") for name in ("n_restarts", "eot_iter")),
        (APGD, {"n_target_classes": None}, "n_target_classes is None; it must be an integer"),
        (MIM, {"decay": "1"}, "decay is .*; it must be a number"),
        (FGSM, {"random_start": True}, "random_start is no setting of this attack"),
        (MIM, {"seed": 1}, "seed is no setting of this attack"),
    ],
)
def test_settings_of_another_type_are_named(kind, settings, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        kind(Flat(), **settings)


@pytest.mark.parametrize("given", [{"first_sample": "0"}, {"first_sample": None}, {"seed": "0"}, {"seed": 1.5}])
def test_what_a_call_is_given_is_checked_too(given):
    with pytest.raises(InputTypeError, match=r"is .*; it must be an integer"):
        PGD(Flat())(*batch(), **given)


def test_numbers_of_other_libraries_are_numbers():
    x, y = batch()
    eps = torch.tensor(0.1, requires_grad=True)
    attack = PGD(Flat(), eps=eps, alpha=np.array(0.05), steps=np.int64(2), seed=np.int32(3), validate=np.bool_(True))
    assert attack(x, y).equal(PGD(Flat(), eps=eps.item(), alpha=0.05, steps=2, seed=3)(x, y))


# --- Where an attack cannot be --------------------------------------------------------------------------------------


def test_tensors_without_values_are_named():
    x, y = batch()
    with pytest.raises(InputTypeError, match="x and y are meta or fake tensors"):
        PGD(Flat())(x.to("meta"), y.to("meta"))
    with (
        torch._subclasses.FakeTensorMode() as mode,
        pytest.raises(InputTypeError, match="x and y are meta or fake tensors"),
    ):
        PGD(Flat())(mode.from_tensor(x), mode.from_tensor(y))


def test_an_attack_under_a_transform_is_named():
    x, y = batch()
    attack = PGD(Flat())
    with pytest.raises(InputError, match=r"call it outside of torch.func"):
        torch.vmap(lambda x, y: attack(x[None], y[None])[0])(x, y)
    with pytest.raises(InputError, match=r"call it outside of torch.func"):
        torch.func.grad(lambda x: attack(x, y).sum())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(InputError, match=r"call it outside of torch.func"):
            torch.jit.trace(lambda x: attack(x, y), x)
