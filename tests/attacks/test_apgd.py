"""APGD against the paper's algorithm written out sample by sample, and what it promises about samples and restarts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd import ops
from afd.attacks import APGD, PGD
from afd.attacks.apgd import checkpoint_intervals
from afd.errors import InputError, InputTypeError
from afd.ops import backend


def small_net(seed=0, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, classes)).double()


@pytest.fixture
def model():
    return small_net()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(9, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(9) % 4


# --- The paper's algorithm ------------------------------------------------------------------------------------------


def dlr(logits, label):
    ordered = sorted(logits, reverse=True)
    return -(logits[label] - max(z for k, z in enumerate(logits) if k != label)) / (ordered[0] - ordered[2] + 1e-12)


def per_sample_loss(name, logits, label):
    if name == "ce":
        return torch.logsumexp(logits, 0) - logits[label]
    if name == "dlr":
        return dlr(list(logits), label)
    return max(z for k, z in enumerate(logits) if k != label) - logits[label]


def paper_apgd(model, x, label, start, *, eps, steps, rho=0.75, loss="ce", targeted=False, norm="Linf"):
    """Algorithm 1 of Croce & Hein (2020) on one image. Returns its iterates, best point, and last fooling point."""

    def f(point):
        point = point.clone().requires_grad_()
        logits = model(point[None])[0]
        value = per_sample_loss(loss, logits, label) * (-1 if targeted else 1)
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient, (logits.argmax().item() == label) == targeted

    def project(point):
        if norm == "L2":
            delta = point - x
            return (x + delta * min(1.0, eps / delta.norm().item())).clamp(0, 1) if delta.any() else x
        return torch.min(torch.max(point, x - eps), x + eps).clamp(0, 1)

    def direction(gradient):
        return gradient / gradient.norm() if norm == "L2" else gradient.sign()

    # W: the share of steps before checkpoint j, as in the implementation rounded interval by interval
    checkpoints, interval = [0], max(int(0.22 * steps), 1)
    while checkpoints[-1] + interval <= steps:
        checkpoints.append(checkpoints[-1] + interval)
        interval = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))

    values, iterates, previous, current = [], [start], start, start
    value, gradient, fooled = f(start)
    values.append(value)
    best, best_value, best_gradient, fooling = start, value, gradient, start if fooled else None
    step, halved_before, best_value_before = 2 * eps, True, value
    for k in range(1, steps + 1):
        z = project(current + step * direction(gradient))
        a = 0.75 if k > 1 else 1.0
        following = project(current + a * (z - current) + (1 - a) * (current - previous))
        previous, current = current, following
        iterates.append(current)
        value, gradient, fooled = f(current)
        values.append(value)
        if fooled:
            fooling = current
        if value > best_value:
            best, best_value, best_gradient = current, value, gradient
        if k in checkpoints[1:]:
            since = checkpoints[checkpoints.index(k) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(since, k))
            condition_1 = rises <= rho * (k - since)
            condition_2 = not halved_before and best_value_before == best_value
            halved_before, best_value_before = condition_1 or condition_2, best_value
            if halved_before:
                step, current, gradient = step / 2, best, best_gradient
    return iterates, best, fooling


@pytest.mark.parametrize(
    ("steps", "loss", "targeted"),
    [(100, "ce", False), (40, "dlr", False), (40, "margin", False), (40, "ce", True), (40, "margin", True)]
    + [(steps, "ce", False) for steps in (0, 1, 2, 7)],
)
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5)])
def test_equals_the_paper_at_every_iteration(model, batch, steps, loss, targeted, norm, eps):
    x, y = batch
    seen = []
    handle = model.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].detach().clone()))
    attack = APGD(model, norm=norm, eps=eps, steps=steps, loss=loss, targeted=targeted, seed=5)
    got = attack(x, y)
    handle.remove()
    assert len(seen) == steps + 2  # x itself, the start, each iterate
    start = ops.random_start(x, norm=norm, eps=eps, seed=5)
    settings = {"norm": norm, "eps": eps, "steps": steps, "loss": loss, "targeted": targeted}
    with torch.no_grad():
        wrong = (model(x).argmax(1) == y) == targeted
    for i in range(len(x)):
        iterates, best, fooling = paper_apgd(model, x[i], y[i].item(), start[i], **settings)
        for k, point in enumerate(iterates):
            torch.testing.assert_close(seen[k + 1][i], point, atol=1e-6, rtol=0, msg=f"sample {i}, iteration {k}")
        want = fooling if fooling is not None else x[i] if wrong[i] else best
        torch.testing.assert_close(got[i], want, atol=1e-6, rtol=0)


def test_kernels_and_reference_give_the_same_points(model, batch):
    x, y = batch[0].float(), batch[1]
    attack = APGD(model.float(), eps=0.1, steps=50, n_restarts=2)
    with backend.use("reference"):
        want = attack(x, y)
    with backend.use("native"):
        assert torch.equal(attack(x, y), want)


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def test_checkpoints_of_a_hundred_steps():
    marks = checkpoint_intervals(100)
    assert [i for i, interval in enumerate(marks, 1) if interval] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert [interval for interval in marks if interval] == [22, 19, 16, 13, 10, 7, 6, 6]


@pytest.mark.parametrize(("steps", "marks"), [(0, []), (1, [1]), (5, [1] * 5), (10, [0, 2, 1, 1, 1, 1, 1, 1, 1, 1])])
def test_checkpoints_of_few_steps(steps, marks):
    assert checkpoint_intervals(steps) == marks


# --- What it promises -----------------------------------------------------------------------------------------------


def test_stays_in_ball_and_bounds(model, batch):
    x, y = batch
    eps = torch.linspace(0, 0.3, 9, dtype=torch.float64)
    x_adv = APGD(model, eps=eps, steps=20)(x, y)
    assert ((x_adv - x).abs().flatten(1).amax(1) <= eps + 1e-12).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(x_adv[0], x[0])
    assert not x_adv.requires_grad


def losses_at(model, x, y):
    with torch.no_grad():
        logits = model(x)
    return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1) != y


def test_finds_what_pgd_finds_and_more(model, batch):
    x, _ = batch
    y = model(x).argmax(1)
    _, by_apgd = losses_at(model, APGD(model, eps=0.06, steps=30)(x, y), y)
    _, by_pgd = losses_at(model, PGD(model, eps=0.06, alpha=0.015, steps=30)(x, y), y)
    assert by_apgd.sum() >= by_pgd.sum() > 0


def test_a_sample_that_is_wrong_to_begin_with_stays_wrong(model, batch):
    x, _ = batch
    y = (model(x).argmax(1) + 1) % 4
    for eps in (0.0, 1e-6, 0.2):
        assert losses_at(model, APGD(model, eps=eps, steps=3)(x, y), y)[1].all()


def test_more_restarts_never_lose_a_sample_and_keep_the_first_that_fooled(model, batch):
    x, _ = batch
    y = model(x).argmax(1)
    one, three = (APGD(model, eps=0.04, steps=4, n_restarts=n)(x, y) for n in (1, 3))
    (loss_one, fooled_one), (loss_three, fooled_three) = losses_at(model, one, y), losses_at(model, three, y)
    assert 0 < fooled_one.sum() < 9
    assert torch.equal(one[fooled_one], three[fooled_one])
    assert (fooled_three | ~fooled_one).all()
    unbroken = ~fooled_three
    assert (loss_three[unbroken] >= loss_one[unbroken]).all()


def test_restarts_start_elsewhere(model, batch):
    starts = []
    model.register_forward_hook(lambda _module, inputs, _output: starts.append(inputs[0].detach().clone()))
    APGD(model, eps=0.1, steps=0, n_restarts=2, seed=2**63 - 1)(*batch)
    assert not torch.equal(starts[1], starts[2])


def test_any_split_of_the_batch_gives_the_same_result(batch):
    x, y = batch
    weight = torch.randn(36, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    class RowByRow(nn.Module):  # rounds each sample alike, whatever the batch around it
        def forward(self, x):
            return (x.flatten(1)[:, :, None] * weight).sum(1).tanh()

    attack = APGD(RowByRow(), eps=0.1, steps=12, n_restarts=2)
    parts = [attack(x[:4], y[:4]), attack(x[4:], y[4:], first_sample=4)]
    assert torch.equal(torch.cat(parts), attack(x, y))


def test_averages_a_model_that_draws(batch):
    x, y = batch
    calls = []

    class Noisy(nn.Module):
        def forward(self, x):
            calls.append(1)
            sign = 1 if len(calls) % 2 else -0.5  # only the sum of two draws ascends
            return torch.stack([x.sum((1, 2, 3)) * sign, -x.sum((1, 2, 3)) * sign, x.flatten(1)[:, 0]], 1)

    APGD(Noisy(), eps=0.1, steps=5, eot_iter=2)(x, y % 3)
    assert len(calls) == 2 * 6 + 1


def test_gradients_that_share_memory_are_served():
    class Sum(nn.Module):
        def forward(self, x):
            total = x.sum((1, 2))
            return torch.stack([total, torch.zeros_like(total)], 1)

    x, y = torch.full((2, 3, 3), 0.5), torch.tensor([0, 1])
    x_adv = APGD(Sum(), eps=0.25, steps=5, loss="margin")(x, y)
    assert torch.equal(x_adv[0], torch.full((3, 3), 0.25))  # the most that can be done against label 0
    assert torch.equal(x_adv[1], torch.full((3, 3), 0.75))  # fooled everywhere, so the last point counts


def test_channels_last_images(model, batch):
    x, y = batch[0].float().expand(-1, 2, -1, -1), batch[1]
    wide = nn.Sequential(nn.Conv2d(2, 1, 1), model).float()
    x_last = x.contiguous(memory_format=torch.channels_last)
    attack = APGD(wide, eps=0.1, steps=10)
    with backend.use("reference"):
        want = attack(x_last, y)
    got = attack(x_last, y)
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_leaves_the_model_as_it_was_found(model, batch):
    model.train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    APGD(model, steps=3)(*batch)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_same_seed_same_result_and_perturb_is_the_call(model, batch):
    attack = APGD.partial(eps=0.1, steps=5)(model)
    assert torch.equal(attack(*batch), attack.perturb(*batch))
    assert torch.equal(attack(*batch, seed=3), APGD(model, eps=0.1, steps=5, seed=3)(*batch))


def test_empty_batch(model):
    assert APGD(model)(torch.empty(0, 1, 6, 6), torch.empty(0, dtype=torch.int64)).shape == (0, 1, 6, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "L7"}, "norm is 'L7'; allowed are Linf"),
        ({"loss": "mse"}, "loss is 'mse'; allowed are ce, dlr, dlr-targeted, kl, margin"),
        ({"loss": "dlr", "targeted": True}, "loss is 'dlr', which takes no target class"),
        ({"eps": -0.1}, "eps is -0.1; it must be a finite number >= 0"),
        ({"steps": -1}, "steps is -1"),
        ({"n_restarts": 0}, "n_restarts is 0; it must be an integer >= 1"),
        ({"eot_iter": 0}, "eot_iter is 0; it must be an integer >= 1"),
        ({"rho": 1.5}, r"rho is 1.5; it must be in \[0, 1\]"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"bounds": (1.0, 0.0)}, r"bounds are \(1.0, 0.0\)"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings_are_named(model, settings, message):
    with pytest.raises(InputError, match=message):
        APGD(model, **settings)


def test_wrong_batches_are_named(model, batch):
    x, y = batch
    with pytest.raises(InputError, match="y holds the label 4; the model has classes 0"):
        APGD(model, steps=1)(x, y + 1)
    with pytest.raises(InputTypeError, match=r"x is torch\.uint8"):
        APGD(model, steps=1)(torch.zeros(9, 1, 6, 6, dtype=torch.uint8), y)
    with pytest.raises(InputError, match="loss is 'dlr', which needs at least 3 classes; the model has 2"):
        APGD(small_net(classes=2), steps=1, loss="dlr")(x, y % 2)
