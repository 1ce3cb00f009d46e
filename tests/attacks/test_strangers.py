"""Attacks on models that somebody else wrote: compiled, wrapped, shared by threads, with habits of their own."""

from __future__ import annotations

import os
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ambient import MODES
from torch import nn

from afd.attacks import APGD, FAB, FGSM, MIM, PGD, ModelWarning
from afd.errors import InputError, InputTypeError, ModelError

ATTACKS = {
    "PGD": PGD.partial(steps=3),
    "PGD L2, kl": PGD.partial(norm="L2", eps=1.0, alpha=0.5, steps=3, loss="kl"),
    "FGSM": FGSM.partial(),
    "MIM": MIM.partial(steps=3),
    "APGD": APGD.partial(steps=4, early_stop=True),
    "APGD L1": APGD.partial(norm="L1", eps=5.0, steps=5),
    "FAB": FAB.partial(steps=4),
    "FAB-T": FAB.partial(steps=3, n_target_classes=2, early_stop=False),
    "APGD-T": APGD.partial(steps=3, loss="dlr-targeted", n_target_classes=2),
}


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6)]
    layers[1].running_mean.normal_()
    layers[1].running_var.uniform_(0.1, 3)
    return nn.Sequential(*layers)


def batch(count):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, 3, 8, 8, generator=generator), torch.randint(6, (count,), generator=generator)


def assert_alike(found, expected):
    """Up to signs that turn where a gradient is all but zero."""
    assert (found - expected).abs().gt(1e-5).float().mean() < 0.01


class Around(nn.Module):
    """Somebody's wrapper, with a form of output of its own."""

    def __init__(self, inner, form=lambda logits: logits):
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, x):
        return self.form(self.inner(x))


# --- What runs the model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group():
    """A process group of one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_in_place():
    model = network()
    model.compile(backend="eager")
    return model


FORMS = {
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "around a compiled one": lambda: Around(torch.compile(network(), backend="eager")),
    "compiled in place": compiled_in_place,
    "scripted": lambda: torch.jit.script(network()),
    "around a scripted one": lambda: Around(torch.jit.script(network())),
    "traced": lambda: torch.jit.trace(network().eval(), batch(4)[0]),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(network().eval())),
    "symbolic": lambda: torch.fx.symbolic_trace(network()),
    "fused": lambda: torch.ao.quantization.fuse_modules(network().eval(), [["0", "1", "2"]]),
    "DataParallel": lambda: nn.DataParallel(network()),
    "DDP": lambda: nn.parallel.DistributedDataParallel(network()),
    "around DDP": lambda: Around(nn.parallel.DistributedDataParallel(network())),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [5, 130])
@pytest.mark.usefixtures("group")
def test_whatever_runs_the_model_the_result_is_that_of_the_eager_one(form, count):
    model, (x, y) = FORMS[form](), batch(count)
    training = [getattr(module, "training", None) for module in model.modules()]
    state = {name: one.clone() for name, one in model.state_dict().items()}
    for kind in ("PGD", "APGD"):
        assert_alike(ATTACKS[kind](model)(x, y), ATTACKS[kind](network())(x, y))
    assert [getattr(module, "training", None) for module in model.modules()] == training
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: torch.export.export(network().eval(), (batch(4)[0],)).module(), InputError, "cannot leave it"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(network().eval(), {nn.Linear}),
            ModelError, "no gradient leads from the model's output to the images",
        ),
        (lambda: network().double(), InputTypeError, r"weights are torch\.float64, and x is torch\.float32"),
        (lambda: network().bfloat16(), InputTypeError, r"weights are torch\.bfloat16, .*precision='bf16'"),
    ],
)  # fmt: skip
def test_what_cannot_be_attacked_is_named(build, error, message):
    x, y = batch(4)
    for attack in (PGD, APGD):
        with pytest.raises(error, match=message):
            attack(build(), steps=1)(x, y)


@pytest.mark.parametrize(
    "model", [lambda x: x, network().forward, None, "model"], ids=lambda model: type(model).__name__
)
def test_what_is_no_module_is_refused(model):
    with pytest.raises(InputTypeError, match=r"model is a \w+; it must be a torch\.nn\.Module"):
        PGD(model)


# --- What the model returns -----------------------------------------------------------------------------------------

OUTPUTS = {
    "tuple": lambda logits: (logits, logits.mean((0, 1))),
    "dict": lambda logits: {"logits": logits},
    "object": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_logits_may_come_in_any_of_the_usual_forms(output, attack):
    x, y = batch(7)
    assert torch.equal(ATTACKS[attack](Around(network(), OUTPUTS[output]))(x, y), ATTACKS[attack](network())(x, y))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_model_cut_off_from_its_images_is_named(attack):
    x, _ = batch(4)
    table = nn.Sequential(nn.Flatten(), nn.Embedding(256, 6))
    models = {
        "detached": Around(network(), lambda logits: logits.detach()),
        "without autograd": Around(nn.Sequential(network()), torch.no_grad()(lambda logits: logits * 1.0)),
        "of its own": Around(network(), lambda logits: torch.zeros_like(logits).requires_grad_()),
        "of integers": Around(nn.Identity(), lambda x: table((255 * x).long()).mean(1)),
    }
    for model in models.values():
        right = model.eval()(x).argmax(1)  # or there would be nothing to do
        with pytest.raises(ModelError, match="no gradient leads from the model's output to the images"):
            ATTACKS[attack](model)(x, right)


# --- What the model does to its input -------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Normalises the images it is given where they are."""

    def __init__(self, data):
        super().__init__()
        self.net, self.data = network(), data

    def forward(self, x):
        (x.data if self.data else x).sub_(0.5).div_(0.25)
        return self.net(x)


