"""Square: in its ball, as strong as pyautoattack's, without gradients, and the same for any split of the batch."""

import math

import pytest
import torch
from torch import nn

from afd import ops
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
        ({"n_restarts": 0}, "n_restarts is 0; it must be an integer >= 1"),
        ({"early_stop": 1}, "early_stop is 1; it must be True or False"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        SquareSettings(**settings)


def test_it_needs_labels():
    with pytest.raises((InputError, InputTypeError), match="y is None"):
        Square(network())(images())


# --- What is dropped, confirmed and begun again ---------------------------------------------------------------------


class Counted(nn.Module):
    """A model that counts the images it is asked about, with autocast and without."""

    def __init__(self, model, lies=False):
        super().__init__()
        self.model, self.lies, self.asked = model, lies, {True: 0, False: 0}

    def forward(self, x):
        low = torch.is_autocast_enabled("cpu")
        self.asked[low] += len(x)
        logits = self.model(x)
        return logits.roll(1, 1) if low and self.lies else logits


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 1.5), ("L1", 8.0)])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"loss": "ce", "n_restarts": 2}], ids=str)
def test_dropping_what_is_broken_changes_no_point(norm, eps, settings, trained):
    model, x, y = trained
    asked, found = [], []
    for early_stop in (True, False):
        counted = Counted(model)
        found.append(Square(counted, norm=norm, eps=eps, queries=60, early_stop=early_stop, **settings)(x, y))
        asked.append(sum(counted.asked.values()))
    assert torch.equal(*found)
    assert asked[0] < 0.9 * asked[1]
    assert (model(found[0]).argmax(1) != y).float().mean() > 0.1


def test_nothing_is_asked_of_what_is_misclassified_from_the_start(trained):
    model, x, _ = trained
    counted = Counted(model)
    wrong = (model(x).argmax(1) + 1) % 4
    assert torch.equal(Square(counted, eps=0.1, queries=50)(x, wrong), x)
    assert counted.asked[False] == len(x)


def test_a_success_that_is_none_in_float32_is_struck_out_and_the_search_goes_on(trained):
    model, x, _ = trained
    x = x[:32]
    y, counted = model(x).argmax(1), Counted(model, lies=True)
    x_adv = Square(counted, eps=1e-4, queries=40, precision="bf16")(x, y)
    assert torch.equal(model(x_adv).argmax(1), y)
    assert counted.asked[True] == 32 * 41  # nobody is dropped
    assert counted.asked[False] > 32 * 8  # at every look, as often as a proposal was made before
    assert not torch.equal(x_adv, x)


def test_every_success_of_bf16_is_one_in_float32(trained):
    model, x, y = trained
    attack = Square(model, eps=0.05, queries=80, precision="bf16")
    right = model(attack(x, y)).argmax(1) == y
    exact = model(Square(model, eps=0.05, queries=80)(x, y)).argmax(1) == y
    assert abs(int(right.sum()) - int(exact.sum())) <= 0.05 * len(x)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.6), ("L1", 2.5)])
def test_restarts_keep_the_first_point_that_fools_or_else_the_best_one(norm, eps, trained):
    model, x, y = trained
    settings = {"norm": norm, "eps": eps, "queries": 20}
    runs = [Square(model, **settings)(x, y, seed=seed) for seed in (7, 8)]
    both = Square(model, n_restarts=2, **settings)(x, y, seed=7)
    with torch.no_grad():
        broken = [model(one).argmax(1) != y for one in runs]
        losses = [model(one).scatter(1, y[:, None], -math.inf).amax(1) - model(one)[range(160), y] for one in runs]
        clean = model(x).argmax(1) != y
    second = ~clean & ~broken[0] & (broken[1] | (losses[1] > losses[0]))
    assert torch.equal(both, torch.where(second[:, None, None, None], runs[1], runs[0]))
    assert second.any()
    assert not second.all()


@pytest.mark.parametrize(("norm", "eps"), CASES)
def test_it_begins_at_a_start(norm, eps):
    model, x = network(), images()
    y, start = model(x).argmax(1), (x + 0.5).clamp(0, 1)
    want = ops.project(start, x, eps=eps, norm=norm)
    got = Square(model, norm=norm, eps=eps, queries=0)(x, y, start=start)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_squares_shrink_as_the_paper_has_it(monkeypatch):
    seen = {}
    step = ops.square_step_

    def noted(*tensors, query, side, **settings):
        if tensors[3] is not None:
            seen[query] = side
        return step(*tensors, query=query, side=side, **settings)

    monkeypatch.setattr(ops, "square_step_", noted)
    x = torch.rand(1, 3, 32, 32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).eval()
    Square(model, eps=1e-5, queries=1100)(x, model(x).argmax(1))
    for first, last, halvings in (
        (0, 10, 0),
        (11, 50, 1),
        (51, 200, 2),
        (201, 500, 3),
        (501, 1000, 4),
        (1001, 1099, 5),
    ):
        side = round(math.sqrt(0.8 / 2**halvings * 1024))
        assert {seen[query] for query in range(first, last + 1)} == {side}
    assert seen[1100] == 0
    seen.clear()
    Square(model, norm="L2", eps=1e-5, queries=60, p_init=0.1)(x, model(x).argmax(1))
    assert [seen[query] for query in (0, 11, 51)] == [11, 7, 5]  # 10, 7, 5 made odd


# --- Few classes, and other labels ----------------------------------------------------------------------------------


def test_a_model_of_two_classes_is_attacked(trained):
    model, x, y = trained
    two = nn.Sequential(model, nn.Linear(4, 2, bias=False)).eval()
    two[1].weight.data = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    for loss in ("margin", "ce"):
        x_adv = Square(two, eps=0.08, loss=loss, queries=60)(x, y // 2)
        assert (two(x_adv).argmax(1) != y // 2).float().mean() > 0.1


@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_a_model_of_one_logit_is_refused(loss):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).eval()
    with pytest.raises(InputError, match="a logit for each of at least 2 classes"):
        Square(model, loss=loss)(images(), torch.zeros(24, dtype=torch.int64))


def test_of_soft_labels_the_likeliest_class_is_left(trained):
    model, x, y = trained
    soft = 0.6 * nn.functional.one_hot(y, 4) + 0.1
    hard = Square(model, eps=0.05, loss="ce", queries=15)(x, y)
    assert torch.equal(Square(model, eps=0.05, loss="ce", queries=15)(x, soft), hard)


def test_one_image_and_none(trained):
    model, x, y = trained
    attack = Square(model, eps=0.05, queries=15)
    assert torch.equal(attack(x[3:4], y[3:4], first_sample=3), attack(x, y)[3:4])
    assert attack(x[:0], y[:0]).shape == x[:0].shape


def test_float64_images_are_served(trained):
    model, x, y = trained
    wide = network().double()
    wide.load_state_dict(model.state_dict())
    x_adv = Square(wide, eps=0.06, queries=30)(x.double(), y)
    assert x_adv.dtype == torch.float64
    assert (wide(x_adv).argmax(1) != y).any()
