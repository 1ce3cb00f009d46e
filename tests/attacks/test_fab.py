"""FAB against the paper's algorithm written out image by image, beside pyautoattack's, and what it promises."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from afd.attacks import FAB, Ball, FABSettings, ModelWarning
from afd.errors import InputError, InputTypeError
from afd.ops import backend

ORDERS = {"Linf": torch.inf, "L2": 2, "L1": 1}
CASES = [("Linf", 0.05), ("L2", 0.4), ("L1", 2.0)]


def small_net(seed=0, classes=4, channels=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, classes)).double()


@pytest.fixture
def model():
    return small_net()


@pytest.fixture
def batch(model):
    x = torch.rand(9, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:4] = x[:4].round()  # at the bounds
    return x, model(x).argmax(1)


def length(u, norm):
    return u.flatten().norm(p=ORDERS[norm]).item()


# --- The paper's algorithm ------------------------------------------------------------------------------------------


def nearest_on_plane(x, w, c, norm):
    """Algorithm 1 of Croce & Hein (2020): the nearest point z in [0, 1] with <w, z> = c, by bisection."""
    gap = (w * x).sum().item() - c
    steepest_first = w.abs().argsort(descending=True)

    def moved(share):  # from x at 0 to the corner that is furthest down w at 1
        corner = torch.where(w * gap > 0, 0.0, 1.0).where(w != 0, x)
        if norm == "Linf":
            return x + (corner - x).clamp(-share, share)
        if norm == "L2":
            reach = (w.abs() / w.abs()[w != 0].min()) * share
            return x + (corner - x).clamp(-reach, reach)
        kept, left = x.clone(), share * len(x)
        for i in steepest_first[: int(left) + 1].tolist():
            kept[i] += (corner[i] - x[i]) * min(left, 1)
            left -= 1
        return kept

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        passed = ((w * moved(middle)).sum().item() - c) * gap <= 0
        low, high = (low, middle) if passed else (middle, high)
    return moved(high)


def paper_fab(model, x, label, classes, norm, steps, eps, start=None, alpha_max=0.1, eta=1.05, beta=0.9):
    """Algorithm 2 on one image, at some classes. Its iterates, and the nearest adversarial point within eps."""
    point, image = (x if start is None else start).clone(), x.flatten()
    iterates, nearest = [], None
    for _ in range(steps):
        planes = []
        for k in classes:
            leaf = point.clone().requires_grad_()
            logits = model(leaf[None])[0]
            value = logits[k] - logits[label]
            (w,) = torch.autograd.grad(value, leaf)
            dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[norm]
            planes.append((abs(value.item()) / w.flatten().norm(p=dual).item(), value.item(), w.flatten()))
        _, value, w = min(planes, key=lambda plane: plane[0])
        here = point.flatten()
        c = (w * here).sum().item() - value
        own, others = nearest_on_plane(here, w, c, norm), nearest_on_plane(image, w, c, norm)
        far, near = max(length(others - image, norm), 1e-8), max(length(own - here, norm), 1e-8)
        alpha = min(near / (near + far), alpha_max)
        mixed = (1 - alpha) * (here + eta * (own - here)) + alpha * (image + eta * (others - image))
        point = mixed.clamp(0, 1).view_as(x)
        iterates.append(point)
        if model(point[None]).argmax().item() != label:
            distance = length(point - x, norm)
            if distance <= eps and (nearest is None or distance < length(nearest - x, norm)):
                nearest = point
            point = (1 - beta) * x + beta * point
    return iterates, nearest


@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_equals_the_paper_at_every_step(model, batch, norm, eps, targets):
    x, y = batch
    steps, seen = 8, []
    handle = model.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].detach().clone()))
    got = FAB(model, norm=norm, eps=eps, steps=steps, n_target_classes=targets, early_stop=False)(x, y)
    handle.remove()
    assert len(seen) == 1 + 2 * steps * (targets or 1)  # x itself; a gradient and a judgement at each step
    broken = 0
    for i in range(len(x)):
        label = y[i].item()
        ranked = [k for k in model(x[i : i + 1])[0].argsort(descending=True).tolist() if k != label]
        found = []
        for run, classes in enumerate([ranked] if targets is None else [[k] for k in ranked[:targets]]):
            iterates, nearest = paper_fab(model, x[i], label, classes, norm, steps, eps)
            judged = seen[2 + 2 * steps * run :: 2][:steps]
            for k, (ours, theirs) in enumerate(zip(judged, iterates, strict=True)):
                torch.testing.assert_close(ours[i], theirs, atol=1e-6, rtol=0, msg=f"sample {i}, step {k}")
            found += [] if nearest is None else [nearest]
        broken += bool(found)
        want = min(found, key=lambda point: length(point - x[i], norm)) if found else x[i]
        torch.testing.assert_close(got[i], want, atol=1e-6, rtol=0)
    assert broken > 0


def test_kernels_and_reference_give_the_same_points(model, batch):
    x, y = batch[0].float(), batch[1]
    for norm, eps in CASES:
        attack = FAB(model.float(), norm=norm, eps=eps, steps=8, n_restarts=2, early_stop=False)
        with backend.use("reference"):
            want = attack(x, y)
        with backend.use("native"):
            torch.testing.assert_close(attack(x, y), want, atol=2e-5, rtol=0)


# --- Beside pyautoattack ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A classifier of images that are brighter in one of four corners, and such images."""
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(160) % 4
    x = 0.45 * torch.rand(160, 1, 8, 8, generator=generator) + 0.2
    for corner in range(4):
        down, right = corner // 2 * 4, corner % 2 * 4
        x[y == corner, :, down : down + 4, right : right + 4] += 0.12
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x.clamp(0, 1), y


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.03), ("L2", 0.2), ("L1", 0.8)])
def test_it_breaks_as_many_images_as_pyautoattacks_and_from_as_near(norm, eps, targets, trained):
    theirs = pytest.importorskip("pyautoattack.fab_pt", reason="pyautoattack is not installed").FABAttack_PT
    model, x, y = trained
    settings = {"norm": norm, "eps": eps, "n_restarts": 2}
    ours = FAB(model, steps=20, n_target_classes=targets, **settings)
    accuracy = float((model(ours(x, y)).argmax(1) == y).double().mean())
    others = []
    for seed in range(3):
        other = theirs(model, n_iter=20, targeted=targets is not None, n_target_classes=targets or 9, seed=seed,
                       device=torch.device("cpu"), **settings)  # fmt: skip
        others.append(float((model(other.perturb(x, y)).argmax(1) == y).double().mean()))
    assert 0.1 < accuracy < 0.9
    assert abs(accuracy - sum(others) / 3) <= max(others) - min(others) + 0.003
    right = model(x).argmax(1) == y
    far = {"norm": norm, "eps": 10 * eps, "n_restarts": 1}  # all of them
    near = FAB(model, steps=20, n_target_classes=targets, early_stop=False, **far)(x, y)
    other = theirs(model, n_iter=20, targeted=targets is not None, n_target_classes=1, seed=0,
                   device=torch.device("cpu"), **far)  # fmt: skip
    nearest = FAB(model, steps=20, n_target_classes=targets and 1, early_stop=False, **far)(x, y)
    distances = [Ball(norm, eps).distance(one, x)[right].mean() for one in (nearest, other.perturb(x, y), near)]
    torch.testing.assert_close(distances[0], distances[1], rtol=0.01, atol=0)
    assert distances[2] <= distances[0]