class Normalised(InPlace):
    """The same, in a tensor of its own."""

    def forward(self, x):
        return self.net((x - 0.5) / 0.25)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("count", [3, 70])
def test_a_model_may_write_to_its_input(data, attack, count):
    x, y = batch(count)
    kept = x.clone()
    found = ATTACKS[attack](InPlace(data))(x, y)
    assert torch.equal(x, kept)
    if data:  # no gradient passes through .data, so it is another function of x, without the factor 4
        assert ((found >= 0) & (found <= 1)).all()
    else:
        assert_alike(found, ATTACKS[attack](Normalised(data=False))(x, y))


# --- Modes of the caller --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_callers_modes_change_nothing(mode, attack):
    x, y = batch(7)
    expected = ATTACKS[attack](network())(x, y)
    made = ATTACKS[attack](network())
    with MODES[mode]():
        found = made(x, y)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# --- Threads --------------------------------------------------------------------------------------------------------


def test_threads_on_one_model_find_what_they_would_find_one_after_the_other():
    model, found, state = network().train(), {}, {}
    state = {name: one.clone() for name, one in model.state_dict().items()}
    batches = {seed: batch(5 + seed) for seed in range(6)}
    shared = PGD(model, steps=3)
    expected = {seed: PGD(network(), steps=3)(*xy) for seed, xy in batches.items()}

    def work(seed):
        attack = shared if seed % 2 else PGD(nn.Sequential(model), steps=3)
        for _ in range(3):
            found[seed] = attack(*batches[seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, x_adv in expected.items():
        torch.testing.assert_close(found[seed], x_adv)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters())


# --- Values that are not finite -------------------------------------------------------------------------------------


class Overflows(nn.Module):
    """The winning logit is infinite, as after an overflow, for the first three samples."""

    def __init__(self, value=torch.inf):
        super().__init__()
        self.net, self.value = network(), value

    def forward(self, x):
        out = self.net(x)
        first = torch.arange(len(x))[:, None] < 3
        return out.where(~first | (out < out.amax(1, keepdim=True)), self.value)


class Standardises(Overflows):
    """Divides by each image's spread, whose derivative is NaN where it is 0."""

    def forward(self, x):
        return self.net((x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True).sqrt() + 1e-3))


