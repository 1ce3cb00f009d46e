"""LLR, GAT and NuAT: second derivatives, the clean batch's statistics, nuclear norms, and which attacks are guided."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from afd.attacks import PGDSettings
from afd.data.datasets import read_digits
from afd.errors import InputError
from afd.methods import AWP, GAT, JARN, LLR, Batch, Execution, NuAT
from afd.methods.ramps import Ramp, Ramps
from afd.methods.regularized import nuclear_norm
from afd.nn import FeatureClassifier
from afd.presets import method_for

ONE = PGDSettings(eps=0.1, alpha=0.1, steps=1, init="coin-flip", start_scale=0.05, fold_batchnorm=False)


def network(norm=nn.BatchNorm2d, *more):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.Softplus(), *more, nn.Flatten(), nn.Linear(64, 5))
    return FeatureClassifier(body, 5, 3).double().train()


def batch(images=8, number=1):
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(images, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (images,), generator=generator)


def trained(method, steps=3, model=None, labels=lambda y: y):
    model = model or network()
    step = method.build(model)
    for number in range(steps):
        x, y = batch(number=number)
        losses = step(x, labels(y), seed=number)
    return model, losses


def apart(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


# --- LLR --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_gradients_of_weights_go_through_the_slope_and_through_the_statistics(norm):
    """By differences of the loss as it is written, x + δ held fixed."""
    model, (x, y) = network(norm), batch()
    method = LLR(eps=0.3, search_steps=2)
    step, found = method.build(model), []
    step.attacks.once = lambda find: found[0] if found else found.append(find()) or found[0]
    step.gather(Batch(x, y, seed=1))
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        towards, losses = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(shift * towards)
            losses.append(float(sum(step.gather(Batch(x, y, seed=1)).values())))
            with torch.no_grad():
                parameter.sub_(shift * towards)
        expected = (losses[0] - losses[1]) / 2e-5
        assert float((gradients[name] * towards).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_only_the_clean_pass_updates_running_statistics():
    model, (x, y) = network(), batch()
    alone = copy.deepcopy(model)
    alone(x)
    LLR(lr=1e-12, eps=0.3).build(model)(x, y)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(alone.named_buffers())[name], rtol=0, atol=1e-12)


def test_the_model_is_given_back_as_it_was():
    """No layer keeps a forward of ours, also after an error in the middle of a step."""

    class Failing(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 2:
                raise ValueError("as somebody's layer may")
            return x

    model, (x, y) = network(nn.BatchNorm2d, Failing()), batch()
    with pytest.raises(ValueError, match="as somebody's layer may"):
        LLR(eps=0.3).build(model)(x, y)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_layer_keeps_its_running_statistics_in_all_passes():
    model, (x, y) = network(), batch()
    layer = model.encoder[1]
    layer.eval()
    layer.running_mean.fill_(0.1)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    twin = copy.deepcopy(model)
    losses = LLR(lr=0.05, eps=0.3, search_steps=0).build(model)(x, y, seed=2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    x_adv = PGDSettings(eps=0.3, steps=0)(twin, Batch(x, y, seed=2))
    inputs = x.clone().requires_grad_()
    clean = F.cross_entropy(twin(inputs), y, reduction="none")
    (gradient,) = torch.autograd.grad(clean.sum(), inputs)
    along = ((x_adv - x) * gradient).flatten(1).sum(1)
    gap = F.cross_entropy(twin(x_adv), y, reduction="none") - clean - along
    torch.testing.assert_close(losses["linearity"], 4.0 * gap.abs().mean().detach())
    torch.testing.assert_close(losses["slope"], 1.2 * along.abs().mean().detach())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_search_widens_the_gap_within_the_ball(norm):
    x, y = batch(32)
    found = []
    for steps, ascent in ((0, "loss"), (10, "loss"), (10, "gap")):
        method = LLR(lr=1e-12, norm=norm, eps=0.3, search_steps=steps, ascent=ascent)
        step, seen = method.build(network()), []
        once = step.attacks.once
        step.attacks.once = lambda find, once=once, seen=seen: seen.append(once(find)) or seen[-1]
        found.append(float(step(x, y, seed=3)["linearity"]))
        (x_adv,) = seen
        length = (x_adv - x).flatten(1).norm(p=torch.inf if norm == "Linf" else 2, dim=1)
        assert length.max() <= 0.3 + 1e-9
        assert (x_adv >= 0).all()
        assert (x_adv <= 1).all()
    start, by_loss, by_gap = found
    assert by_loss > start
    assert by_gap > start
    assert by_gap != by_loss


def test_the_radius_is_live():
    """ε warm-up and recorded steps fill it in."""
    ends = []
    for live in (False, True):
        model = network()
        step = LLR(lr=0.05, eps=0.2, search_steps=2).build(model)
        if live:
            step = LLR(lr=0.05, eps=0.4, search_steps=2).build(model)
            step.live("eps", 0.4).fill_(0.2)
        x, y = batch()
        step(x, y, seed=1)
        ends.append(model)
    assert apart(*ends) < 1e-12


@pytest.mark.parametrize(
    "method", [LLR(lr=0.05, eps=0.2, label_smoothing=0.1), GAT(lr=0.05, attack=ONE), NuAT(lr=0.05, attack=ONE)]
)
def test_soft_labels_that_are_classes_are_classes(method):
    one, other = trained(method), trained(method, labels=lambda y: F.one_hot(y, 3).double())
    assert apart(one[0], other[0]) < 1e-12


@pytest.mark.parametrize(
    "method", [LLR(lr=0.05, eps=0.2, search_steps=2), GAT(lr=0.05, attack=ONE), NuAT(lr=0.05, attack=ONE)]
)
def test_awp_goes_around_with_images_found_once(method):
    """With γ = 0 it is the method itself (but that running statistics are a step older in an attack by them)."""
    norm = nn.BatchNorm2d if isinstance(method, LLR) else nn.Identity
    plain, *moved = (trained(one, model=network(norm))[0] for one in (method, AWP(method, 0.0), AWP(method, 0.1)))
    assert apart(plain, moved[0]) < 1e-12
    assert apart(plain, moved[1]) > 1e-4
    model, calls = network(), []
    step, (x, y) = AWP(method, gamma=0.1).build(model), batch()
    once = step.attacks.once
    step.attacks.once = lambda find: once(lambda: calls.append(1) or find())
    step(x, y)
    assert len(calls) == 1


def cosine_and_length(one, other):
    """Of all weights' gradients together: the cosine, and the ratio of lengths."""
    a, b = (torch.cat([g.flatten() for g in gradients]).double() for gradients in (one, other))
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())


