"""Schedules at points worked out by hand, the attack's warm-up, and the average of the weights."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from afd.attacks import APGD, PGD, APGDSettings, PGDSettings
from afd.errors import InputError
from afd.methods import AFD, AT, AWP, Free, Natural
from afd.methods.attacking import GivenAttack
from afd.nn import FeatureClassifier
from afd.training import Trainer
from afd.training.schedules import EpsWarmup, Rates, averaged, cosine, one_cycle, schedule_named, step


def test_step_falls_at_each_milestone():
    factors = [step((0.5, 0.8), factor=0.5)(progress) for progress in (0, 0.49, 0.5, 0.79, 0.8, 0.99)]
    assert factors == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [schedule_named("step")(epoch / 300) for epoch in (149, 150, 249, 250)] == pytest.approx([1, 0.1, 0.1, 0.01])
    with pytest.raises(InputError, match=r"milestones are \(2.0,\)"):
        step((2.0,))


def test_cosine_and_one_cycle():
    assert [cosine(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [one_cycle(p) for p in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx([0.04, 0.52, 1, (1 + 1e-4) / 2, 1e-4])


def test_all_groups_of_all_optimizers_follow():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    first = SGD([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:2], "lr": 0.1}], lr=9.0)
    second = SGD(weights[2:], lr=2.0)
    rates = Rates({"a": first, "b": second}, cosine, steps=4)
    rates.set(2)
    assert [group["lr"] for group in (*first.param_groups, *second.param_groups)] == pytest.approx([0.5, 0.05, 1.0])
    assert rates.of_step(3) == pytest.approx({"a": 0.5, "b": 1.0})
    assert rates.of_step(1) == {"a": 1.0, "b": 2.0}


def test_the_rates_grow_linearly_to_the_schedule():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    rates = Rates({"task": optimizer}, cosine, steps=10, warmup=4)
    found = []
    for done in range(10):
        rates.set(done)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([2 * cosine(done / 10) * min(1, (done + 1) / 4) for done in range(10)])
    assert rates.of_step(2) == pytest.approx({"task": found[1]})


def test_a_warm_up_of_a_run_is_in_epochs():
    torch.manual_seed(0)
    batches = [(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))] * 4
    reports = []
    trainer = Trainer(
        FeatureClassifier(nn.Flatten(), 4, 2), Natural(lr=0.4), epochs=2, schedule=lambda _: 1.0, lr_warmup=1.5,
        log_every=1, callbacks=[reports.append],
    )  # fmt: skip
    trainer.fit(batches, batches)
    rates = [report.learning_rates["task"] for report in reports if not hasattr(report, "natural")]
    assert rates == pytest.approx([0.4 * min(1, (done + 1) / 6) for done in range(8)])


def test_a_run_follows_its_schedule_round_by_round():
    torch.manual_seed(0)
    seen = []
    model = FeatureClassifier(nn.Flatten(), 4, 2)
    trainer = Trainer(model, Natural(lr=0.4), epochs=2, schedule=lambda progress: 1 - progress)
    step, real = trainer.step, trainer.step.update
    step.update = lambda batch: (seen.append(step.optimizers["task"].param_groups[0]["lr"]), real(batch))[1]
    batches = [(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))] * 2
    reports = trainer.fit(batches, batches)
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [report.learning_rates["task"] for report in reports] == pytest.approx([0.3, 0.1])


@pytest.mark.parametrize("alpha", [0.06, None])
@pytest.mark.parametrize("eps", [0.3, torch.tensor([0.3, 0.6])])
@pytest.mark.parametrize("given", [False, True])
def test_the_radius_grows_to_its_own_value(given, eps, alpha):
    """In numbers on the device, which stay where they are; alpha follows, also where it hangs on eps."""
    settings = PGDSettings(eps=eps, alpha=alpha, steps=5)
    method = AT(attack=GivenAttack(lambda model: PGD(model, **settings)) if given else settings)
    step = method.build(FeatureClassifier(nn.Flatten(), 4, 2))
    warmup = EpsWarmup(method, step, 3)
    attack = step.attacks.of(step.method.attack)
    places = attack.eps.data_ptr(), attack.alpha.data_ptr()
    length = 0.06 if alpha else torch.as_tensor(eps) / 2
    for done, share in enumerate([1 / 3, 2 / 3, 1, 1]):
        warmup.at(done)
        assert step.attacks.of(step.method.attack) is attack
        torch.testing.assert_close(attack.eps, torch.as_tensor(eps) * share, check_dtype=False)
        torch.testing.assert_close(attack.alpha, torch.as_tensor(length) * share, check_dtype=False)
    assert torch.equal(attack.eps, torch.as_tensor(eps, dtype=attack.eps.dtype))
    assert (attack.eps.data_ptr(), attack.alpha.data_ptr()) == places


@pytest.mark.parametrize("around", [lambda method: method, AWP])
def test_a_method_that_attacks_by_itself_warms_up(around):
    """δ of Free stays in the ball of its step: a quarter of the radius in the first, all of it from the fourth on."""
    method = around(Free(lr=0.0001, eps=0.2))
    step = method.build(FeatureClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 3, 3))
    warmup = EpsWarmup(method, step, 4)
    x, y = torch.full((6, 1, 2, 2), 0.5), torch.arange(6) % 3
    for number, expected in enumerate((0.05, 0.1, 0.15, 0.2, 0.2)):
        warmup.at(number)
        step(x, y)
        assert step.memory["delta"].abs().max().item() == pytest.approx(expected, rel=1e-6)


def test_a_run_without_a_warm_up_has_the_numbers_as_they_were_given():
    attack = PGDSettings(eps=0.3, steps=1)
    trainer = Trainer(FeatureClassifier(nn.Flatten(), 4, 2), AT(attack=attack, validation_attack=None))
    batches = [(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))]
    trainer.fit(batches, batches)
    assert trainer.step.method.attack is attack
    assert [one.eps for one in trainer.step.attacks] == [0.3]


def test_the_radius_of_a_run_grows():
    """Somebody else's attack, whose eps is set, and afd's own, whose eps lies on the device, move as far."""
    farthest = []

    def recording(model):
        attack = APGD(model, eps=0.2, steps=1)

        class Recording:
            eps = attack.eps

            def __call__(self, x, y, **settings):
                attack.eps = self.eps
                x_adv = attack(x, y, **settings)
                farthest.append(float((x_adv - x).abs().max()))
                return x_adv

        return Recording()

    weights = []
    for attack in (GivenAttack(recording), APGDSettings(eps=0.2, steps=1)):
        torch.manual_seed(0)
        model = FeatureClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), 4, 2)
        batches = [(torch.full((8, 1, 2, 2), 0.5), torch.arange(8) % 2)] * 4
        method = AFD(attack=attack, validation_attack=None)
        Trainer(model, method, epochs=2, eps_warmup=1.0).fit(batches, batches)
        weights.append(model.classifier.weight.detach())
    assert farthest == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2], abs=1e-6)
    torch.testing.assert_close(*weights)


def test_what_has_no_radius_is_named():
    batches = [(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))]
    method = AFD(attack=GivenAttack(lambda _: lambda *_, **__: None), validation_attack=None)
    trainer = Trainer(FeatureClassifier(nn.Flatten(), 4, 2), method, eps_warmup=1.0)
    with pytest.raises(InputError, match="attack is a function, which has no eps that a warm-up could scale"):
        trainer.fit(batches, batches)


def test_the_average_is_exponential():
    model = nn.Linear(1, 1)
    average = averaged(model, 0.75)
    values = [1.0, 2.0, 5.0]
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 5)