class Gamma(Overflows):
    """Takes a root, whose derivative is infinite at black pixels."""

    def forward(self, x):
        return self.net(x.sqrt())


STEPS = {"PGD": {"random_start": False, "steps": 4}, "FGSM": {}, "MIM": {"steps": 4}, "APGD": {"steps": 4}}
KINDS = {"PGD": PGD, "FGSM": FGSM, "MIM": MIM, "APGD": APGD}


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_logits_are_counted_and_told(kind):
    (x, _), model = batch(8), Overflows().eval()
    attack = KINDS[kind](model, **STEPS[kind])
    with pytest.warns(ModelWarning) as told:
        attack(x, model(x).argmax(1))
    report = attack.report
    assert any("for 3 of 8 samples values were not finite" in str(one.message) for one in told)
    assert any(
        "for 3 of 8 samples the gradient of the loss was exactly zero or NaN" in str(one.message) for one in told
    )
    assert torch.equal(report.nonfinite_logits > 0, torch.arange(8) < 3)
    assert torch.equal(report.nonfinite_losses[:3], report.evaluations[:3])
    assert torch.equal(report.blind, torch.arange(8) < 3)
    assert torch.equal(report.nonfinite, torch.arange(8) < 3)


@pytest.mark.parametrize("kind", ["FGSM", "MIM", "PGD"])
def test_a_gradient_of_nan_is_told_and_does_not_move(kind):
    (x, y), model = batch(4), Standardises().eval()
    x[1:3] = 0.5
    attack = KINDS[kind](model, **STEPS[kind])
    with pytest.warns(
        ModelWarning, match="for 2 of 4 samples the gradient of the loss was exactly zero or NaN.*are 1, 2"
    ):
        x_adv = attack(x, y)
    assert torch.equal((x_adv != x).flatten(1).any(1), torch.tensor([True, False, False, True]))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_gradient_at_some_pixels_leaves_others_their_way(kind, norm):
    (x, y), model = batch(6), Gamma().eval()
    x = 0.2 + 0.6 * x
    x[:3, :, :, 0] = 0
    attack = KINDS[kind](model, norm=norm, eps=0.1, **STEPS[kind])
    with pytest.warns(ModelWarning, match="for 3 of 6 samples values were not finite"):
        x_adv = attack(x, y)
    assert x_adv.isfinite().all()
    assert (x_adv != x).flatten(1).any(1).all()
    assert not attack.report.blind.any()
    assert (attack.report.nonfinite_gradients[:3] > 0).all()
    assert (attack.report.nonfinite_gradients[3:] == 0).all()


