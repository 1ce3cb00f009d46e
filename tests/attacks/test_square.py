"""Square: in its ball, as strong as pyautoattack's, without gradients, and the same for any split of the batch."""

import pytest
import torch
from torch import nn

from afd.attacks import Ball, Square, SquareSettings
from afd.errors import InputError, InputTypeError
from afd.metrics import predict

RADII = {"Linf": 0.1, "L2": 1.0, "L1": 5.0}
CASES = list(RADII.items())


def network(channels=3, size=8, classes=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * size * size, classes)
    ).eval()


def images(count=24, channels=3, size=8):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained():
    """A classifier of images that are brighter in one of four corners, and such images."""
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(160) % 4
    x = 0.45 * torch.rand(160, 3, 8, 8, generator=generator) + 0.2
    for corner in range(4):
        down, right = corner // 2 * 4, corner % 2 * 4
        x[y == corner, :, down : down + 4, right : right + 4] += 0.12
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x.clamp(0, 1), y


@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_points_lie_in_ball_and_bounds(norm, eps):
    model, x = network(), images()
    y = model(x).argmax(1)
    each = torch.linspace(0, eps, len(x))
    for radius in (eps, each):
        x_adv = Square(model, norm=norm, eps=radius, queries=30)(x, y)
        assert x_adv.shape == x.shape
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert Ball(norm, radius).holds(Ball(norm, radius).distance(x_adv, x)).all()
    assert torch.equal(x_adv[0], x[0])  # of radius 0


@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_it_is_the_same_for_any_split_of_the_batch(norm, eps):
    model, x = network(), images()
    y = model(x).argmax(1)
    attack = Square(model, norm=norm, eps=eps, queries=25, seed=3)
    whole = attack(x, y)
    parts = [attack(x[:7], y[:7]), attack(x[7:], y[7:], first_sample=7)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, Square(model, norm=norm, eps=eps, queries=25, seed=3, chunk_size=5)(x, y))
    assert not torch.equal(whole, attack(x, y, seed=4))


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.06), ("L2", 0.7), ("L1", 3.0)])
def test_it_breaks_as_many_images_as_pyautoattacks(norm, eps, trained):
    external = pytest.importorskip("afd.attacks.external")
    pytest.importorskip("pyautoattack")
    model, x, y = trained
    attacks = (
        Square(model, norm=norm, eps=eps, queries=100),
        external.square(model, norm=norm, eps=eps, queries=100, seed=0),
    )
    left = [float((predict(model, attack(x, y)).classes == y).float().mean()) for attack in attacks]
    assert left[0] < 0.9
    assert left[0] <= left[1] + 0.06


@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_more_queries_leave_no_more_images(norm, eps, trained):
    model, x, y = trained
    left = [
        int((predict(model, Square(model, norm=norm, eps=0.7 * eps, queries=queries)(x, y)).classes == y).sum())
        for queries in (0, 20, 80)
    ]
    assert left[0] >= left[1] >= left[2]
    assert left[2] < left[0]


def test_it_asks_for_no_gradient_and_leaves_generators_and_model_alone():
    class Rounded(nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return (x.flatten(1) @ torch.eye(192)[:, :4] * 20).round()

    model, x = Rounded().train(), images()
    before = torch.get_rng_state()
    Square(model, eps=0.2, queries=10)(x, torch.arange(24) % 4)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_misclassified_already_is_left_as_it_is():
    model, x = network(), images()
    y = (model(x).argmax(1) + 1) % 4
    assert torch.equal(Square(model, eps=0.1, queries=5)(x, y), x)


@pytest.mark.parametrize("shape", [(5, 30), (5, 1, 7, 5), (5, 2, 3, 3), (5, 4, 2, 2, 2)])
@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_images_of_any_form_are_attacked(shape, norm, eps):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    x_adv = Square(model, norm=norm, eps=eps, queries=12)(x, model(x).argmax(1))
    assert x_adv.shape == x.shape
    assert not torch.equal(x_adv, x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targeted": True}, "targeted is True, and Square aims at no class"),
        ({"loss": "dlr"}, "loss is 'dlr'; allowed are margin, ce"),
        ({"p_init": 0.0}, r"p_init is 0.0; it must be in \(0, 1\]"),
        ({"queries": -1}, "queries is -1; it must be an integer >= 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        SquareSettings(**settings)


def test_it_needs_labels():
    with pytest.raises((InputError, InputTypeError), match="y is None"):
        Square(network())(images())
