"""Attacks in several balls at once, held to loops in each of them, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_attacks import eagerly, replays
from torch import nn

from afd.attacks import PGD, Ball, PGDSettings, Union, UnionSettings
from afd.attacks.union import balls_in, told, words_of
from afd.errors import InputError, InputTypeError
from afd.methods import AT, TRADES
from afd.methods.registry import described, made
from afd.ops import reference

RADII = {"Linf": 0.1, "L2": 0.5, "L1": 2.0}
BALLS = {"eps": 0.1, "eps_l2": 0.5, "eps_l1": 2.0}
CHOICES = ("worst", "average", "random", "fooling")
STEPS = 4
each_choice = pytest.mark.parametrize("choice", CHOICES)


def network(norm=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), *([nn.BatchNorm2d(4)] if norm else []), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(144, 4)).double().eval()


def images(count=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (count,), generator=generator)


# --- Three loops, and what is made of them by hand -------------------------------------------------------------------


def ce(model, x_adv, _x, y):
    return F.cross_entropy(model(x_adv), y, reduction="none")


def kl(model, x_adv, x, _y):
    p, q = model(x).softmax(1).detach(), model(x_adv).softmax(1)
    return (p * (p.log() - q.log())).sum(1)


LOSSES = {"ce": ce, "kl": kl}


def in_one_ball(model, x, y, norm, loss=ce, seed=0, steps=STEPS, radii=RADII):
    """PGD as a loop: where it ends, and the losses there."""
    eps = radii[norm]
    x_adv = Ball(norm, eps).start(x, seed=seed)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(model, x_adv, x, y).sum(), x_adv)
        x_adv = reference.pgd_step(x_adv.detach(), x, grad, 2.5 * eps / steps, eps, 0.0, 1.0, norm=norm)
    return x_adv, loss(model, x_adv, x, y).detach()


def by_hand(model, x, y, choice, which=None, **how):
    """What a union returns, image by image."""
    found = [in_one_ball(model, x, y, norm, **how) for norm in RADII]
    points, losses = [point for point, _ in found], torch.stack([loss for _, loss in found])
    rows = []
    for image in range(len(x)):
        own = [point[image] for point in points]
        fooled = [model(point[None]).argmax() != y[image] for point in own]
        order = sorted(range(3), key=lambda j: (bool(fooled[j]) and choice == "fooling", losses[j, image]))
        chosen = {"average": own, "random": [own[which[image]]] if which is not None else own}
        rows += chosen.get(choice, [own[order[-1]]])
    return torch.stack(rows)


@pytest.mark.parametrize("loss", LOSSES)
@each_choice
def test_it_is_the_loops_and_a_choice(choice, loss):
    model, (x, y) = network(), images()
    attack = Union(model, **BALLS, steps=STEPS, choice=choice, loss=loss)
    found = attack(x, y, seed=3)
    expected = by_hand(model, x, y, choice, attack.which, loss=LOSSES[loss], seed=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(found) == (27 if choice == "average" else 9)
    assert attack.norms == ("Linf", "L2", "L1")


@pytest.mark.parametrize("left_out", BALLS)
def test_a_radius_of_none_leaves_its_ball_out(left_out):
    model, (x, y) = network(), images()
    two = Union(model, **{**BALLS, left_out: None}, steps=STEPS, choice="average")
    three = Union(model, **BALLS, steps=STEPS, choice="average")(x, y).unflatten(0, (9, 3))
    kept = [place for place, name in enumerate(BALLS) if name != left_out]
    assert torch.equal(two(x, y).unflatten(0, (9, 2)), three[:, kept])
    assert len(two.norms) == 2


@pytest.mark.parametrize("norm", RADII)
@each_choice
def test_of_one_ball_it_is_pgd(norm, choice):
    model, (x, y) = network(), images()
    name = dict(zip(RADII, BALLS, strict=True))[norm]
    pgd = PGD(model, norm=norm, eps=RADII[norm], alpha=None, steps=STEPS)
    assert torch.equal(Union(model, **{name: RADII[norm]}, steps=STEPS, choice=choice)(x, y), pgd(x, y))


# --- Where images lie ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    radii=st.tuples(*(st.one_of(st.none(), st.floats(0, most)) for most in (0.5, 3.0, 12.0))).filter(any),
    seed=st.integers(0, 2**63 - 1),
    choice=st.sampled_from(CHOICES),
    init=st.sampled_from(["uniform", "gaussian", "coin-flip"]),
    count=st.integers(1, 6),
    first=st.integers(0, 2**40),
)
def test_every_image_lies_in_its_ball_and_in_the_bounds(radii, seed, choice, init, count, first):
    x, y = images(count, seed % 1000)
    attack = Union(network(), **dict(zip(BALLS, radii, strict=True)), steps=2, choice=choice, init=init)
    found = attack(x, y, seed=seed, first_sample=first)
    originals = x.repeat_interleave(len(found) // len(x), 0)
    assert found.min() >= 0
    assert found.max() <= 1
    assert len(attack.which) == len(found)
    eps = dict(zip(RADII, radii, strict=True))
    for place, norm in enumerate(attack.norms):
        own = attack.which == place
        assert Ball(norm, eps[norm]).holds(Ball(norm, eps[norm]).distance(found, originals)[own]).all()


@each_choice
def test_it_is_the_same_for_any_split_of_the_batch(choice):
    model, (x, y) = network(), images(11)
    attack = Union(model, **BALLS, steps=STEPS, choice=choice)
    whole, which = attack(x, y, seed=5, first_sample=2), attack.which
    parts = [
        attack(x[rows], y[rows], seed=5, first_sample=2 + rows.start)
        for rows in (slice(0, 1), slice(1, 6), slice(6, 11))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    in_chunks = Union(model, **BALLS, steps=STEPS, choice=choice, chunk_size=4)
    torch.testing.assert_close(in_chunks(x, y, seed=5, first_sample=2), whole, rtol=0, atol=1e-12)
    assert torch.equal(in_chunks.which, which)


# --- One ball for each image ---------------------------------------------------------------------------------------


def test_balls_are_dealt_out_in_turn_from_one_that_the_seed_draws():
    (x, y), attack = images(10), Union(network(), **BALLS, steps=0, choice="random")
    firsts = []
    for seed in range(300):
        attack(x, y, seed=seed)
        assert sorted(attack.which.bincount(minlength=3).tolist()) == [3, 3, 4]
        assert torch.equal(attack.which, (attack.which[0] + torch.arange(10)) % 3)
        firsts.append(int(attack.which[0]))
    assert all(70 < firsts.count(place) < 130 for place in range(3))
    attack(x, y, seed=torch.tensor(7))
    assert attack.which[0] == firsts[7]


def forwards(model, call):
    """Images that the model is passed in a call."""
    seen = []
    handle = model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    call()
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize(("choice", "passes"), [("random", 4), ("average", 12), ("worst", 15), ("fooling", 18)])
def test_a_choice_costs_no_more_passes_than_it_needs(choice, passes):
    model, (x, y) = network(), images()
    attack = Union(model, **BALLS, steps=4, choice=choice)
    assert forwards(model, lambda: attack(x, y)) == passes * len(x)


# --- What is fooled ------------------------------------------------------------------------------------------------


def test_with_fooling_an_image_is_lost_where_it_is_in_any_ball():
    model, (x, y) = network(), images(200)
    y = model(x).argmax(1)
    attack = Union(model, eps=0.03, eps_l2=0.17, eps_l1=0.8, steps=5, choice="fooling")
    alone = [
        PGD(model, norm=norm, eps=eps, alpha=None, steps=5)(x, y)
        for norm, eps in zip(RADII, (0.03, 0.17, 0.8), strict=True)
    ]
    withstood = torch.stack([model(one).argmax(1) == y for one in alone])
    assert torch.equal(model(attack(x, y)).argmax(1) == y, withstood.all(0))
    assert 0 < withstood.all(0).sum() < withstood.sum(1).min()  # no ball alone says so


class Undecided(nn.Module):
    """Of class 0; a bright first element makes it class 1, and many that are a little brighter nearly any of thirty."""

    def forward(self, x):
        bright, mean = x.flatten(1)[:, :1], x.flatten(1) @ torch.linspace(1.1, 0.9, 36, dtype=x.dtype)[:, None] / 36
        return torch.cat([0 * bright, 2 * bright - 1, (-(-20 * mean).exp()).expand(-1, 30)], 1)


def test_the_highest_loss_may_fool_nobody_where_another_point_does():
    x, y = torch.zeros(1, 1, 6, 6, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    expected = {"worst": (["Linf"], 0), "fooling": (["L1"], 1)}
    for choice, (norm, predicted) in expected.items():
        attack = Union(Undecided(), eps=0.1, eps_l1=1.6, steps=5, random_start=False, choice=choice)
        assert Undecided()(attack(x, y)).argmax(1) == predicted
        assert [attack.norms[place] for place in attack.which] == norm


def test_a_loss_that_is_not_a_number_is_never_the_worst():
    class Fragile(nn.Module):
        def forward(self, x):
            logits = torch.stack([x.flatten(1).mean(1), -x.flatten(1).mean(1)], 1)
            moved = (x.flatten(1) - 0.5).abs().amax(1) > 0.3  # only in L1, and in L2
            return torch.where(moved[:, None], logits * float("nan"), logits)

    x, y = torch.full((3, 1, 6, 6), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    attack = Union(Fragile(), eps=0.1, eps_l1=5.0, steps=3, validate=False)
    assert Fragile()(attack(x, y)).isfinite().all()
    assert attack.which.tolist() == [0, 0, 0]


# --- As any attack -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "batch", "clean"])
@each_choice
def test_batchnorm_does_what_it_does_in_each_ball_alone(mode, choice):
    x, y = images()
    model = network(norm=True).train()
    attack = Union(model, **BALLS, steps=STEPS, choice=choice, batchnorm=mode)
    found = attack(x, y)
    if choice != "random":  # whose batch has images of all balls
        alone, moving = [], network(norm=True).train()
        for norm, eps in RADII.items():
            pgd = PGD(moving, norm=norm, eps=eps, alpha=None, steps=STEPS, batchnorm=mode)
            alone.append(pgd(x, y))
        apart = [(found.unflatten(0, (9, -1)) - one[:, None]).flatten(2).abs().amax(2) for one in alone]
        assert torch.stack(apart).amin(0).max() < 1e-12
    balls = 1 if choice == "random" else 3
    assert model[1].num_batches_tracked == (STEPS * balls if mode == "train" else 0)
    assert model.training
    assert model[1].training


@each_choice
def test_images_come_back_in_the_layout_that_they_are_given_in(choice):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4)).double()
    x, y = torch.rand(5, 3, 6, 6, dtype=torch.float64), torch.arange(5) % 4
    attack = Union(model, **BALLS, steps=2, choice=choice)
    plain, last = attack(x, y), attack(x.to(memory_format=torch.channels_last), y)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-12)


def test_what_an_attack_saw_is_counted_over_all_balls():
    model, (x, y) = network(), images()
    attack = Union(model, **BALLS, steps=STEPS)
    attack(x, y)
    assert attack.report.evaluations.tolist() == [3 * STEPS] * 9
    assert not attack.report.blind.any()
    one = Union(model, **BALLS, steps=STEPS, choice="random")
    one(x, y)
    assert one.report.evaluations.tolist() == [STEPS] * 9


def test_soft_labels_and_no_labels_serve():
    model, (x, y) = network(), images()
    hard = Union(model, **BALLS, steps=STEPS, choice="fooling")
    soft = F.one_hot(y, 4).double()
    torch.testing.assert_close(hard(x, soft), hard(x, y), rtol=0, atol=1e-12)
    without = Union(model, **BALLS, steps=STEPS, choice="fooling", loss="kl")
    torch.testing.assert_close(without(x), without(x, model(x).argmax(1)), rtol=0, atol=1e-12)


def test_a_loss_of_ones_own_chooses_and_one_for_all_chooses_for_all():
    model, (x, y) = network(), images(40)
    own = Union(model, **BALLS, steps=STEPS, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
    named = Union(model, **BALLS, steps=STEPS)
    torch.testing.assert_close(own(x, y), named(x, y), rtol=0, atol=1e-12)
    assert len(named.which.unique()) > 1
    scalar = Union(model, **BALLS, steps=STEPS, loss=lambda logits, y: F.cross_entropy(logits, y), chunk_size=2)
    scalar(x, y)
    assert len(scalar.which.unique()) == 1


@pytest.mark.parametrize("choice", CHOICES)
def test_it_begins_where_a_call_says_in_every_ball(choice):
    model, (x, y) = network(), images()
    start = (x + 0.05).clamp(0, 1)
    attack = Union(model, **BALLS, steps=STEPS, choice=choice)
    found = attack(x, y, start=start)
    alone = [PGD(model, norm=n, eps=e, alpha=None, steps=STEPS)(x, y, start=start) for n, e in RADII.items()]
    apart = [(found.unflatten(0, (9, -1)) - one[:, None]).flatten(2).abs().amax(2) for one in alone]
    assert torch.stack(apart).amin(0).max() < 1e-12
    assert torch.equal(start, (x + 0.05).clamp(0, 1))


@each_choice
def test_live_radii_are_read_at_each_call_and_there_may_be_one_for_each_image(choice):
    model, (x, y) = network(), images()
    live = {name: torch.tensor(radius, dtype=torch.float64) for name, radius in BALLS.items()}
    attack, plain = (Union(model, **radii, steps=STEPS, choice=choice) for radii in (live, BALLS))
    assert torch.equal(attack(x, y), plain(x, y))
    for radius in live.values():
        radius.mul_(0.5)
    half = {name: radius / 2 for name, radius in BALLS.items()}
    assert torch.equal(attack(x, y), Union(model, **half, steps=STEPS, choice=choice)(x, y))
    rows = {name: torch.full((9,), radius / 2, dtype=torch.float64) for name, radius in BALLS.items()}
    torch.testing.assert_close(
        Union(model, **rows, steps=STEPS, choice=choice, chunk_size=4)(x, y), attack(x, y), rtol=0, atol=1e-12
    )
    with pytest.raises(InputError, match=r"eps_l1 has shape \[9\], but x holds 4 images"):
        Union(model, **rows | {"eps": 0.1, "eps_l2": 0.1}, steps=STEPS)(x[:4], y[:4])


@each_choice
def test_a_recording_is_the_attack_for_any_seed(choice, tapes):
    model = network()
    captured = Union(model, **BALLS, steps=STEPS, choice=choice, fold_batchnorm=False)
    plain = eagerly(Union(model, **BALLS, steps=STEPS, choice=choice, fold_batchnorm=False))
    for seed in range(5):
        x, y = images(seed=seed)
        assert torch.equal(captured(x, y, seed=seed), plain(x, y, seed=seed))
        assert torch.equal(captured.which, plain.which)
    assert len(tapes) == (1 if choice == "random" else 3)
    assert min(replays(tapes)) >= 3


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "eps, eps_l2 and eps_l1 are None; a union needs a radius for at least one of its balls"),
        ({"eps": -0.1}, "eps is -0.1; it must be a finite number >= 0"),
        ({"eps_l2": -1.0}, "eps_l2 is -1.0; it must be a finite number >= 0"),
        ({"eps_l1": float("nan")}, "eps_l1 is nan"),
        ({"eps": 0.1, "choice": "best"}, "choice is 'best'; allowed are worst, average, random, fooling"),
        ({"eps": 0.1, "norm": "L2"}, "norm is 'L2'; a union takes no norm, but the radius of each of its balls"),
        ({"eps": 0.1, "targeted": True}, "targeted is True; a union of balls is attacked untargeted"),
        ({"eps": 0.1, "loss": "hinge"}, "loss is 'hinge'; allowed are"),
        ({"eps": 0.1, "alpha_l2": 0.1}, "alpha_l2 is 0.1, but eps_l2 is None: there is no such ball"),
        ({"eps_l2": 0.1, "alpha_l2": -0.1}, "alpha_l2 is -0.1"),
        ({"eps_l2": 0.1, "steps": -1}, "steps is -1"),
    ],
)
def test_what_is_no_union_is_named(wrong, message):
    for make in (UnionSettings, lambda **given: Union(network(), **given)):
        with pytest.raises(InputError, match=message):
            make(**wrong)


def test_what_is_no_number_is_named():
    with pytest.raises(InputTypeError, match="eps_l1 is a str; it must be a number"):
        UnionSettings(eps_l1="much")


def test_step_sizes_cross_each_ball_and_may_be_named():
    settings = UnionSettings(**BALLS, steps=5, alpha_l2=0.3)
    assert settings.resolved() == UnionSettings(**BALLS, steps=5, alpha=0.05, alpha_l2=0.3, alpha_l1=1.0)
    assert settings.resolved().resolved() == settings.resolved()
    model, (x, y) = network(), images()
    alone = PGD(model, norm="L2", eps=0.5, alpha=0.3, steps=5)(x, y)
    assert torch.equal(settings.build(model, choice="average")(x, y)[1::3], alone)


def test_it_is_validated_by_pgd_in_every_ball():
    settings = UnionSettings(**BALLS, choice="random", loss="kl", bounds=(0.0, 2.0))
    judge = UnionSettings(**BALLS, choice="fooling", steps=20, seed=3, bounds=(0.0, 2.0))
    assert settings.pgd(20, seed=3) == judge
    assert AT(attack=settings).judge(3) == judge


@each_choice
def test_a_method_with_it_is_written_and_read(choice):
    method = TRADES(attack=UnionSettings(eps_l2=0.5, eps_l1=2.0, loss="kl", choice=choice))
    described_as = described(method)
    assert described_as["attack"]["name"] == "union"
    assert made(described_as) == method
    written = {**described_as, "attack": {k: v for k, v in described_as["attack"].items() if v is not None}}
    assert made(written) == method  # as TOML has it, which knows no None


def test_a_union_in_words():
    assert balls_in("L1=12, Linf = 8/255") == {"Linf": "8/255", "L1": "12"}
    settings = UnionSettings.written("Linf=8/255,L2=0.5", steps=3)
    assert settings == UnionSettings(eps=8 / 255, eps_l2=0.5, steps=3)
    assert UnionSettings.written(words_of(settings), steps=3) == settings
    assert told(settings.balls) == "eps 0.0313725 in Linf, 0.5 in L2"
    assert told(PGDSettings(eps=0.2).balls) == "eps 0.2"
    for wrong, message in {
        "": "union is ''; a union is written NORM=RADIUS",
        "Linf": "union is 'Linf'; a union is written",
        "Linf=0.1,,": "a union is written",
        "L7=1": "a norm of union is 'L7'; allowed are Linf, L2, L1",
        "L2=1,L2=2": "which names L2 twice",
        "L2=1/0": "where a radius is no number",
        "L2=much": "where a radius is no number: 'much'",
        "L2=-1": "eps_l2 is -1.0",
    }.items():
        with pytest.raises(InputError, match=message):
            UnionSettings.written(wrong)
