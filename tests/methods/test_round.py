"""What one round touches, and how many passes it spends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.errors import InputError
from afd.methods import AFD, Natural
from afd.nn import FeatureClassifier


@pytest.fixture
def batch():
    torch.manual_seed(1)
    x = torch.rand(6, 2, 2, 2)
    return x, torch.randint(3, (6,)), (x + 0.1).clamp(0, 1)


class CountingEncoder(nn.Module):
    """Counts its forwards, those that record a graph, and its backwards."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 5)
        self.forwards = self.recorded = self.backwards = 0

    def forward(self, x):
        self.forwards += 1
        out = self.linear(x.flatten(1))
        if out.requires_grad:
            self.recorded += 1
            out.register_hook(self._count_backward)
        return out

    def _count_backward(self, _grad):
        self.backwards += 1


def game(**settings):
    torch.manual_seed(0)
    model = FeatureClassifier(CountingEncoder(), 5, 3)
    return model, AFD(hidden=4, **settings).build(model)


@pytest.mark.parametrize(("schedule", "forwards", "backwards"), [("simultaneous", 2, 2), ("alternating", 3, 2)])
def test_passes_through_the_features(schedule, forwards, backwards, batch):
    """Simultaneous: x and x' once each, both ways. Alternating: three forwards, of which two go backward."""
    model, round_ = game(schedule=schedule)
    round_.step(*batch)
    assert model.encoder.forwards == forwards
    assert model.encoder.recorded == backwards
    assert model.encoder.backwards == backwards


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_power_iteration_a_round(schedule, micro_batches, batch):
    """Only a forward in training mode takes one."""
    _, round_ = game(schedule=schedule, penalty=1.0, micro_batches=micro_batches)
    modes = []
    round_.discriminator.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    round_.step(*batch)
    assert modes.count(True) == 1
    assert modes[0] is True
    assert len(modes) > micro_batches


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_each_player_moves_on_its_own_losses_only(schedule, batch):
    """Without a step of its own, nothing moves a player: γ = 0 leaves θ to L_C, β = 0 leaves ψ where it is."""
    model, round_ = game(schedule=schedule, lr_features=0.0, lr_discriminator=0.0, weight_decay=0.0)
    before = {name: p.clone() for name, p in round_.discriminator.named_parameters()}
    plain = FeatureClassifier(CountingEncoder(), 5, 3)
    plain.load_state_dict(model.state_dict())
    round_.step(*batch)
    assert all(torch.equal(before[name], p) for name, p in round_.discriminator.named_parameters())
    Natural(weight_decay=0.0).build(plain).step(*batch)
    for ours, natural in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, natural)


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_features_answer_every_so_many_rounds(schedule, batch):
    model, round_ = game(schedule=schedule, lr=1e-9, weight_decay=0.0, momentum=0.0, discriminator_rounds=3)
    moved = []
    for _ in range(6):
        before = model.encoder.linear.weight.clone()
        round_.step(*batch)
        moved.append(bool((model.encoder.linear.weight - before).abs().max() > 1e-6))
    assert moved == [False, False, True] * 2


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_penalty_reaches_the_discriminator(schedule, batch):
    ends = []
    for penalty in (0.0, 10.0):
        _, round_ = game(schedule=schedule, penalty=penalty)
        round_.step(*batch)
        ends.append([parameter.detach().clone() for parameter in round_.discriminator.parameters()])
    assert not all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_natural_round_is_sgd_on_cross_entropy(batch):
    x, y, _ = batch
    model = FeatureClassifier(CountingEncoder(), 5, 3)
    expected = FeatureClassifier(CountingEncoder(), 5, 3)
    expected.load_state_dict(model.state_dict())
    loss = Natural(lr=0.2, momentum=0.0, weight_decay=0.0).build(model).step(x, y, x)["task"]
    reference = F.cross_entropy(expected(x), y)
    grads = torch.autograd.grad(reference, list(expected.parameters()))
    torch.testing.assert_close(loss, reference.detach())
    for p, q, g in zip(model.parameters(), expected.parameters(), grads, strict=True):
        torch.testing.assert_close(p, q - 0.2 * g)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "gan"}, "loss is 'gan'"),
        ({"schedule": "both"}, "schedule is 'both'; allowed are simultaneous, alternating"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr_features": -1.0}, "lr_features is -1.0"),
        ({"discriminator_rounds": 0}, "discriminator_rounds is 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        AFD(**settings)