# --- What it promises -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_points_fool_the_model_within_eps_or_are_the_images(model, batch, norm, eps, targets):
    x, y = batch
    radii = torch.linspace(0, 1.5 * eps, 9, dtype=torch.float64)
    for early_stop in (True, False):
        attack = FAB(model, norm=norm, eps=radii, steps=20, n_target_classes=targets, early_stop=early_stop)
        x_adv = attack(x, y)
        fooled = model(x_adv).argmax(1) != y
        assert 0 < fooled.sum() < 9
        assert torch.equal(x_adv[~fooled], x[~fooled])
        assert (Ball(norm, eps).distance(x_adv, x) <= radii).all()
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert not x_adv.requires_grad


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_stopping_early_breaks_the_same_samples_with_points_that_are_no_nearer(model, batch, norm, eps, targets):
    x, y = batch
    for radius in (0.6 * eps, eps):
        first, nearest = (
            FAB(model, norm=norm, eps=radius, steps=15, n_target_classes=targets, n_restarts=2, early_stop=stops)(x, y)
            for stops in (True, False)
        )
        broken = model(first).argmax(1) != y
        assert torch.equal(broken, model(nearest).argmax(1) != y)
        distances = [Ball(norm, eps).distance(one, x)[broken] for one in (first, nearest)]
        assert (distances[1] <= distances[0] + 1e-9).all()


def test_what_the_model_gets_wrong_is_left_as_it_is(model, batch):
    x, y = batch
    for early_stop in (True, False):
        assert torch.equal(FAB(model, eps=0.2, steps=3, early_stop=early_stop)(x, (y + 1) % 4), x)
    mixed = torch.where(torch.arange(9) < 4, (y + 1) % 4, y)
    assert torch.equal(FAB(model, eps=0.1, steps=9)(x, mixed)[:4], x[:4])


