"""PGD against the textbook loop, and everything it promises about the model and the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import PGD
from afd.errors import InputError, InputTypeError


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


@pytest.fixture
def model():
    return small_net()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(7, 1, 6, 6, generator=generator), torch.randint(5, (7,), generator=generator)


def textbook_pgd(model, x, y, start, eps, alpha, steps, sign=1):
    model.eval()
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + sign * alpha * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("targeted", [False, True])
def test_equals_the_textbook_loop(model, batch, targeted):
    x, y = batch
    attack = PGD(model, eps=0.1, alpha=0.03, steps=6, random_start=False, targeted=targeted)
    expected = textbook_pgd(model, x, y, x, 0.1, 0.03, 6, sign=-1 if targeted else 1)
    assert torch.equal(attack(x, y), expected)
    assert torch.equal(attack.perturb(x, y), expected)


@pytest.mark.parametrize("targeted", [False, True])
def test_moves_the_loss_the_right_way(model, batch, targeted):
    x, y = batch
    x_adv = PGD(model, eps=0.2, alpha=0.05, steps=10, targeted=targeted)(x, y)
    before, after = (F.cross_entropy(model.eval()(z), y, reduction="none") for z in (x, x_adv))
    assert ((after < before) if targeted else (after > before)).all()


def test_stays_in_ball_and_bounds_from_a_random_start(model, batch):
    x, y = batch
    x_adv = PGD(model, eps=0.07, alpha=0.05, steps=3, bounds=(0.0, 1.0))(x, y)
    assert (x_adv >= (x - 0.07).clamp(min=0)).all()
    assert (x_adv <= (x + 0.07).clamp(max=1)).all()
    assert not x_adv.requires_grad


def test_radius_per_sample(model, batch):
    x, y = batch
    eps = torch.linspace(0, 0.3, 7)
    moved = (PGD(model, eps=eps, alpha=eps / 4, steps=8)(x, y) - x).flatten(1).abs().amax(1)
    assert moved[0] == 0
    torch.testing.assert_close(moved, eps, atol=1e-6, rtol=0)


def test_same_seed_same_result_other_seed_another(model, batch):
    x, y = batch
    attack = PGD(model, eps=0.1, steps=2, seed=3)
    assert torch.equal(attack(x, y), attack(x, y))
    assert torch.equal(attack(x, y), PGD(model, eps=0.1, steps=2)(x, y, seed=3))
    assert not torch.equal(attack(x, y), attack(x, y, seed=4))


def test_any_split_of_the_batch_gives_the_same_result(batch):
    x, y = batch
    weight = torch.randn(36, 5, generator=torch.Generator().manual_seed(2))

    class RowByRow(nn.Module):  # rounds each sample alike, whatever the batch around it
        def forward(self, x):
            return (x.flatten(1)[:, :, None] * weight).sum(1)

    attack = PGD(RowByRow(), eps=0.1, alpha=0.02, steps=5)
    parts = [attack(x[:3], y[:3]), attack(x[3:4], y[3:4], first_sample=3), attack(x[4:], y[4:], first_sample=4)]
    assert torch.equal(torch.cat(parts), attack(x, y))


def state_of(model):
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    return modes, flags, grads, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a, b):
    assert a[:2] == b[:2]
    for left, right in zip(a[2], b[2], strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)
    assert all(torch.equal(a[3][name], b[3][name]) for name in a[3])


def unusual(model):
    """A model in a state that only faithful bookkeeping restores."""
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    return model


def test_leaves_the_model_as_it_was_found(model, batch):
    before = state_of(unusual(model))
    PGD(model, steps=2)(*batch)
    same_state(state_of(model), before)


def test_leaves_the_model_as_it_was_found_when_it_raises(model, batch):
    calls = []

    def fail_on_the_second(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("broken layer")

    unusual(model)[5].register_forward_hook(fail_on_the_second)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="broken layer"):
        PGD(model, steps=3)(*batch)
    same_state(state_of(model), before)


def test_the_model_is_attacked_in_evaluation_mode(model, batch):
    model.train()
    seen = []
    model[3].register_forward_hook(lambda module, *_: seen.append(module.training))
    PGD(model, steps=2)(*batch)
    assert seen == [False, False]


def test_runs_under_no_grad_and_leaves_the_input_alone(model, batch):
    x, y = batch
    kept = x.clone()
    with torch.no_grad():
        x_adv = PGD(model, eps=0.1, steps=2)(x, y)
    assert torch.equal(x, kept)
    assert not torch.equal(x_adv, x)


def test_a_frozen_model_can_be_attacked(model, batch):
    model.requires_grad_(False)
    assert not torch.equal(PGD(model, eps=0.1, steps=1)(*batch), batch[0])


def test_empty_batch(model):
    assert PGD(model)(torch.empty(0, 1, 6, 6), torch.empty(0, dtype=torch.int64)).shape == (0, 1, 6, 6)


def test_no_steps_gives_the_start(model, batch):
    x, y = batch
    assert torch.equal(PGD(model, steps=0, random_start=False)(x, y), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "L7"}, "norm is 'L7'; allowed are Linf, L2, L1"),
        ({"loss": "mse"}, "loss is 'mse'; allowed are ce"),
        ({"eps": -0.1}, "eps is -0.1; it must be a finite number >= 0"),
        ({"eps": torch.tensor([0.1, -0.2])}, "eps is -0.2"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"steps": -1}, "steps is -1"),
        ({"bounds": (1.0, 0.0)}, r"bounds are \(1.0, 0.0\); low must be less than high"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings_are_named(model, settings, message):
    with pytest.raises(InputError, match=message):
        PGD(model, **settings)


def images_with(value):
    x = torch.full((3, 1, 6, 6), 0.5)
    x[1, 0, 2, 3] = value
    return x


LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (
            images_with(1.5),
            LABELS,
            InputError,
            r"x has values in \[0.5, 1.5\]; images must be finite and in \[0.0, 1.0\]",
        ),
        (images_with(-0.01), LABELS, InputError, r"x has values in \[-0.01, 0.5\]"),
        (images_with(float("nan")), LABELS, InputError, "x has values in .*nan"),
        (images_with(float("inf")), LABELS, InputError, "x has values in .*inf"),
        (torch.zeros(3, 1, 6, 6, dtype=torch.uint8), LABELS, InputTypeError, "x is torch.uint8"),
        (torch.zeros(3, 1, 6, 6).half(), LABELS, InputTypeError, "x is torch.float16"),
        (images_with(0.5), LABELS.float(), InputTypeError, "y is torch.float32; labels must be torch.int64"),
        (images_with(0.5), LABELS.int(), InputTypeError, "y is torch.int32"),
        (images_with(0.5), LABELS[:2], InputError, r"y has shape \[2\]; it must be \[3\]"),
        (images_with(0.5), LABELS[:, None], InputError, r"y has shape \[3, 1\]"),
        (images_with(0.5), LABELS - 1, InputError, "y holds the label -1; labels must be >= 0"),
        (images_with(0.5), LABELS + 3, InputError, "y holds the label 5; the model has classes 0 ... 4"),
    ],
)
def test_wrong_batches_are_named(model, x, y, error, message):
    with pytest.raises(error, match=message):
        PGD(model, steps=1)(x, y)


def test_a_model_without_logits_is_named(batch):
    with pytest.raises(InputError, match=r"the model returned shape \[7, 1, 6, 6\]; it must be logits \[7, K\]"):
        PGD(nn.Identity(), steps=1)(*batch)
