"""What one step touches, and how many passes it spends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from afd.errors import InputError
from afd.methods import AFD, Execution, Natural
from afd.nn import FeatureClassifier, split


def given(x, y, x_adv):
    """What a step is called with where the images are attacked already."""
    return {"x": x, "y": y, "x_adv": x_adv}


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
    model, step = game(schedule=schedule)
    step(**given(*batch))
    assert model.encoder.forwards == forwards
    assert model.encoder.recorded == backwards
    assert model.encoder.backwards == backwards


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_power_iteration_a_round(schedule, micro_batches, batch):
    """Only a forward in training mode takes one."""
    _, step = game(schedule=schedule, penalty=1.0, micro_batches=micro_batches)
    modes = []
    step.discriminator.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    step(**given(*batch))
    assert modes.count(True) == 1
    assert modes[0] is True
    assert len(modes) > micro_batches


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_each_player_moves_on_its_own_losses_only(schedule, batch):
    """Without a step of its own, nothing moves a player: γ = 0 leaves θ to L_C, β = 0 leaves ψ where it is."""
    model, step = game(schedule=schedule, lr_features=0.0, lr_discriminator=0.0, weight_decay=0.0)
    before = {name: p.clone() for name, p in step.discriminator.named_parameters()}
    plain = FeatureClassifier(CountingEncoder(), 5, 3)
    plain.load_state_dict(model.state_dict())
    step(**given(*batch))
    assert all(torch.equal(before[name], p) for name, p in step.discriminator.named_parameters())
    Natural(weight_decay=0.0).build(plain)(**given(*batch))
    for ours, natural in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, natural)


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_features_answer_every_so_many_rounds(schedule, batch):
    model, step = game(schedule=schedule, lr=1e-9, weight_decay=0.0, momentum=0.0, discriminator_steps=3)
    moved = []
    for _ in range(6):
        before = model.encoder.linear.weight.clone()
        step(**given(*batch))
        moved.append(bool((model.encoder.linear.weight - before).abs().max() > 1e-6))
    assert moved == [False, False, True] * 2


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_penalty_reaches_the_discriminator(schedule, batch):
    ends = []
    for penalty in (0.0, 10.0):
        _, step = game(schedule=schedule, penalty=penalty)
        step(**given(*batch))
        ends.append([parameter.detach().clone() for parameter in step.discriminator.parameters()])
    assert not all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_natural_round_is_sgd_on_cross_entropy(batch):
    x, y, _ = batch
    model = FeatureClassifier(CountingEncoder(), 5, 3)
    expected = FeatureClassifier(CountingEncoder(), 5, 3)
    expected.load_state_dict(model.state_dict())
    loss = Natural(lr=0.2, momentum=0.0, weight_decay=0.0).build(model)(x, y, x_adv=x)["task"]
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
        ({"discriminator_steps": 0}, "discriminator_steps is 0"),
        ({"optimizer": "lbfgs"}, "optimizer is 'lbfgs'; allowed are sgd, adam"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be below 1"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"micro_batches": 0}, "micro_batches is 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        AFD(**settings)


def taken(optimizer):
    return type(optimizer).__name__, {name: optimizer.defaults[name] for name in ("lr", "weight_decay")}


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
@pytest.mark.parametrize(("loss", "betas"), [("wgan", (0.0, 0.9)), ("dcgan", (0.5, 0.999))])
def test_the_adam_variant(schedule, loss, betas):
    step = AFD.adam(loss=loss, schedule=schedule, lr_features=2e-4).build(game()[0])
    rates = {"task": 1e-4, "discriminator": 1e-3, "features": 2e-4}
    assert step.optimizers.keys() == rates.keys()
    for name, optimizer in step.optimizers.items():
        assert taken(optimizer) == ("Adam", {"lr": rates[name], "weight_decay": 0.0})
        assert optimizer.defaults["betas"] == betas


def test_the_users_own_optimizers():
    own = {"task": lambda parameters: torch.optim.AdamW(parameters, lr=0.01), "features": torch.optim.Adagrad}
    step = AFD(optimizers=own).build(game()[0])
    kinds = {name: type(optimizer).__name__ for name, optimizer in step.optimizers.items()}
    assert kinds == {"task": "AdamW", "discriminator": "SGD", "features": "Adagrad"}
    natural = Natural(optimizers={"task": own["task"]}).build(game()[0])
    assert type(natural.optimizers["task"]).__name__ == "AdamW"
    with pytest.raises(InputError, match="optimizers has the key 'critic'; allowed are task, discriminator, features"):
        AFD(optimizers={"critic": torch.optim.SGD})


def test_one_optimizer_for_theta_only_where_that_is_the_same():
    assert "features" not in AFD().build(game()[0]).optimizers
    assert "features" in AFD.adam().build(game()[0]).optimizers


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_gradients_are_cut_to_their_norm(schedule, batch):
    """With a tiny norm and no momentum, an update of rate 1 is as long as the norm."""
    settings = {"momentum": 0.0, "weight_decay": 0.0, "lr": 1.0, "lr_features": 0.0}
    model, step = game(schedule=schedule, clip=1e-3, **settings)
    before = [p.detach().clone() for p in model.parameters()]
    step(**given(*batch))
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("build", [lambda **s: AFD(lr_features=0.0, **s), Natural])
def test_labels_are_smoothed(build, batch):
    x, y, x_adv = batch
    model, _ = game()
    expected = F.cross_entropy(model(x), y, label_smoothing=0.3).item()
    assert build(label_smoothing=0.3).build(model)(x, y, x_adv=x_adv)["task"].item() == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_low_precision_is_the_passes_alone(schedule, batch):
    x, y, x_adv = batch
    torch.manual_seed(0)
    model = FeatureClassifier(CountingEncoder(), 5, 3)
    kinds = []
    model.encoder.linear.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    step = AFD(hidden=4, schedule=schedule).build(model, Execution("bf16"))
    step.discriminator.register_forward_pre_hook(lambda _, inputs: kinds.append(inputs[0].dtype))
    losses = step(x, y, x_adv=x_adv)
    assert set(kinds) == {torch.bfloat16, torch.float32}
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    _, full = game(schedule=schedule)
    for name, loss in full(x, y, x_adv=x_adv).items():
        torch.testing.assert_close(losses[name], loss, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_compiled_passes_compute_the_same(schedule, batch):
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
        model = split(nn.Sequential(encoder, nn.Linear(5, 3)))
        step = AFD(hidden=4, schedule=schedule).build(model, Execution(compile=compiled))
        for _ in range(3):
            step(**given(*batch))
        ends.append([p.detach().clone() for p in model.parameters()])
    for plain, compiled in zip(*ends, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_frozen_layers_stay(schedule, batch):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 6).requires_grad_(False), nn.Linear(6, 5))
    model = FeatureClassifier(encoder, 5, 3)
    before = encoder[1].weight.clone()
    AFD(hidden=4, schedule=schedule).build(model)(**given(*batch))
    assert torch.equal(encoder[1].weight, before)
    assert encoder[1].weight.grad is None


@pytest.mark.filterwarnings("ignore")
def test_what_torch_says_of_checkpoints_and_inference_tensors_is_explained():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return self[2](checkpoint(self[1], self[0](x), use_reentrant=True))

    x, y = torch.rand(4, 6), torch.arange(4) % 2
    with pytest.raises(InputError, match="use_reentrant=True, which allows no gradients of chosen parameters"):
        AFD(lr=0.01).build(split(Checkpointed(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))))(x, y, x_adv=x)
    with torch.inference_mode():
        scale = torch.ones(6)

    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.requires_grad_() * scale)

    with pytest.raises(InputError, match=r"holds a tensor that was made in torch\.inference_mode"):
        Natural(lr=0.01).build(split(Scaled(nn.Linear(6, 2))))(x, y, x_adv=x)