def test_bfloat16_agrees_in_the_search_and_not_in_the_gradient_of_the_gap():
    """Measured after a few steps on digits: why only the search has the run's precision.

    Of a ResNet-18 of width 8, the cosine of the weights' gradients in bfloat16 and float32 was 0.71 of the gap alone
    (0.97 with SiLU in the place of softplus), of 1.2 times the length, and 0.99 of all terms; of a ConvNet, 0.01 and
    12 times. δ found in bfloat16 had a gap 12% smaller than that found in float32.
    """
    images, _ = read_digits()
    generator = torch.Generator().manual_seed(0)

    def some():
        rows = torch.randint(len(images), (32,), generator=generator)
        return images.pixels[rows].float() / images.scale, images.labels[rows]

    torch.manual_seed(0)
    layers = [(nn.Conv2d(a, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus()) for a in (1, 8, 8, 8)]
    body = nn.Sequential(*(layer for block in layers for layer in block), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = FeatureClassifier(body, 8, 10).train()
    step = LLR(lr=0.05, eps=0.1, search_steps=2).build(model)
    for number in range(20):
        step(*some(), seed=number)
    x, y = some()

    def gradients(precision, **terms):
        twin = copy.deepcopy(model)
        gap = LLR(eps=0.1, search_steps=0, **terms).build(twin)
        gap.model.passes.execution = Execution(precision)
        gap.gather(Batch(x, y, seed=5))
        return [parameter.grad for parameter in twin.parameters()]

    def found(precision):
        step = LLR(lr=1e-12, eps=0.1).build(copy.deepcopy(model), Execution(precision))
        assert step.model.passes.execution.precision == "fp32"
        return float(step(x, y, seed=5)["linearity"])

    pairs = [[gradients(one, **terms) for one in ("bf16", "fp32")]
             for terms in ({"task_weight": 0.0, "slope": 0.0}, {"linearity": 0.0, "slope": 0.0})]  # fmt: skip
    gap, task = (cosine_and_length(*pair) for pair in pairs)
    assert gap[0] < 0.95
    assert task[0] > 0.99
    assert found("bf16") > 0.7 * found("fp32")


# --- GAT and NuAT -----------------------------------------------------------------------------------------------------


def literal_gat(model, x, y, start, weight, guided):
    """One attack, from the logits of the training pass."""
    p = model(x).softmax(1).detach()
    model.eval()
    point = start.clone().requires_grad_()
    out = model(point)
    cost = F.cross_entropy(out, y) + guided * weight * (p - out.softmax(1)).square().sum(1).mean()
    (grad,) = torch.autograd.grad(cost, point)
    return torch.minimum(torch.maximum(point + 0.1 * grad.sign(), x - 0.1), x + 0.1).clamp(0, 1).detach()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_every_second_attack_is_guided(steps):
    """Also of a step that goes on from a checkpoint, by the number of steps taken."""
    model, (x, y) = network(), batch(32)
    start = replace(ONE, steps=0)(nn.Flatten(), Batch(x, y, seed=4))
    ways = [literal_gat(copy.deepcopy(model), x, y, start, 50.0, guided) for guided in (0, 1)]
    assert not torch.equal(*ways)
    step, found = GAT(lr=1e-12, weight=50.0, attack=ONE).build(model), []
    once = step.attacks.once
    step.attacks.once = lambda find: found.append(once(find)) or found[-1]
    step.steps = steps
    assert step.kind() == (bool(steps % 2), False)
    step(x, y, seed=4)
    torch.testing.assert_close(found[0], ways[steps % 2], rtol=0, atol=1e-12)


def test_the_weight_grows_in_its_epoch():
    x, y = batch()
    found = []
    for epoch in (2, 3, 4):
        step = GAT(lr=1e-12, weight=2.0, growth=5.0, growth_epoch=3, attack=ONE).build(network())
        step.epoch = epoch
        assert step.kind()[1] == (epoch >= 3)
        found.append(float(step(x, y, seed=1)["distance"]))
    assert found[1:] == pytest.approx([5 * found[0]] * 2)


@pytest.mark.parametrize("kind", [GAT, NuAT])
def test_an_attack_with_a_loss_of_its_own_is_as_it_is_told(kind):
    def mine(outputs, target):
        return -outputs.gather(1, target[:, None]).squeeze(1)

    own = replace(ONE, loss=mine)
    for steps in (0, 1):
        model, (x, y) = network(), batch()
        step, found = kind(lr=1e-12, attack=own).build(model), []
        once = step.attacks.once
        step.attacks.once = lambda find, once=once, found=found: found.append(once(find)) or found[-1]
        step.steps = steps
        twin = copy.deepcopy(model)
        twin(x)
        step(x, y, seed=1)
        torch.testing.assert_close(found[0], own(twin, Batch(x, y, seed=1)))


def test_the_weight_goes_along_a_ramp():
    """As its authors' does: in the attack, too."""
    model = network()
    method = NuAT(lr=1e-12, weight=4.0, attack=ONE)
    step = method.build(model)
    ramps = Ramps(method, step, {"weight": Ramp(0.0, 2)}, 4)
    for done in range(10):
        ramps.at(done)
        weight = min(1.0, (done + 1) / 8) * 4
        expected = network()
        expected.load_state_dict(model.state_dict())
        other = NuAT(lr=1e-12, weight=weight, attack=ONE).build(expected)
        other.steps = step.steps
        x, y = batch(number=done)
        found, told = step(x, y, seed=done), other(x, y, seed=done)
        torch.testing.assert_close(found["distance"], told["distance"])


@pytest.mark.parametrize("shape", [(16, 4), (4, 16), (5, 5), (7, 1), (1, 7)])
@pytest.mark.parametrize("spread", [0, 3, 6])
def test_the_nuclear_norm_is_the_sum_of_singular_values(shape, spread):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    m = ((u * torch.logspace(1, 1 - spread, len(s), dtype=torch.float64)) @ v).requires_grad_()
    norm = nuclear_norm(m)
    (gradient,) = torch.autograd.grad(norm, m)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(m, "nuc"), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, u @ v, rtol=0, atol=1e-10)
    assert spread == 6 or torch.autograd.gradcheck(nuclear_norm, (m,))  # whose differences are too large for those
    narrow = m.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(narrow), narrow)
    torch.testing.assert_close(nuclear_norm(narrow).double(), norm, rtol=1e-5, atol=0)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize(
    "m",
    [
        torch.zeros(6, 3), torch.ones(6, 3), torch.eye(6)[:, :3], torch.full((6, 3), 1e-30), torch.full((6, 3), 1e30),
        torch.tensor([[1.0, 0, 0], [0, 1e-9, 0], [0, 0, 0], [0, 0, 0]]),
    ],
)  # fmt: skip
def test_where_singular_values_are_equal_or_none_the_gradient_is_finite_and_none_longer_than_1(m):
    m = m.requires_grad_()
    norm = nuclear_norm(m)
    (gradient,) = torch.autograd.grad(norm, m)
    assert norm.isfinite()
    assert gradient.isfinite().all()
    assert torch.linalg.matrix_norm(gradient, 2) < 1 + 1e-6
    assert m.any() or not gradient.any()


