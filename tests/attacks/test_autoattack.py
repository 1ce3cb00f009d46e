"""AutoAttack: a cascade whose parts see only what is left, reported, and the same for any split of a batch."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from afd.attacks import APGD, FAB, AutoAttack, Ball, ModelWarning, Square
from afd.attacks.autoattack import NORMS, VERSIONS, fitted, parts_of
from afd.errors import InputError, InputTypeError, ModelError
from afd.metrics import accuracy, predict

RADII = {"Linf": 0.08, "L2": 0.6, "L1": 2.5}
FEW = {
    "square": {"queries": 10},
    "fab-t": {"steps": 1, "n_target_classes": 1},
    "apgd-ce": {"steps": 1},
    "apgd-t": {"steps": 8, "n_target_classes": 3},
}


class RowByRow(nn.Module):
    """Rounds each sample alike, whatever the batch around it."""

    def __init__(self, classes=5, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("first", torch.randn(108, 16, generator=generator) / 10)
        self.register_buffer("second", torch.randn(16, classes, generator=generator))

    def forward(self, x):
        hidden = (x.flatten(1)[:, :, None] * self.first).sum(1).tanh()
        return (hidden[:, :, None] * self.second).sum(1)


@pytest.fixture
def model():
    return RowByRow().eval()


@pytest.fixture
def batch(model):
    x = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    return x, torch.where(torch.arange(40) % 10 == 3, (y + 1) % 5, y)  # four are wrong to begin with


# --- The cascade ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), RADII.items())
def test_each_part_attacks_what_is_left_and_the_report_says_so(model, batch, norm, eps):
    x, y = batch
    attack = AutoAttack(model, norm=norm, eps=eps, attacks=FEW)
    x_adv, report = attack(x, y), attack.report
    assert torch.equal(report.correct, torch.arange(40) % 10 != 3)
    left = report.correct
    assert [part.name for part in report.parts] == list(FEW)
    for part in report.parts:
        assert torch.equal(part.given, left)
        assert (part.broken & ~part.given).sum() == 0
        assert part.seconds > 0
        left = left & ~part.broken
    assert torch.equal(report.robust, left)
    assert 0 < report.broken.sum() < 36
    assert torch.equal(predict(model, x_adv).classes == y, left)
    assert torch.equal(x_adv[~report.broken], x[~report.broken])
    ball = Ball(norm, eps)
    assert ball.holds(ball.distance(x_adv, x)).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize(("norm", "eps"), RADII.items())
def test_any_split_of_the_batch_breaks_the_same_images(model, batch, norm, eps):
    x, y = batch
    attack = AutoAttack(model, norm=norm, eps=eps, attacks=FEW, seed=7)
    attack(x, y, first_sample=50)
    broken = [part.broken for part in attack.report.parts]
    split = [[] for _ in broken]
    for first, end in ((0, 5), (5, 6), (6, 29), (29, 40)):
        attack(x[first:end], y[first:end], first_sample=50 + first)
        for masks, part in zip(split, attack.report.parts, strict=True):
            masks.append(part.broken)
    assert all(torch.equal(torch.cat(masks), want) for masks, want in zip(split, broken, strict=True))
    in_chunks = AutoAttack(model, norm=norm, eps=eps, attacks=FEW, seed=7, chunk_size=7)
    in_chunks(x, y, first_sample=50)
    assert all(torch.equal(part.broken, want) for part, want in zip(in_chunks.report.parts, broken, strict=True))


def test_a_part_finds_in_the_cascade_what_it_finds_alone(model, batch):
    x, y = batch
    attack = AutoAttack(model, norm="L2", eps=0.6, attacks=FEW, seed=3)
    attack(x, y)
    alone = {
        "apgd-ce": APGD(model, norm="L2", eps=0.6, steps=1, early_stop=True, seed=3),
        "apgd-t": APGD(
            model, norm="L2", eps=0.6, steps=8, loss="dlr-targeted", n_target_classes=3, early_stop=True, seed=3
        ),
        "square": Square(model, norm="L2", eps=0.6, queries=10, seed=3),
        "fab-t": FAB(model, norm="L2", eps=0.6, steps=1, n_target_classes=1, seed=3),
    }
    for part in attack.report.parts:
        fooled = predict(model, alone[part.name](x, y)).classes != y
        assert torch.equal(fooled & part.given, part.broken)
    assert all(part.broken.any() for part in attack.report.parts)


def test_each_image_may_have_a_radius_of_its_own(model, batch):
    x, y = batch
    eps = torch.tensor([0.0, 0.05, 0.12]).repeat(14)[:40]
    attack = AutoAttack(model, eps=eps, attacks=FEW)
    x_adv, broken = attack(x, y), attack.report.broken
    assert torch.equal(x_adv[eps == 0], x[eps == 0])
    for radius in (0.05, 0.12):
        alone = AutoAttack(model, eps=radius, attacks=FEW)
        alone(x, y)
        rows = eps == torch.tensor(radius)
        assert torch.equal(alone.report.broken[rows], broken[rows])
    with pytest.raises(InputError, match=r"eps has shape \[40\], but x holds 7 images"):
        attack(x[:7], y[:7])
    live = AutoAttack(model, eps=torch.tensor(0.12), attacks=FEW)
    assert torch.equal(live(x, y), AutoAttack(model, eps=float(torch.tensor(0.12)), attacks=FEW)(x, y))


def test_what_is_wrong_when_clean_is_not_attacked(model, batch):
    x, _ = batch
    attack = AutoAttack(model, eps=0.1, attacks=FEW)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    x_adv = attack(x, (model(x).argmax(1) + 1) % 5)
    handle.remove()
    assert torch.equal(x_adv, x)
    assert len(calls) == 2  # here, and to judge the images themselves
    assert not any(part.given.any() or part.broken.any() for part in attack.report.parts)
    assert attack.report.robust_accuracy == 0


def test_no_images_are_nothing_to_attack(model, batch):
    x, y = batch
    attack = AutoAttack(model)
    assert attack(x[:0], y[:0]).shape == (0, 3, 6, 6)
    assert attack.report.correct.shape == (0,)
    assert str(attack.report).splitlines()[-1].split() == ["clean", "0", "0", "-"]


def test_the_report_prints_a_table(model, batch):
    attack = AutoAttack(model, eps=0.08, attacks=FEW)
    attack(*batch)
    report = attack.report
    header, clean, *rows = str(report).splitlines()
    assert header.split() == ["given", "broken", "accuracy", "seconds"]
    assert clean.split() == ["clean", "40", "4", "90.00%"]
    assert [row.split()[0] for row in rows] == list(FEW)
    assert rows[-1].split()[3] == f"{report.robust_accuracy:.2%}"
    assert report.accuracies["clean"] == 0.9
    assert report.accuracies["apgd-t"] == report.robust_accuracy == float(report.robust.double().mean())
    assert sorted(report.accuracies.values(), reverse=True) == list(report.accuracies.values())


def test_it_is_an_attack_like_others(model, batch):
    x, y = batch
    attack = AutoAttack.partial(eps=0.08, attacks=FEW)(model)
    want = attack(x, y)
    assert torch.equal(attack.perturb(x, y), want)
    with torch.inference_mode():
        assert torch.equal(attack(x.clone(), y.clone()), want)
    loader = [(x[:23], y[:23]), (x[23:], y[23:])]
    assert accuracy(model, loader, attack) == pytest.approx((predict(model, want).classes == y).double().mean())
    assert not want.requires_grad
    assert not torch.equal(attack(x, y, seed=1), want)


@pytest.mark.parametrize("version", ["standard", "plus"])
def test_all_parts_of_a_version(model, batch, version):
    x, y = batch
    told = {name: {"steps": 2} for name in parts_of(version, "Linf")} | {"square": {"queries": 5}}
    attack = AutoAttack(model, eps=0.02, version=version, attacks=told, n_target_classes=2)
    x_adv, report = attack(x, y), attack.report
    assert [part.name for part in report.parts] == list(told)
    assert torch.equal(predict(model, x_adv).classes == y, report.robust)
    assert report.parts[-1].given.any()


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.03), ("L2", 0.3), ("L1", 1.2)])
def test_it_leaves_as_many_images_as_pyautoattack(model, batch, norm, eps):
    pyautoattack = pytest.importorskip("pyautoattack")
    x, y = batch
    told = {"apgd-ce": {"steps": 20}, "apgd-t": {"steps": 20}, "fab-t": {"steps": 20}, "square": {"queries": 100}}
    attack = AutoAttack(model, norm=norm, eps=eps, attacks=told, n_target_classes=4)
    attack(x, y)
    other = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=0)
    other.apgd.n_iter = other.apgd_targeted.n_iter = other.fab.n_iter = 20
    other.apgd_targeted.n_target_classes = other.fab.n_target_classes = 4
    other.square.n_queries = 100
    with torch.random.fork_rng():
        x_adv, _ = other.run_standard_evaluation(x, y, batch_size=40)
    left = int((predict(model, x_adv).classes == y).sum())
    assert abs(int(attack.report.robust.sum()) - left) <= 1
    assert 2 <= left <= 34


# --- Parts ----------------------------------------------------------------------------------------------------------


def test_the_versions_are_autoattacks():
    """As Croce & Hein's implementation sets them."""
    standard, plus, rand = (parts_of(version, "Linf") for version in VERSIONS)
    assert list(standard) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert list(rand) == ["apgd-ce", "apgd-dlr"]
    for parts in (standard, plus):
        assert all(told["steps"] == 100 for name, told in parts.items() if name != "square")
        assert parts["square"] == {"queries": 5000}
        assert parts["apgd-t"]["n_target_classes"] == parts["fab-t"]["n_target_classes"] == 9
    assert standard["apgd-ce"]["n_restarts"] == 1
    assert [plus[name]["n_restarts"] for name in ("apgd-ce", "apgd-dlr", "fab")] == [5, 5, 5]
    assert plus["fab"]["n_target_classes"] is None
    assert rand["apgd-ce"] == rand["apgd-dlr"] == {"steps": 100, "eot_iter": 20}
    sparse = parts_of("standard", "L1")
    assert sparse["apgd-ce"]["n_restarts"] == sparse["apgd-t"]["n_target_classes"] == 5
    assert sparse["fab-t"]["n_target_classes"] == 9
    assert parts_of("standard", "L2") == standard