def test_no_radius_and_no_steps_find_nothing(model, batch):
    x, y = batch
    assert torch.equal(FAB(model, eps=0.0, steps=5)(x, y), x)
    assert torch.equal(FAB(model, eps=0.2, steps=0, n_target_classes=3)(x, y), x)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_any_split_of_the_batch_gives_the_same_result(batch, norm, eps, targets, early_stop):
    x, _ = batch
    weight = torch.randn(36, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    class RowByRow(nn.Module):  # rounds each sample alike, whatever the batch around it
        def forward(self, x):
            return (x.flatten(1)[:, :, None] * weight).sum(1).tanh()

    y = RowByRow()(x).argmax(1)
    settings = {"norm": norm, "eps": 2 * eps, "steps": 8, "n_restarts": 2, "n_target_classes": targets}
    attack = FAB(RowByRow(), early_stop=early_stop, **settings)
    whole = attack(x, y)
    assert torch.equal(torch.cat([attack(x[:4], y[:4]), attack(x[4:], y[4:], first_sample=4)]), whole)
    assert torch.equal(FAB(RowByRow(), early_stop=early_stop, chunk_size=2, **settings)(x, y), whole)


def test_restarts_begin_within_half_of_the_radius_and_lose_no_sample(model, batch):
    x, y = batch
    points = []
    handle = model.register_forward_hook(lambda _module, inputs, _output: points.append(inputs[0].detach().clone()))
    FAB(model, eps=0.04, steps=1, n_restarts=3, early_stop=False)(x, y)
    handle.remove()
    clean, first, _, second, _, third, _ = points
    assert torch.equal(clean, first)
    assert not torch.equal(second, third)
    for start in (second, third):
        assert not torch.equal(start, x)
        assert ((start - x).abs() <= 0.02 + 1e-12).all()
    one, three = (model(FAB(model, eps=0.04, steps=3, n_restarts=n)(x, y)).argmax(1) != y for n in (1, 3))
    assert (three | ~one).all()


def test_a_start_of_the_callers(model, batch):
    x, y = batch
    points = []
    handle = model.register_forward_hook(lambda _module, inputs, _output: points.append(inputs[0].detach().clone()))
    start = (x + 0.01).clamp(0, 1)
    FAB(model, steps=1, n_target_classes=2, early_stop=False)(x, y, start=start)
    handle.remove()
    assert torch.equal(points[1], start)
    assert torch.equal(points[3], start)


@pytest.mark.parametrize("targets", [None, 1])
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(batch, classes, targets):
    x, model = batch[0], small_net(classes=classes)
    y = model(x).argmax(1)
    assert (model(FAB(model, eps=0.3, steps=20, n_target_classes=targets)(x, y)).argmax(1) != y).any()


def test_models_that_it_cannot_aim_at_are_named(batch):
    x, y = batch
    with pytest.raises(InputError, match="a classifier has a logit for each of at least 2 classes"):
        FAB(small_net(classes=1), steps=1)(x, 0 * y)
    with pytest.raises(InputError, match="the model has 3, so n_target_classes is at most 2"):
        FAB(small_net(classes=3), steps=1, n_target_classes=3)(x, y % 3)
    with pytest.raises(InputError, match="y holds the label 4; the model has classes 0"):
        FAB(small_net(), steps=1)(x, torch.full_like(y, 4))
    with pytest.raises((InputError, InputTypeError), match="y is None"):
        FAB(small_net(), steps=1)(x)


@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize("early_stop", [True, False])
def test_without_gradients_it_stays_and_says_so(batch, targets, early_stop):
    class Steps(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)) * 0 + k for k in (3.0, 1.0, 0.0)], 1)

    x = batch[0]
    attack = FAB(Steps(), eps=0.2, steps=4, n_target_classes=targets, n_restarts=2, early_stop=early_stop)
    with pytest.warns(ModelWarning, match="the gradient of the loss was exactly zero"):
        assert torch.equal(attack(x, torch.zeros(9, dtype=torch.int64)), x)
    assert attack.report.blind.all()
    assert (attack.report.evaluations == 8 * (targets or 1)).all()


