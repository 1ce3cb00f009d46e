"""Both schedules against a slow, literal transcription of the formulas: 20 steps in float64, parameters to 1e-10.

The transcription shares no code with afd: an explicit network, hand-written spectral norms, every gradient taken by a
separate `torch.autograd.grad`, every momentum buffer a plain tensor. The game is given a discriminator written here, so
that this is a test of the game and of nothing else.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import UnionSettings
from afd.methods import AFD, Execution
from afd.methods.game import AlternatingStep, JointStep, SimultaneousStep
from afd.nn import FeatureClassifier

ALPHA, BETA, GAMMA, MOMENTUM, DECAY = 0.1, 0.07, 0.3, 0.9, 1e-2
CLASSES, FEATURES, BATCH, ROUNDS = 3, 5, 6, 20
ROUNDS_OF = {"joint": JointStep, "separate": SimultaneousStep, "alternating": AlternatingStep}


def tiny_model():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, FEATURES))
    return FeatureClassifier(encoder, FEATURES, CLASSES).double()


def batches(copies=1):
    """x, y, and attacked copies of x: several of an image beside each other."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(ROUNDS):
        x = torch.rand(BATCH, 2, 2, 2, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        beside = x.repeat_interleave(copies, 0)
        yield x, y, (beside + 0.1 * torch.randn(beside.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


def of_each(y, x_adv):
    return torch.stack([y[row * len(y) // len(x_adv)] for row in range(len(x_adv))])


class Critic(nn.Module):
    """D as a game wants it: a forward in training mode takes one power iteration, one in evaluation mode none."""

    SHAPES = ((4, FEATURES), (4, 4), (1, 4), (CLASSES, 4))

    def __init__(self):
        super().__init__()
        self.spectral = nn.ParameterList(torch.randn(shape) for shape in self.SHAPES)
        self.biases = nn.ParameterList(torch.randn(rows) for rows, _ in self.SHAPES[:-1])
        self.u = nn.ParameterList(nn.Parameter(torch.randn(rows), False) for rows, _ in self.SHAPES)
        self.v = nn.ParameterList(nn.Parameter(torch.randn(columns), False) for _, columns in self.SHAPES)

    def forward(self, z, y=None):
        if self.training:
            power_iteration(self)
        return score(self, z, y)


@torch.no_grad()
def power_iteration(d):
    for weight, u, v in zip(d.spectral, d.u, d.v, strict=True):
        u.copy_(weight @ v / (weight @ v).norm())
        v.copy_(weight.T @ u / (weight.T @ u).norm())


def score(d, z, y):
    # copies, because the next power iteration overwrites what a backward still needs
    norms = [u.clone() @ weight @ v.clone() for weight, u, v in zip(d.spectral, d.u, d.v, strict=True)]
    w1, w2, w, e = [weight / norm for weight, norm in zip(d.spectral, norms, strict=True)]
    h = F.leaky_relu(z @ w1.T + d.biases[0], 0.2)
    h = F.leaky_relu(h @ w2.T + d.biases[1], 0.2)
    plain = (h @ w.T).squeeze(1) + d.biases[2]
    return plain if y is None else plain + (e[y] * h).sum(1)


class Players:
    """θ, φ, ψ as lists of plain tensors, and the three networks as formulas."""

    def __init__(self, model, discriminator):
        def plain(tensors):
            return [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]

        self.theta, self.phi = plain(model.encoder.parameters()), plain(model.classifier.parameters())
        self.spectral, self.biases = plain(discriminator.spectral), plain(discriminator.biases)
        self.u, self.v = plain(discriminator.u), plain(discriminator.v)

    @property
    def psi(self):
        return self.spectral + self.biases

    def F(self, x):
        w1, b1, w2, b2 = self.theta
        z = torch.tanh(x.flatten(1) @ w1.T + b1) @ w2.T + b2
        return z / z.square().sum(1, keepdim=True).sqrt()

    def C(self, z):
        return z @ self.phi[0].T + self.phi[1]

    def power_iteration(self):
        power_iteration(self)

    def D(self, z, y):
        return score(self, z, y)


def softplus(t):
    return torch.log(1 + torch.exp(t))


L_D = {
    "dcgan": lambda d, d_adv: softplus(-d).mean() + softplus(d_adv).mean(),
    "wgan": lambda d, d_adv: d_adv.mean() - d.mean(),
    "hinge": lambda d, d_adv: (1 - d).clamp(min=0).mean() + (1 + d_adv).clamp(min=0).mean(),
}
L_F = {"dcgan": lambda d: softplus(-d).mean(), "wgan": lambda d: -d.mean(), "hinge": lambda d: -d.mean()}


def L_C(p, x, y):
    return -F.log_softmax(p.C(p.F(x)), 1)[torch.arange(len(y)), y].mean()


def divergence(p, x, x_adv):
    """KL(p(x) ‖ p(x')), a mean over attacked images."""
    clean, attacked = (F.log_softmax(p.C(p.F(one)), 1) for one in (x, x_adv))
    clean = torch.stack([clean[row * len(x) // len(x_adv)] for row in range(len(x_adv))])
    return (clean.exp() * (clean - attacked)).sum(1).mean()


def L_C_of_both(p, x, y, x_adv, weights):
    return L_C(p, x, y) + weights[0] * L_C(p, x_adv, of_each(y, x_adv)) + weights[1] * divergence(p, x, x_adv)


class SGD:
    """v ← μ v + g + λ p, p ← p - lr v."""

    def __init__(self, parameters, lr, decay=0.0):
        self.parameters, self.lr, self.decay = parameters, lr, decay
        self.v = [torch.zeros_like(p) for p in parameters]

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.parameters)

    @torch.no_grad()
    def step(self, gradient):
        for p, v, g in zip(self.parameters, self.v, gradient, strict=True):
            v.mul_(MOMENTUM).add_(g).add_(self.decay * p)
            p -= self.lr * v


def optimizers(p):
    return SGD(p.theta + p.phi, ALPHA, DECAY), SGD(p.psi, BETA), SGD(p.theta, GAMMA)


def simultaneous(p, loss, weights=(0.0, 0.0), copies=1):
    task, critic, features = optimizers(p)
    for x, y, x_adv in batches(copies):
        p.power_iteration()
        g_task = task.gradient(L_C_of_both(p, x, y, x_adv, weights))
        g_critic = critic.gradient(L_D[loss](p.D(p.F(x), y), p.D(p.F(x_adv), of_each(y, x_adv))))
        g_features = features.gradient(L_F[loss](p.D(p.F(x_adv), of_each(y, x_adv))))
        task.step(g_task)
        critic.step(g_critic)
        features.step(g_features)


def one_optimizer(p, loss, weights=(0.0, 0.0), copies=1):
    """The simultaneous step as one optimizer on L_C + (γ/α) L_F for (θ, φ), beside one on L_D for ψ."""
    joint, critic, _ = optimizers(p)
    for x, y, x_adv in batches(copies):
        p.power_iteration()
        task = L_C_of_both(p, x, y, x_adv, weights)
        g_joint = joint.gradient(task + GAMMA / ALPHA * L_F[loss](p.D(p.F(x_adv), of_each(y, x_adv))))
        g_critic = critic.gradient(L_D[loss](p.D(p.F(x), y), p.D(p.F(x_adv), of_each(y, x_adv))))
        joint.step(g_joint)
        critic.step(g_critic)


def alternating(p, loss, weights=(0.0, 0.0), copies=1):
    task, critic, features = optimizers(p)
    for x, y, x_adv in batches(copies):
        task.step(task.gradient(L_C_of_both(p, x, y, x_adv, weights)))
        p.power_iteration()
        critic.step(critic.gradient(L_D[loss](p.D(p.F(x), y), p.D(p.F(x_adv), of_each(y, x_adv)))))
        features.step(features.gradient(L_F[loss](p.D(p.F(x_adv), of_each(y, x_adv)))))


def play(schedule, loss, transcription, weights=(0.0, 0.0), copies=1, **settings):
    """Runs afd's step and the transcription from the same start; returns start, afd's end, the transcription's end."""
    torch.manual_seed(0)
    model = tiny_model()
    rates = {"lr": ALPHA, "lr_discriminator": BETA, "lr_features": GAMMA, "weight_decay": DECAY}
    discriminator = Critic().double()
    execution = Execution(channels_last=False)
    if copies == 3:
        settings["attack"] = UnionSettings(eps=0.1, eps_l2=0.5, eps_l1=2.0, choice="average")
    weighted = dict(zip(("adversarial_weight", "divergence_weight"), weights, strict=True))
    method = AFD(loss=loss, **weighted, **rates, **settings)
    game = ROUNDS_OF[schedule](method, model, execution, execution.passes(model), discriminator)
    start = Players(model, discriminator)
    literal = copy.deepcopy(start)
    for x, y, x_adv in batches(copies):
        game(x, y, x_adv=x_adv)
    transcription(literal, loss, weights, copies)
    return start, Players(model, discriminator), literal


@pytest.mark.parametrize("loss", ["dcgan", "wgan", "hinge"])
@pytest.mark.parametrize(
    ("schedule", "transcription"),
    [
        ("joint", simultaneous), ("joint", one_optimizer), ("separate", simultaneous), ("alternating", alternating),
    ],
)  # fmt: skip
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(
    "weights", [(0.0, 0.0), (0.4, 0.0), (0.0, 0.7), (0.4, 0.7)],
    ids=["", "with a loss of attacked images", "with the divergence", "with both"],
)  # fmt: skip
@pytest.mark.parametrize("copies", [1, 3], ids=["", "with three attacked images of each"])
def test_twenty_rounds_equal_the_literal_formulas(schedule, loss, transcription, micro_batches, weights, copies):
    start, ours, literal = play(schedule, loss, transcription, weights, copies, micro_batches=micro_batches)
    for group in ("theta", "phi", "psi", "u", "v"):
        ends = list(zip(getattr(start, group), getattr(ours, group), getattr(literal, group), strict=True))
        for _, got, expected in ends:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        assert any((before - got).abs().max() > 1e-3 for before, got, _ in ends), f"{group} did not move"


class Adam(SGD):
    """p ← p - lr m̂ / (√v̂ + 1e-8), m̂ and v̂ the unbiased averages of g and g²."""

    def __init__(self, parameters, lr, betas):
        super().__init__(parameters, lr)
        self.m, self.betas, self.t = [torch.zeros_like(p) for p in parameters], betas, 0

    @torch.no_grad()
    def step(self, gradient):
        self.t += 1
        first, second = self.betas
        for p, m, v, g in zip(self.parameters, self.m, self.v, gradient, strict=True):
            m.mul_(first).add_((1 - first) * g)
            v.mul_(second).add_((1 - second) * g * g)
            p -= self.lr * (m / (1 - first**self.t)) / ((v / (1 - second**self.t)).sqrt() + 1e-8)


@pytest.mark.parametrize("betas", [{"dcgan": (0.5, 0.999)}, {"wgan": (0.0, 0.9)}], ids=["dcgan", "wgan"])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.4, 0.7)])
def test_the_joint_schedule_has_one_adam_for_features_and_classifier(monkeypatch, betas, weights):
    ((loss, both),) = betas.items()
    rates = {"lr": 0.01, "lr_discriminator": 0.02, "lr_features": 0.003, "weight_decay": 0.0}

    def one_adam(p, loss, weights, _copies):
        joint, critic = Adam(p.theta + p.phi, rates["lr"], both), Adam(p.psi, rates["lr_discriminator"], both)
        for x, y, x_adv in batches():
            p.power_iteration()
            task = L_C_of_both(p, x, y, x_adv, weights)
            g_joint = joint.gradient(task + 0.3 * L_F[loss](p.D(p.F(x_adv), y)))
            g_critic = critic.gradient(L_D[loss](p.D(p.F(x), y), p.D(p.F(x_adv), y)))
            joint.step(g_joint)
            critic.step(g_critic)

    for name, value in zip(("ALPHA", "BETA", "GAMMA", "DECAY"), rates.values(), strict=True):
        monkeypatch.setitem(globals(), name, value)
    assert type(AFD.adam(schedule="joint").build(tiny_model())) is JointStep
    start, ours, literal = play("joint", loss, one_adam, weights, optimizer="adam")
    for group in ("theta", "phi", "psi"):
        ends = list(zip(getattr(start, group), getattr(ours, group), getattr(literal, group), strict=True))
        for _, got, expected in ends:
            # the last bias of a critic has no gradient but rounding, which Adam scales up
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-8 if loss == "wgan" else 1e-10)
        assert any((before - got).abs().max() > 1e-3 for before, got, _ in ends), f"{group} did not move"


def test_the_schedules_are_different_algorithms():
    _, simultaneous_end, _ = play("joint", "wgan", simultaneous)
    _, alternating_end, _ = play("alternating", "wgan", alternating)
    assert (simultaneous_end.theta[0] - alternating_end.theta[0]).abs().max() > 1e-4