def test_some_parts_in_another_order_with_other_settings(model, batch):
    x, y = batch
    attack = AutoAttack(model, eps=0.05, attacks={"square": {"queries": 10}, "apgd-ce": {}}, n_target_classes=2)
    assert attack.told == {"square": {"queries": 10}, "apgd-ce": parts_of("standard", "Linf")["apgd-ce"]}
    attack(x, y)
    assert [part.name for part in attack.report.parts] == ["square", "apgd-ce"]
    told = AutoAttack(model, attacks=["apgd-t"], n_target_classes=2).told
    assert told["apgd-t"]["n_target_classes"] == 2


def test_surrogates_come_first_and_are_judged_on_the_model(model, batch):
    x, y = batch
    twin, other = copy.deepcopy(model), RowByRow(seed=9).eval().train()
    attack = AutoAttack(model, eps=0.08, attacks=["square"], surrogates=[other, twin])
    x_adv, report = attack(x, y), attack.report
    assert [part.name for part in report.parts] == ["surrogate-1", "surrogate-2", "square"]
    assert torch.equal(predict(model, x_adv).classes == y, report.robust)
    first, second, _ = report.parts
    assert second.broken.sum() > first.broken.sum()  # its own weights transfer best
    white = APGD(model, eps=0.08, steps=100)(x, y)
    assert torch.equal(white[second.broken], x_adv[second.broken])
    assert other.training
    assert not twin.training
    with pytest.raises(InputError, match=r"surrogates\[1\] is the model itself"):
        AutoAttack(model, surrogates=[other, model])