def test_nothing_waits_in_a_nuclear_norm():
    """No operation in it looks at values, as of `torch.linalg.svd` on CUDA: all are products and sums."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names, m = set(), torch.rand(6, 3, requires_grad=True)
    with Names():
        torch.autograd.grad(nuclear_norm(m), m)
    assert {"mm", "addmm"} <= names
    assert not {name for name in names if "svd" in name or "eig" in name or name in ("item", "_local_scalar_dense")}


# --- Found by trying --------------------------------------------------------------------------------------------------


class Attentive(nn.Module):
    """A model with torch's attention, whose fused kernel has a gradient that cannot be differentiated."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 3, stride=3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("method", [LLR(eps=0.1), JARN(eps=0.1)], ids=["llr", "jarn"])
def test_a_layer_that_cannot_be_differentiated_twice_is_told(method):
    x, y = batch()
    told = r"a layer whose gradient torch cannot differentiate \(derivative for .*attention.*SDPBackend.MATH"
    with pytest.raises(InputError, match=told):
        method.build(Attentive())(x.float(), y)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses = method.build(Attentive())(x.float(), y)
    assert all(loss.isfinite() for loss in losses.values())


def test_one_step_keeps_its_proportions_in_other_norms():
    """The step is as long as the radius, and the start half as far; 2.5 times the radius is for several steps."""
    attack = method_for("digits", "gat", norm="L2", eps=1.5).attack
    assert (attack.norm, attack.alpha, attack.start_scale) == ("L2", 1.5, 0.75)
    union = method_for("digits", "gat", attack="union").attack
    assert (union.alpha, union.alpha_l2, union.alpha_l1) == (union.eps, union.eps_l2, union.eps_l1)
    assert method_for("digits", "trades", norm="L2", eps=1.5).attack.alpha is None