@pytest.mark.parametrize("targets", [None, 1])
@pytest.mark.parametrize("early_stop", [True, False])
def test_gradients_that_are_not_finite_move_nothing(targets, early_stop):
    class Root(nn.Module):  # of infinite slope at 0, of NaN behind it
        def forward(self, x):
            total = x.flatten(1).sum(1)
            return torch.stack([1 + 0 * total, total - 1 + x[:, 0].sqrt() * x[:, 0].sign()], 1)

    x = torch.tensor([[0.0, 0.6, 0.5], [0.25, 0.3, 0.4]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ModelWarning)
        attack = FAB(Root(), eps=0.9, steps=20, n_target_classes=targets, early_stop=early_stop)
        found = attack(x, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(found[0], x[0])
    assert Root()(found[1:]).argmax().item() == 1
    assert attack.report.nan_gradients.tolist()[1] == 0 < attack.report.nan_gradients.tolist()[0]


@pytest.mark.parametrize("targets", [None, 2])
def test_in_low_precision_every_success_is_one_of_the_model_as_written(trained, targets):
    model, x, y = trained
    for settings in ({"precision": "bf16"}, {"precision": "bf16", "early_stop": False}):
        x_adv = FAB(model, eps=0.05, steps=20, n_target_classes=targets, **settings)(x, y)
        moved = (x_adv != x).flatten(1).any(1)
        assert moved.double().mean() > 0.5
        assert (model(x_adv).argmax(1) != y)[moved].all()


@pytest.mark.parametrize("targets", [None, 2])
def test_layers_that_are_joined_confirm_by_the_model_as_written(targets):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    model(torch.rand(64, 3, 8, 8))
    x = torch.rand(24, 3, 8, 8)
    y = model.eval()(x).argmax(1)
    for early_stop in (True, False):
        joined, plain = (
            FAB(model, eps=0.05, steps=20, n_target_classes=targets, early_stop=early_stop, fold_batchnorm=folds)(x, y)
            for folds in (True, False)
        )
        torch.testing.assert_close(joined, plain, atol=1e-3, rtol=0)
        moved = (joined != x).flatten(1).any(1)
        assert (model(joined).argmax(1) != y).equal(moved)
        assert moved.any()


def test_same_seed_same_result_and_nothing_else_is_touched(model, batch):
    x, y = batch
    model.train()
    kept, drawn = x.clone(), torch.get_rng_state()
    attack = FAB.partial(eps=0.03, steps=3, n_restarts=3, early_stop=False)(model)
    assert torch.equal(attack(x, y), attack.perturb(x, y))
    assert torch.equal(
        attack(x, y, seed=3), FAB(model, eps=0.03, steps=3, n_restarts=3, early_stop=False, seed=3)(x, y)
    )
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert FAB(model)(x[:0], y[:0]).shape == (0, 1, 6, 6)


@pytest.mark.parametrize("shape", [(5, 30), (5, 1, 7, 5), (5, 2, 3, 3), (5, 4, 2, 2, 2)])
@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_images_of_any_form_are_attacked(shape, norm, eps):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    x_adv = FAB(model, norm=norm, eps=3 * eps, steps=12)(x, model(x).argmax(1))
    assert x_adv.shape == x.shape
    assert not torch.equal(x_adv, x)


def test_other_bounds_are_the_same_attack_in_other_units(model, batch):
    x, y = batch
    shifted = nn.Sequential(Affine(), model)
    want = FAB(model, eps=0.04, steps=10)(x, y)
    got = FAB(shifted, eps=0.08, steps=10, bounds=(-1.0, 1.0))(2 * x - 1, y)
    torch.testing.assert_close((got + 1) / 2, want, atol=1e-6, rtol=0)


class Affine(nn.Module):
    """Images in [-1, 1] as those in [0, 1]."""

    def forward(self, x):
        return (x + 1) / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "L7"}, "norm is 'L7'; allowed are Linf"),
        ({"targeted": True}, "targeted is True, and FAB takes no class to reach"),
        ({"loss": "ce"}, "loss is 'ce'; allowed are margin"),
        ({"steps": -1}, "steps is -1; it must be an integer >= 0"),
        ({"n_restarts": 0}, "n_restarts is 0; it must be an integer >= 1"),
        ({"n_target_classes": 0}, "n_target_classes is 0; it must be an integer >= 1"),
        ({"alpha_max": 1.5}, r"alpha_max is 1.5; it must be in \[0, 1\]"),
        ({"eta": 0.9}, "eta is 0.9; it must be a finite number >= 1"),
        ({"beta": -0.1}, "beta is -0.1; it must be a finite number >= 0"),
        ({"beta": 1.1}, r"beta is 1.1; it must be in \[0, 1\]"),
        ({"seed": -1}, "seed is -1"),
        ({"early_stop": 1}, "early_stop is 1; it must be True or False"),
        ({"n_target_classes": 1.5}, "n_target_classes is 1.5; it must be an integer"),
        ({"restarts": 3}, "restarts is no setting of this attack"),
    ],
)
def test_wrong_settings_are_named(model, settings, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        FAB(model, **settings)


def test_its_settings_are_its_constructors():
    settings = FABSettings(norm="L2", eps=0.5, steps=7, n_target_classes=3)
    attack = FAB(small_net(), **settings)
    assert (attack.norm, attack.eps, attack.steps, attack.n_target_classes) == ("L2", 0.5, 7, 3)
    assert settings.build(small_net()).early_stop