def test_nan_logits_are_an_error_with_every_attack():
    x, _ = batch(8)
    for kind, attack in KINDS.items():
        model = Overflows(torch.nan).eval()
        with pytest.raises(ModelError, match="returned NaN logits, first seen in step 0, for 3 of 8 samples: 0, 1, 2"):
            attack(model, **STEPS[kind])(x, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_apgd_returns_the_image_where_no_loss_is_a_number(norm):
    x, _ = batch(4)

    class Infinite(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)) + torch.inf, -x.mean((1, 2, 3))], 1)

    with pytest.warns(ModelWarning):
        found = APGD(Infinite(), norm=norm, eps=0.1, steps=12)(x, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(found, x)


def test_a_model_of_which_nothing_is_strange_is_not_warned_of():
    x, y = batch(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, attack in KINDS.items():
            made = attack(network(), **STEPS[kind])
            made(x, y)
            assert not made.report.blind.any()
            assert not made.report.nonfinite.any()


# --- Settings, one per sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["eps", "alpha"])
def test_one_value_per_sample_is_for_the_samples_of_this_batch(kind, name):
    if name == "alpha" and kind in {"FGSM", "APGD"}:
        pytest.skip(f"{kind} has no alpha")
    x, y = batch(8)
    values = torch.linspace(0.1, 0.2, 8)
    attack = KINDS[kind](network(), **{name: values}, **STEPS[kind])
    attack(x, y)
    for rows in (slice(0, 4), slice(4, 8)):
        with pytest.raises(InputError, match=rf"{name} has shape \[8\], but x holds 4 images"):
            attack(x[rows], y[rows], first_sample=rows.start)
    with pytest.raises(InputTypeError, match=rf"{name} is torch.float64 on cpu; it must be torch.float32 on cpu"):
        KINDS[kind](network(), **{name: values.double()}, **STEPS[kind])(x, y)


def test_a_tensor_of_one_number_is_a_number():
    x, y = batch(4)
    attack = PGD(network(), eps=torch.tensor(0.1), alpha=torch.tensor(0.05, dtype=torch.float64), steps=2)
    expected = PGD(network(), eps=float(torch.tensor(0.1)), alpha=0.05, steps=2)(x, y)
    assert torch.equal(attack(x, y), expected)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.full((2, 2), 0.1), InputError, r"eps has shape \[2, 2\]; it must be a number, or one per sample, \[N\]"),
        (torch.tensor([1, 2]), InputTypeError, r"eps is a tensor of torch\.int64"),
        (torch.tensor([0.1, -0.1]), InputError, "the least of eps is -0.1"),
        (torch.tensor([0.1, torch.nan]), InputError, "the least of eps is nan"),
        (torch.tensor([0.1, torch.inf]), InputError, "the largest of eps is inf"),
        ([0.1, 0.2], InputTypeError, "eps is a list; it must be a number, or a tensor of one per sample"),
        (None, InputTypeError, "eps is None"),
    ],
)
def test_other_radii_are_named(value, error, message):
    for kind in KINDS.values():
        with pytest.raises(error, match=message):
            kind(network(), eps=value)


# --- Batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x.numpy(), y), InputTypeError, r"x is a ndarray; it must be a torch\.Tensor"),
        (lambda x, y: (x, y.tolist()), InputTypeError, r"y is a list; it must be a torch\.Tensor"),
        (lambda x, y: (x.to_sparse(), y), InputTypeError, "x is a tensor of layout torch.sparse_coo"),
        (lambda x, y: (x[0, 0, 0, 0], y[0]), InputError, r"x has shape \[\]; it must be images \[N, ...\]"),
        (lambda x, y: (x[:, 0, 0, 0], y), InputError, r"x has shape \[4\]; it must be images \[N, ...\]"),
        (lambda x, y: (255 * x, y), InputError, r"x has values in \[\S+, 25\S+\]; images must be finite and in"),
        (lambda x, y: (x, y[:, None]), InputError, r"y has shape \[4, 1\]; it must be \[4\]"),
        (lambda x, y: (x, nn.functional.one_hot(y, 6)), InputError, r"y has shape \[4, 6\]"),
    ],
)
def test_batches_are_checked_before_they_are_used(change, error, message):
    with pytest.raises(error, match=message):
        PGD(network(), eps=torch.full((4,), 0.1), steps=1)(*change(*batch(4)))


def test_a_value_that_rounding_has_put_outside_is_shown_to_be_outside():
    x, y = batch(4)
    x[0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    with pytest.raises(InputError, match=r"x has values in \[0\.\d+, 1\.00000012\]; .* in \[0\.0, 1\.0\]"):
        PGD(network(), steps=1)(x, y)


def test_images_that_require_a_gradient_are_given_back_without_one():
    x, y = batch(4)
    x_adv = PGD(network(), steps=1)(x.requires_grad_(), y)
    assert not x_adv.requires_grad
    assert x.grad is None


def test_a_model_that_takes_no_single_image_is_attacked_in_one_chunk():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            if len(x) == 1:
                raise ValueError("one is too few")
            return self.net(x)

    x, y = batch(130)
    assert_alike(PGD(Pairs(), steps=2)(x, y), PGD(network(), steps=2)(x, y))