def test_models_that_draw_are_averaged():
    class Noisy(RowByRow):
        evaluations = 0

        def forward(self, x):
            Noisy.evaluations += torch.is_grad_enabled()
            return super().forward(x + 0.05 * torch.randn_like(x))

    model = Noisy().eval()
    x = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y = RowByRow()(x).argmax(1)
    torch.manual_seed(0)
    attack = AutoAttack(model, eps=0.1, version="rand", attacks={"apgd-ce": {"steps": 4}, "apgd-dlr": {"steps": 4}})
    attack(x, y)
    runs = sum(bool(part.given.any()) for part in attack.report.parts)
    assert Noisy.evaluations == runs * 5 * 20
    assert attack.report.broken.any()


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_a_success_counts_in_float32_alone(batch, precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval()
    x = batch[0]
    y = predict(model, x).classes
    attack = AutoAttack(model, eps=0.03, attacks=FEW, precision=precision)
    x_adv = attack(x, y)
    assert 0 < attack.report.broken.sum() < 40
    assert torch.equal(predict(model, x_adv).classes != y, attack.report.broken)


# --- The model ------------------------------------------------------------------------------------------------------


def test_the_model_comes_back_as_it_was(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    AutoAttack(model, eps=0.05, attacks=FEW)(*batch)
    with pytest.raises(InputError, match="y holds the label 9; the model has classes 0"):
        AutoAttack(model, eps=0.05, attacks=FEW)(batch[0], torch.full_like(batch[1], 9))
    assert all(module.training for module in model.modules())
    assert [one.requires_grad for one in model.parameters()] == [False] + 5 * [True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_a_part_warns_of_is_said_with_its_name(batch):
    class Rounded(RowByRow):
        def forward(self, x):
            logits = super().forward(x)
            return logits.round() + 0 * logits

    x, y = batch
    model = Rounded().eval()
    attack = AutoAttack(model, eps=0.08, attacks=FEW)
    with pytest.warns(ModelWarning) as said:
        attack(x, y)
    assert len(said) == 3
    for one, name in zip(said, ("fab-t", "apgd-ce", "apgd-t"), strict=True):
        assert re.match(rf"{name}, of the \d+ images that it was given: .*could not aim", str(one.message))
    square, *_, gradients = attack.report.parts
    assert torch.equal(gradients.blind, gradients.given)
    assert square.given.any()
    assert not square.blind.any()  # it needs no gradient


def test_nan_is_no_class(model, batch):
    class Broken(RowByRow):
        def forward(self, x):
            return super().forward(x) * torch.where(x[:, 0, 0, 0] > 0.5, torch.nan, 1.0)[:, None]

    with pytest.raises(ModelError, match=r"the model returned NaN logits for \d+ of 40 images"):
        AutoAttack(Broken().eval(), attacks=FEW)(*batch)


class NaNOffTheImages(nn.Module):
    """NaN for whatever is not an image of the batch itself."""

    def __init__(self, inner, x):
        super().__init__()
        self.inner, self.x = inner, x

    def forward(self, x):
        off = (x[:, None] - self.x[None]).flatten(2).abs().amax(2).amin(1) > 0
        return torch.where(off[:, None], torch.nan, self.inner(x))


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", ["apgd-ce", "fab-t", "square"])
def test_nan_under_attack_is_an_error_whatever_the_label(model, batch, name, label):
    x = batch[0][model(batch[0]).argmax(1) == label]
    with pytest.raises(ModelError, match=rf"NaN logits, first seen in step \d+, for {len(x)} of {len(x)} samples"):
        AutoAttack(NaNOffTheImages(model, x), eps=0.08, attacks={name: FEW[name]})(x, torch.full((len(x),), label))


@pytest.mark.parametrize("label", [0, 1])
def test_nan_at_a_surrogates_points_counts_as_broken_and_is_told(model, batch, label):
    x = batch[0][model(batch[0]).argmax(1) == label]
    attack = AutoAttack(NaNOffTheImages(model, x), eps=0.08, attacks=["square"], surrogates=[RowByRow(seed=3).eval()])
    with pytest.warns(ModelWarning, match=f"{len(x)} of {len(x)} images count as broken: NaN logits at surrogate-1's"):
        attack(x, torch.full((len(x),), label))
    assert attack.report.parts[0].broken.all()


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"norm": "L7"}, InputError, "norm is 'L7'; allowed are Linf, L2, L1"),
        ({"version": "custom"}, InputError, "version is 'custom'; allowed are standard, plus, rand"),
        ({"eps": -1.0}, InputError, "eps is -1.0"),
        ({"attacks": ["pgd"]}, InputError, "a part of version='standard' is 'pgd'; allowed are apgd-ce, apgd-t"),
        ({"attacks": {"square": {"query": 3}}}, InputTypeError, "query is no setting of this attack"),
        ({"attacks": {"square": {"queries": -3}}}, InputError, "queries is -3"),
        ({"attacks": []}, InputError, r"attacks is \[\]; it must be a list of parts, one at least"),
        ({"attacks": {}}, InputError, "attacks is {}; it must be a list of parts, one at least"),
        ({"attacks": "square"}, InputError, "attacks is 'square'; it must be a list of parts"),
        (
            {"attacks": ["square", "square"]},
            InputError,
            r"attacks is \['square', 'square'\]; it must name each part once",
        ),
        (
            {"attacks": {"square": {"eps": 1.0}}},
            InputError,
            "attacks sets eps of square; all parts have AutoAttack's own",
        ),
        ({"attacks": {"square": {"seed": 1, "norm": "L2"}}}, InputError, "attacks sets norm, seed of square"),
        ({"surrogates": nn.Identity()}, InputTypeError, "surrogates is a Identity; it must be a list of models"),
        ({"surrogates": None}, InputTypeError, "surrogates is a NoneType; it must be a list of models"),
        ({"n_target_classes": 0}, InputError, "n_target_classes is 0; it must be an integer >= 1"),
        ({"surrogates": [3]}, InputTypeError, r"surrogates\[0\] is a int; it must be a torch.nn.Module"),
        ({"precision": "fp8"}, InputError, "precision is 'fp8'"),
        ({"chunk_size": 0}, InputError, "chunk_size is 0"),
        ({"seed": -1}, InputError, "seed is -1"),
    ],
)
def test_bad_settings_are_named_before_anything_is_attacked(model, settings, kind, message):
    with pytest.raises(kind, match=message):
        AutoAttack(model, **settings)


