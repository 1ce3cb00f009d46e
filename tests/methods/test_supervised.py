"""The seam: what a supervised method is told by, held to literal transcriptions in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_methods import Perturbed, Replays, Steady

from afd.attacks import PGDSettings
from afd.errors import AfdError, InputError, InputTypeError
from afd.methods import AFD, AT, Batch, Execution, Natural, Supervised
from afd.methods.base import parts
from afd.nn import FeatureClassifier, ResNet18, split

STEPS = 20


def network(dtype=torch.float64, norm=True):
    """A small network with BatchNorm, in training mode."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()]
    encoder = nn.Sequential(*layers, nn.Linear(4 * 36, 8))
    return FeatureClassifier(encoder, 8, 3).to(dtype).train()


def batches(count, size=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.rand(size, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(3, (size,), generator=generator)


def same(one, other, tolerance=0.0):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --- AT, literally ----------------------------------------------------------------------------------------------------


def attacked(model, x, y, mode, start, eps, alpha, steps):
    """PGD as released code writes it, in each of the four modes of BatchNorm; the model is in training mode."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    kept = [copy.deepcopy(layer.state_dict()) for layer in norms]
    if mode == "eval":
        model.eval()
    elif mode == "clean":
        inputs = []
        hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach())) for layer in norms]
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()
        for layer, seen, state in zip(norms, inputs, kept, strict=True):
            layer.load_state_dict(state)
            layer.running_mean.copy_(seen.mean((0, 2, 3)))
            layer.running_var.copy_(seen.var((0, 2, 3), unbiased=False))
        model.eval()
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + alpha * grad.sign()
        x_adv = torch.maximum(torch.minimum(x_adv, x + eps), x - eps).clamp(0, 1)
    model.train()
    if mode in ("batch", "clean"):
        for layer, state in zip(norms, kept, strict=True):
            layer.load_state_dict(state)
    return x_adv.detach()


@pytest.mark.parametrize("mode", ["eval", "train", "batch", "clean"])
def test_adversarial_training_is_the_literal_loop(mode):
    """Twenty steps: weights, momentum, running statistics and counts of the network are the transcription's."""
    settings = PGDSettings(eps=0.2, alpha=0.08, steps=4, batchnorm=mode, fold_batchnorm=False)
    ours, theirs = network(), network()
    step = AT(lr=0.05, attack=settings).build(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    start = PGDSettings(eps=0.2, steps=0)
    for number, (x, y) in enumerate(batches(STEPS)):
        first = start(theirs, Batch(x, y, seed=number))
        x_adv = attacked(theirs, x, y, mode, first, 0.2, 0.08, 4)
        loss = F.cross_entropy(theirs(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = step(x, y, seed=number)["task"]
        torch.testing.assert_close(found, loss.detach(), rtol=1e-9, atol=1e-9)
    same(ours, theirs, 1e-8)
    assert all(module.training for module in ours.modules())
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_the_modes_of_batchnorm_make_different_networks():
    """What the transcriptions above agree with is not one and the same thing."""
    ends = []
    for mode in ("eval", "train", "batch", "clean"):
        model = network()
        step = AT(lr=0.05, attack=PGDSettings(eps=0.2, alpha=0.08, steps=4, batchnorm=mode)).build(model)
        for x, y in batches(3):
            step(x, y)
        ends.append(torch.cat([value.double().flatten() for value in model.state_dict().values()]))
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert not torch.allclose(one, other, rtol=0, atol=1e-6)


def test_natural_training_is_sgd_on_the_cross_entropy():
    ours, theirs = network(), network()
    step = Natural(lr=0.05, label_smoothing=0.1, clip=0.5).build(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        step(x, y)
    same(ours, theirs, 1e-12)


# --- The three toys ---------------------------------------------------------------------------------------------------


def test_a_method_may_step_the_weights_inside_its_attack():
    ours, theirs = network(), network()
    step = Replays(lr=0.05, eps=0.1, replays=3).build(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for x, y in batches(4):
        delta = torch.zeros_like(x)
        for _ in range(3):
            moved = (x + delta).clamp(0, 1).requires_grad_()
            optimizer.zero_grad()
            loss = F.cross_entropy(theirs(moved), y)
            loss.backward()
            optimizer.step()
            delta = (delta + 0.1 * moved.grad.sign()).clamp(-0.1, 0.1)
        assert step(x, y)["task"].item() == pytest.approx(loss.item(), rel=1e-9)
    same(ours, theirs, 1e-10)
    assert ours.encoder[1].num_batches_tracked == 12


def wrapped(around, gamma=0.05, **settings):
    """AT, and inside of as many wrappers."""
    method = AT(lr=0.05, attack=PGDSettings(eps=0.1, alpha=0.04, steps=2, fold_batchnorm=False), **settings)
    for _ in range(around):
        method = Perturbed(method, gamma=gamma)
    return method


def test_a_wrapper_may_step_at_perturbed_weights():
    """x' is found once, at the weights as they are; gradient and optimizer's step are those at w + v."""
    ours, theirs = network(), network()
    step = wrapped(1).build(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    start = PGDSettings(eps=0.1, steps=0)
    for number, (x, y) in enumerate(batches(4)):
        x_adv = attacked(theirs, x, y, "eval", start(theirs, Batch(x, y, seed=number)), 0.1, 0.04, 2)
        optimizer.zero_grad()
        F.cross_entropy(theirs(x_adv), y).backward()
        moved = [p for p in theirs.parameters() if p.dim() > 1]
        v = [0.05 * p.detach().norm() * p.grad / p.grad.norm() for p in moved]
        with torch.no_grad():
            for p, move in zip(moved, v, strict=True):
                p += move
        optimizer.zero_grad()
        F.cross_entropy(theirs(x_adv), y).backward()
        optimizer.step()
        with torch.no_grad():
            for p, move in zip(moved, v, strict=True):
                p -= move
        step(x, y, seed=number)
    same(ours, theirs, 1e-9)


def test_wrappers_nest_and_hand_on_what_is_inside():
    method = wrapped(2, clip=1.0)
    assert method.core is method.method.method
    assert method.attack is method.core.attack
    assert method.validation_attack == "pgd-20"
    assert method.judge(3).steps == 20
    losses = method.build(network())(*next(batches(1)))
    assert losses["task"].isfinite()


def test_a_wrapper_goes_around_a_method_that_steps_inside_its_attack():
    """Each of its steps is the wrapper's; with a move of length 0 nothing is different."""
    ends = []
    for method in (Replays(lr=0.05), Perturbed(Replays(lr=0.05), gamma=0.0), Perturbed(Replays(lr=0.05), gamma=0.1)):
        model = network(norm=False)
        step = method.build(model)
        for x, y in batches(3):
            step(x, y)
        ends.append(model)
    same(ends[0], ends[1], 1e-12)
    with pytest.raises(AssertionError):
        same(ends[0], ends[2], 1e-6)


def test_a_method_may_ask_for_no_labels():
    model = network()
    step = Steady(lr=0.05).build(model)
    before = copy.deepcopy(model)
    for x, _ in batches(3):
        losses = step(x)
    assert set(losses) == {"near", "apart"}
    with pytest.raises(AssertionError):
        same(model, before)
    assert torch.equal(model.classifier.weight, before.classifier.weight)  # which has no part in it


# --- What is done once for all methods --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [AT(lr=0.05, attack=PGDSettings(eps=0.1, steps=2, fold_batchnorm=False)), Replays(), wrapped(1)]
)
def test_micro_batches_gather_the_gradients_of_the_batch(method):
    ends, found = [], []
    for count in (1, 3):
        model = network(norm=False)
        core = method.core
        smaller = type(core)(**{**vars(core), "micro_batches": count})
        whole = (
            smaller
            if method is core
            else type(method)(smaller, **{k: v for k, v in vars(method).items() if k != "method"})
        )
        step = whole.build(model)
        for x, y in batches(3):
            losses = step(x, y)
        ends.append(model)
        found.append(losses["task"].item())
    same(*ends, 1e-10)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize(("images", "count"), [(7, 3), (10, 1), (10, 4), (5, 4), (3, 8), (1, 2), (9, 4)])
def test_parts_are_the_batch_in_order(images, count):
    x, y = torch.arange(images).float()[:, None], torch.arange(images)
    found = list(parts(Batch(x, y, index=10 + y, seed=4, first_sample=100), count, x_adv=-x))
    assert torch.equal(torch.cat([part.x for part in found]), x)
    assert torch.equal(torch.cat([part.index for part in found]), 10 + y)
    assert torch.equal(torch.cat([part.x_adv for part in found]), -x)
    assert [part.first_sample - 100 for part in found] == [int(part.y[0]) for part in found]
    assert sum(part.share for part in found) == pytest.approx(1)
    assert [part.first for part in found] == [True] + [False] * (len(found) - 1)
    assert [part.last for part in found] == [False] * (len(found) - 1) + [True]
    assert images == 1 or min(len(part) for part in found) > 1 or count >= images


def test_soft_labels_go_through_attack_and_loss():
    """A class, written as a distribution, is that class; a mixture is the mixture of its losses."""
    hard, soft = network(), network()
    attack = PGDSettings(eps=0.1, alpha=0.05, steps=3, fold_batchnorm=False)
    for model, form in ((hard, lambda y: y), (soft, lambda y: F.one_hot(y, 3).double())):
        step = AT(lr=0.05, attack=attack).build(model)
        for x, y in batches(3):
            step(x, form(y))
    same(hard, soft, 1e-10)
    (x, y), mixed = next(batches(1)), torch.full((10, 3), 1 / 3, dtype=torch.float64)
    model = network(norm=False)
    loss = Natural(lr=0.05).build(copy.deepcopy(model))(x, mixed)["task"]
    each = [F.cross_entropy(model(x), torch.full((10,), k)) for k in range(3)]
    assert loss.item() == pytest.approx(sum(each).item() / 3, rel=1e-9)


def test_a_step_counts_itself_and_seeds_its_attack_by_it():
    attack = PGDSettings(eps=0.1, steps=1)
    ends = []
    for seeds in ((None, None), (0, 1), (0, 0)):
        model = network()
        step = AT(lr=0.05, attack=attack).build(model)
        for (x, y), seed in zip(batches(2), seeds, strict=True):
            step(x, y, seed=seed)
        assert step.steps == 2
        ends.append(model)
    same(ends[0], ends[1])
    with pytest.raises(AssertionError):
        same(ends[0], ends[2])


def test_attacked_images_that_are_given_are_not_attacked_again():
    (x, y), model = next(batches(1)), network()
    x_adv = (x + 0.05).clamp(0, 1)
    twin = copy.deepcopy(model)
    AT(lr=0.05, micro_batches=2).build(model)(x, y, x_adv=x_adv)
    Natural(lr=0.05, micro_batches=2, weight_decay=5e-4).build(twin)(x_adv, y)
    same(model, twin, 1e-12)


def test_attacks_stay_built_from_step_to_step():
    step = AT(lr=0.01, attack=PGDSettings(eps=0.1, steps=1)).build(network())
    built = []
    for x, y in batches(3):
        step(x, y)
        built.append(list(step.attacks))
    assert [len(one) for one in built] == [1, 1, 1]
    assert built[0][0] is built[2][0]
    assert built[0][0].model is step.network


def test_the_attack_has_the_precision_of_the_passes_unless_it_names_one():
    precisions = []
    for attack in (PGDSettings(steps=1), PGDSettings(steps=1, precision="fp32")):
        step = AT(lr=0.01, attack=attack).build(network(torch.float32), Execution("bf16"))
        step(*next(batches(1, dtype=torch.float32)))
        precisions.append(next(iter(step.attacks)).precision)
    assert precisions == ["bf16", "fp32"]


@pytest.mark.parametrize("method", [Natural(lr=0.01), AT(lr=0.01, attack=PGDSettings(steps=1)), AFD(lr=0.01)])
def test_any_classifier_is_trained_without_a_trainer(method):
    """In a loop of somebody's own: any module, plain batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3)).train()
    before = copy.deepcopy(model)
    step = method.build(model)
    for x, y in batches(2, dtype=torch.float32):
        losses = step(x, y)
    assert all(loss.isfinite() and not loss.requires_grad for loss in losses.values())
    with pytest.raises(AssertionError):
        same(model, before)


def test_a_wrapped_model_is_refused_as_its_passes_would_be_missed():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    with pytest.raises(InputError, match="wrap=partial"):
        AT().build(Wrapped())


def test_a_method_whose_losses_reach_no_weight_is_an_error():
    class Constant(Supervised):
        def losses(self, _model, _batch):
            return {"task": torch.zeros(())}

    with pytest.raises(InputError, match="nothing to train"):
        Constant().build(network())(*next(batches(1)))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (lambda loss: loss, "are a Tensor; it must be a dict of terms"),
        (lambda _: {}, "are an empty dict"),
        (lambda _: {"task": 1.0}, "have 'task', which is a float"),
        (lambda loss: {"task": loss, "each": loss.expand(10)}, r"have 'each' of shape \[10\]"),
    ],
)
def test_losses_of_another_form_are_named(terms, message):
    class Strange(Natural):
        def losses(self, model, batch):
            return terms(self.cross_entropy(model(batch.x), batch.y))

    with pytest.raises(AfdError, match=f"the losses of Strange {message}"):
        Strange().build(network())(*next(batches(1)))


def test_a_method_whose_decorator_was_forgotten_is_told_so():
    class Forgotten(Natural):
        beta: float = 3.0

    with pytest.raises(InputTypeError, match="Forgotten declares beta, but is no dataclass; write @dataclass"):
        Forgotten().build(network())


@pytest.mark.parametrize("validation", ["pgd", "apgd-20", "pgd-x", ""])
def test_a_validation_attack_of_another_form_is_an_error(validation):
    with pytest.raises(InputError, match="validation_attack is"):
        AT(validation_attack=validation).judge()


def test_natural_training_has_no_ball_to_be_validated_in():
    assert Natural().judge() is None
    with pytest.raises(InputError, match="which is none"):
        Natural(validation_attack="pgd-20").judge()
    assert Natural(validation_attack=PGDSettings(steps=3)).judge().steps == 3


def test_adversarial_training_trains_a_resnet():
    torch.manual_seed(0)
    model = FeatureClassifier(ResNet18(3, 4), 32, 3).train()
    step = AT(lr=0.05, attack=PGDSettings(eps=4 / 255, steps=2)).build(split(model))
    x, y = torch.rand(6, 3, 16, 16), torch.arange(6) % 3
    losses = [step(x, y, seed=0)["task"].item() for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
