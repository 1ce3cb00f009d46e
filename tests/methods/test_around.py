"""What a fresh reader found: wrappers inside of each other, own optimizers, frozen parts, balls of a method's own."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from afd.attacks import APGDSettings, MIMSettings, PGDSettings
from afd.errors import InputError, InputTypeError
from afd.methods import AFD, AT, AWP, MART, TRADES, Free, NormPenalty, Wrapper
from afd.methods.game import JointStep, SimultaneousStep
from afd.methods.ramps import Ramp, check_ramps
from afd.nn import FeatureClassifier, split

ATTACK = PGDSettings(eps=0.1, alpha=0.05, steps=2, fold_batchnorm=False)


def network():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    return FeatureClassifier(encoder, 5, 3).double().train()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.rand(8, 1, 6, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(3, (8,), generator=generator)


def trained(method, steps=3):
    model = network()
    step = method.build(model)
    for number, (x, y) in enumerate(batches(steps)):
        step(x, y, seed=number)
    return model


def apart(one, other):
    """The largest difference of two networks' weights and buffers."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@dataclass(frozen=True)
class Scaled(Wrapper):
    """Gradients times k."""

    k: float = 0.5

    def descend(self, step, batch):
        losses = step.gather(batch)
        for parameter in step.parameters:
            parameter.grad.mul_(self.k)
        step.apply()
        return losses


def test_awp_takes_the_step_of_the_wrapper_inside():
    at = AT(attack=ATTACK, lr=0.05, weight_decay=0.0)
    start = network()
    still = trained(AWP(Scaled(at, k=0.0)))
    weights = dict(start.named_parameters())
    assert all(torch.equal(one, weights[name]) for name, one in still.named_parameters())
    assert apart(trained(AWP(Scaled(at, k=1.0))), trained(AWP(at))) < 1e-12
    assert apart(trained(AWP(AWP(at, gamma=0.1), gamma=0.1)), trained(AWP(at, gamma=0.1))) > 1e-6


def test_awp_where_the_original_weights_decay_goes_around_plain_steps_only():
    AWP(AT(), weight_decay_at="original")
    with pytest.raises(InputError, match="weight_decay_at is 'original', but the method inside takes its steps in"):
        AWP(Scaled(AT()), weight_decay_at="original")


def test_awp_has_its_authors_length_from_the_beginning():
    assert (AWP(AT()).gamma, AWP(TRADES()).gamma, AWP(TRADES(), gamma=0.1).gamma) == (0.01, 0.005, 0.1)


def test_awp_moves_nothing_where_no_tensor_has_two_dimensions():
    ends = []
    for method in (AT(attack=ATTACK, lr=0.05), AWP(AT(attack=ATTACK, lr=0.05))):
        model = network()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() < 2)
        step = method.build(model)
        for x, y in batches(2):
            step(x, y)
        ends.append(model)
    assert apart(*ends) == 0
    assert apart(ends[0], network()) > 1e-3


def test_gradients_of_weights_that_no_optimizer_moves_do_not_gather():
    ends = []
    for clear in (False, True):
        model = network()
        own = {"task": lambda parameters: torch.optim.SGD([p for p in parameters if p.shape == (3, 5)], 0.1)}
        step = AWP(AT(attack=ATTACK, optimizers=own), gamma=0.5).build(model)
        for number, (x, y) in enumerate(batches(4)):
            if clear:
                model.zero_grad()
            step(x, y, seed=number)
        ends.append(model)
    assert apart(*ends) == 0


def test_what_is_no_factory_of_an_optimizer_is_named():
    with pytest.raises(InputTypeError, match="optimizers has a int for 'task'; it must be a function"):
        AT(optimizers={"task": 3})


# --- The game -------------------------------------------------------------------------------------------------------


def test_a_weighted_loss_of_attacked_images_is_the_same_by_one_optimizer_and_by_several():
    """Running statistics included: x' is met once a step."""

    def sgd(rate, decay):
        return lambda parameters: torch.optim.SGD(parameters, rate, 0.9, weight_decay=decay)

    settings = {"attack": ATTACK, "hidden": 4, "lr": 0.05, "lr_features": 0.02, "adversarial_weight": 0.5}
    own = {"task": sgd(0.05, 1e-4), "features": sgd(0.02, 0.0)}
    one, several = AFD(**settings), AFD(**settings, optimizers=own)
    assert [type(method.build(network())) for method in (one, several)] == [JointStep, SimultaneousStep]
    assert apart(trained(one, 4), trained(several, 4)) < 1e-12


