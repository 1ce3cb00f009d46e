"""Training against the worst of three balls, against all, and against one for each image: in float64, beside loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import Ball, Union, UnionSettings
from afd.errors import InputError, InputTypeError
from afd.methods import AFD, AT, AWP, TRADES, Batch
from afd.methods.game import gradient_penalty
from afd.methods.ramps import Ramp, Ramps
from afd.nn import FeatureClassifier
from afd.ops import reference
from afd.training import Trainer
from afd.training.schedules import EpsWarmup

RADII = {"Linf": 0.1, "L2": 0.5, "L1": 2.0}
BALLS = {"eps": 0.1, "eps_l2": 0.5, "eps_l1": 2.0, "steps": 3}
PLAIN = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
CHOICES = ("worst", "average", "random")
each_choice = pytest.mark.parametrize("choice", CHOICES)


def attack(choice, **settings):
    return UnionSettings(**{**BALLS, **settings}, choice=choice, fold_batchnorm=False)


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5))
    return FeatureClassifier(encoder, 5, 3).double().train()


def batches(count=6, size=8):
    generator = torch.Generator().manual_seed(1)
    for seed in range(count):
        x = torch.rand(size, 1, 6, 6, generator=generator, dtype=torch.float64)
        yield seed, x, torch.randint(3, (size,), generator=generator)


# --- The methods as loops -----------------------------------------------------------------------------------------


def ce(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def kl(logits, clean):
    return (clean.softmax(1) * (clean.log_softmax(1) - logits.log_softmax(1))).sum(1)


def by_loops(model, x, loss, seed):
    """PGD in each ball, on the model in evaluation mode: points and their losses, [3, N, ...] and [3, N]."""
    model.eval()
    points, losses = [], []
    for norm, eps in RADII.items():
        x_adv = Ball(norm, eps).start(x, seed=seed)
        for _ in range(3):
            x_adv = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(loss(model(x_adv)).sum(), x_adv)
            x_adv = reference.pgd_step(x_adv.detach(), x, grad, 2.5 * eps / 3, eps, 0.0, 1.0, norm=norm)
        points.append(x_adv)
        losses.append(loss(model(x_adv)).detach())
    model.train()
    return torch.stack(points), torch.stack(losses)


def chosen(points, losses, choice, seed):
    """Attacked images of each image, the images of one beside each other."""
    if choice == "worst":
        return torch.stack([points[losses[:, row].argmax(), row] for row in range(points.shape[1])])
    if choice == "average":
        return torch.cat([points[:, row] for row in range(points.shape[1])])
    deal = Union(nn.Flatten(), **BALLS | {"steps": 0}, choice="random")
    deal(torch.zeros(points.shape[1], 2), torch.zeros(points.shape[1], dtype=torch.int64), seed=seed)
    return torch.stack([points[ball, row] for row, ball in enumerate(deal.which)])


def at(model, seed, x, y, choice):
    x_adv = chosen(*by_loops(model, x, lambda logits: ce(logits, y), seed), choice, seed)
    return ce(model(x_adv), y.repeat_interleave(len(x_adv) // len(y))).mean()


def trades(model, seed, x, y, choice):
    model.eval()
    still = model(x).detach()
    x_adv = chosen(*by_loops(model, x, lambda logits: kl(logits, still), seed), choice, seed)
    model.train()
    attacked, clean = model(x_adv), model(x)
    return ce(clean, y).mean() + 6 * kl(attacked, clean.repeat_interleave(len(x_adv) // len(x), 0)).mean()


LITERAL = {"at": (AT, at, "ce"), "trades": (TRADES, trades, "kl")}


@each_choice
@pytest.mark.parametrize("name", LITERAL)
def test_six_steps_are_those_of_the_loops(name, choice):
    kind, literal, loss = LITERAL[name]
    ours, theirs = network(nn.Identity), network(nn.Identity)
    step = kind(attack=attack(choice, loss=loss), **PLAIN).build(ours)
    for seed, x, y in batches():
        step(x, y, seed=seed)
        gradients = torch.autograd.grad(literal(theirs, seed, x, y, choice), list(theirs.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@each_choice
def test_afd_plays_with_the_images_of_the_loops(choice):
    """The game itself, with several attacked images of each, is held to its formulas in test_game_transcription.py."""
    ours, theirs = (network(nn.Identity) for _ in range(2))
    torch.manual_seed(1)
    step = AFD(attack=attack(choice), hidden=4, adversarial_weight=0.3).build(ours)
    torch.manual_seed(1)
    other = AFD(attack=attack(choice), hidden=4, adversarial_weight=0.3).build(theirs)
    for seed, x, y in batches():
        x_adv = chosen(*by_loops(theirs, x, lambda logits, y=y: ce(logits, y), seed), choice, seed)
        step(x, y, seed=seed)
        other(x, y, x_adv=x_adv)
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


METHODS = {
    "at": lambda **settings: AT(attack=attack("average"), **settings),
    "at, one for each": lambda **settings: AT(attack=attack("random"), **settings),
    "trades": lambda **settings: TRADES(attack=attack("average", loss="kl"), **settings),
    "afd": lambda **settings: AFD(attack=attack("average"), hidden=4, **settings),
    "afd alternating": lambda **settings: AFD(
        attack=attack("average"), hidden=4, schedule="alternating", adversarial_weight=0.5, **settings
    ),
    "at+awp": lambda **settings: AWP(AT(attack=attack("average"), **settings), gamma=0.05),
}


def trained(method, norm=nn.Identity, **given):
    torch.manual_seed(3)
    model = network(norm)
    step = method.build(model)
    for seed, x, y in batches():
        losses = step(x, y, seed=seed, **{name: make(x, y) for name, make in given.items()})
    return [*model.parameters()], losses


@pytest.mark.parametrize("name", METHODS)
def test_parts_of_the_batch_have_the_images_that_are_theirs(name):
    whole, losses = trained(METHODS[name]())
    parts, others = trained(METHODS[name](micro_batches=3))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    for key, loss in losses.items():
        torch.testing.assert_close(loss, others[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "at, one for each"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_attacked_images_may_be_given_all_of_an_image_beside_each_other(name, micro_batches):
    def given(x, _y):
        return torch.stack([x, (x + 0.1).clamp(0, 1), 1 - x], 1).flatten(0, 1)

    method = METHODS[name](micro_batches=micro_batches)
    weights, _ = trained(method, x_adv=given)
    model = network(nn.Identity)
    _, x, y = next(batches())
    step = method.build(model)
    with pytest.raises(InputError, match=r"x_adv has shape \[8, 1, 6, 6\]"):
        step(x, y, x_adv=x)
    one_by_one, _ = trained(METHODS[name](micro_batches=8 if name != "afd alternating" else 4), x_adv=given)
    for one, other in zip(weights, one_by_one, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [AT, TRADES])
def test_soft_labels_go_with_each_image(kind):
    loss = "kl" if kind is TRADES else "ce"
    _, x, y = next(batches())
    found = []
    for labels in (y, F.one_hot(y, 3).double()):
        model = network(nn.Identity)
        found.append(kind(attack=attack("average", loss=loss)).build(model)(x, labels, seed=2))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-12)


def test_a_gradient_penalty_pairs_an_image_with_each_of_its_attacked_ones():
    seen = []

    def critic(z):
        seen.append(z.detach())
        return z.square().sum(1)

    natural = torch.arange(2.0)[:, None].repeat(1, 3)
    gradient_penalty(critic, natural, natural.repeat_interleave(3, 0))  # between what is alike, there is only that
    torch.testing.assert_close(seen[0], natural.repeat_interleave(3, 0))
    model = network(nn.Identity)
    step = AFD(attack=attack("average"), hidden=4, penalty=1.0).build(model)
    for seed, x, y in batches(2):
        assert all(loss.isfinite() for loss in step(x, y, seed=seed).values())


@pytest.mark.parametrize("mode", ["eval", "train", "batch", "clean"])
@each_choice
def test_batchnorm_counts_the_batches_that_it_is_shown(mode, choice):
    model = network()
    step = AT(attack=attack(choice, batchnorm=mode)).build(model)
    _, x, y = next(batches())
    step(x, y, seed=0)
    in_attack = {"train": 3 if choice == "random" else 9}.get(mode, 0)
    assert model.encoder[1].num_batches_tracked == in_attack + 1


# --- What grows -----------------------------------------------------------------------------------------------------


def lengths(step):
    return {name: float(value) for name, value in vars(step.method.attack).items() if name.startswith(("eps", "alpha"))}


@each_choice
def test_a_warm_up_lets_all_radii_grow(choice):
    method = AT(attack=attack(choice, alpha_l2=0.3))
    step = method.build(network())
    warmup = EpsWarmup(method, step, 4)
    full = {"eps": 0.1, "eps_l2": 0.5, "eps_l1": 2.0, "alpha": 0.25 / 3, "alpha_l2": 0.3, "alpha_l1": 5 / 3}
    for done, share in ((0, 0.25), (1, 0.5), (3, 1.0), (7, 1.0)):
        warmup.at(done)
        assert lengths(step) == pytest.approx({name: share * one for name, one in full.items()})
    warmup.at(0)
    seed, x, y = next(batches())
    built = step.attacks.of(step.method.attack)
    found = built(x, y, seed=seed)
    quarter = {name: one / 4 for name, one in full.items()}
    plain = UnionSettings(**quarter, steps=3, choice=choice, fold_batchnorm=False).build(step.network)(x, y, seed=seed)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def test_a_warm_up_leaves_out_what_is_left_out():
    method = AT(attack=UnionSettings(eps_l2=0.5, steps=2))
    step = method.build(network())
    EpsWarmup(method, step, 2).at(0)
    assert float(step.method.attack.eps_l2) == 0.25
    assert (step.method.attack.eps, step.method.attack.eps_l1, step.method.attack.alpha) == (None, None, None)
    step(*next(batches())[1:], seed=0)


def test_steps_that_grow_keep_the_step_size_of_each_ball():
    method = AT(attack=attack("worst"))
    step = method.build(network())
    ramps = Ramps(method, step, {"attack.steps": Ramp(1, 2), "attack.eps_l2": Ramp(0.1, 2)}, 2)
    ramps.at(0)
    grown = step.method.attack
    assert grown.steps == round(1 + 2 * 0.25)
    assert (grown.alpha, grown.alpha_l1) == pytest.approx((0.25 / 3, 5 / 3))
    assert float(grown.eps_l2) == pytest.approx(0.2)
    assert float(grown.alpha_l2) == pytest.approx(2.5 * 0.2 / 3)
    with pytest.raises(InputError, match=r"ramps has attack\.eps_l1, which eps_warmup=1 lets grow already"):
        Trainer(network().float(), method, eps_warmup=1.0, ramps={"attack.eps_l1": Ramp(0.1, 2)})


# --- What is no attack of a method's ----------------------------------------------------------------------------------


def test_several_images_of_each_are_asked_for_by_settings():
    model = network().float()
    with pytest.warns(DeprecationWarning, match="attack="):
        trainer = Trainer(model, AT(), attack=Union.partial(eps=0.1, eps_l2=0.5, choice="average"))
    with pytest.raises(InputError, match="attack made a Union with choice 'average'; give its settings"):
        trainer.step.attacks.of(trainer.method.attack)
    with pytest.warns(DeprecationWarning, match="attack="):
        trainer = Trainer(model, AT(), attack=Union.partial(eps=0.1, eps_l2=0.5))
    assert trainer.step.attacks.of(trainer.method.attack).norms == ("Linf", "L2")


def test_settings_called_on_a_batch_return_all_images_of_each():
    _, x, y = next(batches())
    model = network().eval()
    assert attack("average")(model, Batch(x, y)).shape == (24, 1, 6, 6)
    with pytest.raises(InputTypeError, match="attack is UnionSettings"):
        AT(attack=UnionSettings)