def test_bad_batches_are_named(model, batch):
    x, y = batch
    attack = AutoAttack(model, attacks=FEW)
    with pytest.raises(InputTypeError, match=r"y is torch.int32"):
        attack(x, y.int())
    with pytest.raises(InputError, match="x has values in"):
        attack(x + 1, y)
    with pytest.raises(InputTypeError, match="model is a function"):
        AutoAttack(lambda x: x)
    with pytest.raises(InputError, match="first_sample is -1"):
        attack(x, y, first_sample=-1)
    attack.record_trajectory = True
    with pytest.raises(InputError, match="record_trajectory is True; AutoAttack keeps none"):
        attack(x, y)


# --- Where images lie in the data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_starts_by_the_place_of_each_image(norm):
    x = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    eps = torch.linspace(0.1, 0.9, 9)
    places = torch.tensor([0, 2, 3, 4, 7, 8, 20, 21, 5])
    whole = Ball(norm, eps).start(x, seed=5, first_sample=places)
    for row, place in enumerate(places.tolist()):
        alone = Ball(norm, eps[row : row + 1]).start(x[row : row + 1], seed=5, first_sample=place)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("norm", NORMS)
def test_images_out_of_the_middle_are_attacked_as_in_the_whole(model, batch, norm):
    x, y = batch
    kept = torch.tensor([1, 2, 5, 17, 18, 19, 39])
    for attack in (
        FAB(model, norm=norm, eps=RADII[norm], steps=3, n_restarts=2, early_stop=False),
        APGD(model, norm=norm, eps=RADII[norm], steps=5),
        Square(model, norm=norm, eps=RADII[norm], queries=9),
    ):
        whole = attack(x, y, first_sample=100)
        assert torch.equal(attack(x[kept], y[kept], first_sample=100 + kept), whole[kept])
        with pytest.raises(InputError, match=r"first_sample is torch.int64 of shape \[3\]"):
            attack(x, y, first_sample=kept[:3])


def test_few_classes_change_parts_as_told():
    settings = {"steps": 7, "n_target_classes": 9}
    assert fitted("apgd-t", settings, 10) == (settings, "")
    assert fitted("apgd-t", settings, 4) == (
        {"steps": 7, "n_target_classes": 3},
        "apgd-t aims at 3 classes instead of 9",
    )
    for classes in (2, 3):
        told, note = fitted("apgd-t", settings, classes)
        assert told == {"steps": 7, "loss": "margin"}
        assert "apgd-t ascends the margin" in note
        assert fitted("fab-t", settings, classes)[0] == {"steps": 7, "n_target_classes": classes - 1}
    assert fitted("apgd-dlr", {"steps": 7}, 3) == ({"steps": 7}, "")
    assert fitted("apgd-dlr", {"steps": 7}, 2)[0] == {"steps": 7, "loss": "margin"}


def test_no_warning_where_nothing_is_odd(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoAttack(model, eps=0.05, attacks=FEW)(*batch)