def test_a_clipped_game_clips_each_optimizers_gradient():
    assert type(AFD(clip=0.1, attack=ATTACK).build(network())) is SimultaneousStep
    assert type(AFD(attack=ATTACK).build(network())) is JointStep


# --- Balls, ramps, arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [lambda method: method, AWP])
def test_a_method_that_attacks_by_itself_is_validated_in_its_own_ball(around):
    judge = around(Free(norm="L2", eps=0.5)).judge(3)
    assert (judge.norm, judge.eps, judge.steps, judge.seed) == ("L2", 0.5, 20, 3)


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        (AT(attack=APGDSettings(eps=0.1)), "attack.rho", "a number that the host reads in each step"),
        (AT(attack=MIMSettings(eps=0.1)), "attack.decay", "a number that the host reads in each step"),
        (AT(label_smoothing=0.1), "label_smoothing", "a number that the host reads in each step"),
        (AT(clip=1.0), "clip", "a number that the host reads in each step"),
        (TRADES(beta=0.5), "beta", "which begins at its own value, 0.5; it would never change"),
        (AFD(), "adversarial_weight", "adversarial_weight, which begins at its own value, 0"),
    ],
)
def test_a_ramp_is_of_a_number_that_may_change(method, name, message):
    with pytest.raises(InputError, match=message):
        check_ramps(method, {name: Ramp(0.0 if name == "adversarial_weight" else 0.5, 1)})


def test_a_radius_grows_in_one_way():
    with pytest.raises(InputError, match="ramps has eps, which eps_warmup=1 lets grow already"):
        check_ramps(Free(), {"eps": Ramp(0.0, 1)}, 1)
    check_ramps(AWP(TRADES()), {"gamma": Ramp(0.0, 1)})


@pytest.mark.parametrize("name", ["label_smoothing", "clip"])
def test_a_number_that_the_host_reads_is_never_live(name):
    step = AT(label_smoothing=0.1, clip=1.0).build(network())
    with pytest.raises(InputError, match=f"{name} of AT is .*, no number that may change"):
        step.live(name, 0.1)


def test_an_index_below_zero_is_named():
    x, y = next(batches(1))
    step = Free(keyed="index").build(network())
    with pytest.raises(InputError, match="index holds -1; the index of an image in its data set is at least 0"):
        step(x, y, index=torch.arange(8) - 1)


def test_a_perturbation_by_index_follows_its_image():
    """Rows that come again at another place meet the δ that they have left; others begin with 0."""
    model, (x, y) = network(), next(batches(1))
    step = Free(keyed="index", eps=0.1, lr=1e-9).build(model)
    index = torch.tensor([3, 1, 0, 2, 7, 5, 4, 6])
    step(x, y, index=index)
    table = step.memory["delta"].clone()
    turned = torch.arange(7, -1, -1)
    twin = copy.deepcopy(model)
    one = step(x[turned], y[turned], index=index[turned])["task"]
    moved = (x + table[index]).clamp(0, 1)
    expected = nn.functional.cross_entropy(twin(moved[turned]), y[turned])
    torch.testing.assert_close(one, expected.detach(), rtol=1e-6, atol=1e-6)
    assert len(step.memory["delta"]) == 8


def test_features_of_another_head_are_noticed_by_a_method_without_players():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(36, 6), nn.Linear(6, 3), nn.Linear(36, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(self.body(x)), self.aux(x)

    torch.manual_seed(0)
    model, (x, y) = Two().double(), next(batches(1))
    with pytest.raises(InputError, match="the last linear layer is 'aux', but the logits are what 'head' puts out"):
        NormPenalty(attack=ATTACK).build(model)(x, y)
    NormPenalty(attack=ATTACK).build(split(model, "head"))(x, y)


def test_trades_draws_its_target_from_the_attack_unless_statistics_are_the_batchs():
    """Of a model with dropout: an attack in evaluation mode finds what it finds alone."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Dropout(0.5))
    model, (x, y) = FeatureClassifier(body, 8, 3).double().train(), next(batches(1))
    attack = PGDSettings(eps=0.1, alpha=0.05, steps=2, loss="kl", init="gaussian")
    step, found = TRADES(attack=attack, lr=1e-9).build(model), []
    inner = step.attacks._attacked
    step.attacks._attacked = lambda *given: found.append(inner(*given)) or found[-1]
    step(x, y, seed=5)
    alone = attack.build(copy.deepcopy(model))(x, y, seed=5)
    torch.testing.assert_close(found[0], alone)


def test_mart_is_finite_where_probabilities_vanish():
    model = network().float()
    with torch.no_grad():
        model.classifier.weight.mul_(1e4)
    x, y = next(batches(1))
    losses = MART(attack=ATTACK).build(model)(x.float(), y)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
