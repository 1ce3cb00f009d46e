"""JARN is what its authors released, in as few passes, and what it is in parts, in bfloat16 and of strange models."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from afd.attacks import PGDSettings
from afd.bench import released_players
from afd.errors import InputError, InputTypeError
from afd.methods import AWP, JARN, Execution
from afd.methods import jarn as ours
from afd.methods.jarn import Adapter, ConvDiscriminator, channels_of, layers_for, standardised
from afd.methods.ramps import Ramp, check_ramps
from afd.nn import FeatureClassifier, build_model
from afd.passes import counted

STEPS, CLASSES, EPS = 20, 4, 0.1
RUN = {"start_step": 5, "update_interval": 4, "beta": 1.5, "gamma": 0.7}
SMALL = {"discriminator_width": 4, "discriminator_layers": 3}


def network(norm=nn.BatchNorm2d, activation=nn.ReLU, channels=2, dtype=torch.float64):
    """A small network with two norms, in training mode."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1, bias=False), norm(4), activation(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), norm(6), activation(),
        nn.Flatten(), nn.Linear(54, 8),
    )  # fmt: skip
    return FeatureClassifier(encoder, 8, CLASSES).to(dtype).train()


def batches(count=STEPS, size=10, channels=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.rand(size, channels, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(CLASSES, (size,), generator=generator)


class Noise:
    """Our noise in the step of a seed, handed to the transcription."""

    def __init__(self):
        self.seed = 0

    def __call__(self, x):
        start = PGDSettings(eps=EPS, steps=0).build(nn.Flatten())
        return start(x, torch.zeros(len(x), dtype=torch.int64), seed=self.seed)


def weights_only(parameters, decay):
    """The authors' SGD, at our defaults."""
    weights, others = ([one for one in parameters if (one.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, 0.1, 0.9, weight_decay=decay)


def played(here=RUN, there=RUN, steps=STEPS, norm=nn.BatchNorm2d, **settings):
    """Both sides after some steps, as dicts of all tensors there are, and our losses beside the transcription's."""
    model, twin = network(norm), network(norm)
    torch.manual_seed(2)
    step = JARN(eps=EPS, **SMALL, **here, **settings).build(model)
    players = step.players
    adapter = copy.deepcopy(players["adapter"].convolution)
    discriminator = released_players.Discriminator(2, width=4, layers=3).double()
    discriminator.load_state_dict(players["discriminator"].state_dict())
    noise = Noise()
    flow = released_players.JARN(
        twin, weights_only(list(twin.parameters()), 2e-4), eps=EPS, start=noise,
        adapter=adapter, discriminator=discriminator, **there,
    )  # fmt: skip
    losses = []
    for number, (x, y) in enumerate(batches(steps)):
        noise.seed = number
        expected = flow(x, y)
        losses.append((step(x, y, seed=number)["task"], expected))
    optimizers = flow.optimizer, flow.adapter_optimizer, flow.discriminator_optimizer
    sides = (
        ((model, players["adapter"].convolution, players["discriminator"]), step.optimizers.values()),
        ((twin, adapter, discriminator), optimizers),
    )
    return *(everything(*side) for side in sides), losses


def everything(modules, optimizers):
    """Weights, buffers and momenta, by name."""
    found = {}
    for number, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
        found |= {f"{number}.{name}": one.clone() for name, one in module.state_dict().items()}
        for name, one in module.named_parameters():
            found[f"{number}.{name}.momentum"] = optimizer.state[one]["momentum_buffer"].clone()
    return found


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


# --- Beside the released flow ---------------------------------------------------------------------------------------


def test_twenty_steps_are_those_of_the_released_flow():
    """Across the start, and updates of the discriminator: weights, momenta, running statistics and their counts."""
    start = everything_of_the_start()
    here, there, losses = played()
    for name, one in here.items():
        torch.testing.assert_close(one, there[name], rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    for one, other in losses:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    moved = {name for name, one in start.items() if (here[name].double() - one.double()).abs().max() > 1e-4}
    # what BatchNorm follows has a bias that nothing depends on
    assert {name for name in start.keys() - moved if not name.endswith("bias")} == set()


def everything_of_the_start():
    model = network()
    torch.manual_seed(2)
    step = JARN(eps=EPS, **SMALL, **RUN).build(model)
    modules = model, step.players["adapter"].convolution, step.players["discriminator"]
    return {
        f"{number}.{name}": one.clone() for number, one in enumerate(modules) for name, one in one.state_dict().items()
    }


@pytest.mark.parametrize("change", [{"beta": 1.49}, {"gamma": 0.71}, {"start_step": 6}, {"update_interval": 5}])
def test_a_setting_that_differs_is_seen(change):
    here, there, _ = played({**RUN, **change})
    assert apart(here, there) > 1e-6


@pytest.mark.parametrize(("constant", "other"), [("SLOPE", 0.11), ("VARIANCE", 1.1e-3), ("GRADIENT", 1), ("IMAGE", 0)])
def test_a_constant_that_differs_is_seen(constant, other, monkeypatch):
    monkeypatch.setattr(ours, constant, other)
    here, there, _ = played()
    assert apart(here, there) > 1e-6


def test_micro_batches_without_batchnorm_are_the_released_flow_too(monkeypatch):
    for module in (ours, released_players):
        monkeypatch.setattr(module.nn, "BatchNorm2d", nn.Identity)
    here, there, losses = played(steps=10, norm=lambda _: nn.Identity(), micro_batches=3)
    assert apart(here, there) < 1e-10
    assert all(abs(one - other) < 1e-10 for one, other in losses)


# --- Passes ---------------------------------------------------------------------------------------------------------


def spent(call, model, step):
    """Of the step after so many."""
    for x, y in batches(step, channels=1, dtype=torch.float32):
        call(x, y)
    x, y = next(batches(1, channels=1, dtype=torch.float32))
    return counted(lambda: call(x, y), model, x)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, (1, 1, 1)), (1, (2, 2, 2)), (5, (3, 3, 2))],
    ids=["before the start", "the model and the adapter", "and the discriminator"],
)
def test_both_take_the_fewest_passes_of_the_model(step, expected):
    """One forward, a gradient of the input, and its derivative: a forward, a backward and twice the weights."""
    settings = {"eps": EPS, "start_step": 1, "update_interval": 5}
    model, twin = (network(channels=1, dtype=torch.float32) for _ in range(2))
    flow = released_players.JARN(twin, weights_only(list(twin.parameters()), 2e-4), **settings)
    for call, one in ((JARN(**SMALL, **settings).build(model), model), (flow, twin)):
        found = spent(call, one, step)
        assert (found.forwards, found.input_backwards, found.weight_backwards) == expected


def test_the_discriminator_is_passed_backwards_once_where_the_released_flow_does_so_twice():
    settings = {"eps": EPS, "update_interval": 5}
    counts = []
    for mine in (True, False):
        model = network(channels=1, dtype=torch.float32)
        flow = partial(released_players.JARN, model, weights_only(list(model.parameters()), 2e-4))
        call = JARN(**SMALL, **settings).build(model) if mine else flow(**settings)
        judge = call.discriminator
        backwards = []
        judge.linear.register_full_backward_hook(lambda *_, found=backwards: found.append(1))
        for x, y in batches(2, channels=1, dtype=torch.float32):
            backwards.clear()
            call(x, y)
        counts.append(len(backwards))
    assert counts == [1, 2]


# --- What is differentiated, and in which precision -----------------------------------------------------------------


def gathered(step, x, y, beta=1.0):
    """The gradient of the model's weights in the next step, as one vector, and the losses; nothing moves."""
    found = []
    step.method = replace(step.method, beta=beta)
    task, adapter = (step.optimizers[player] for player in ("task", "adapter"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapter, "step", lambda: None)
        patched.setattr(task, "step", lambda: found.extend(one.grad.flatten() for one in step.parameters["task"]))
        losses = step(x, y, seed=7)
    return torch.cat(found), losses


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_gradient_is_that_of_the_losses_by_differences(activation):
    """Of CE - β CE_D along random directions, through the gradient of the input, in float64."""
    beta, direction = 0.8, 1e-6
    model = network(activation=activation)
    torch.manual_seed(2)
    step = JARN(eps=EPS, **SMALL, update_interval=10**6).build(model)
    step.steps = 1  # not the discriminator's turn
    x, y = next(batches(1))
    gradient, _ = gathered(step, x, y, beta)
    generator = torch.Generator().manual_seed(3)
    start = [one.detach().clone() for one in model.parameters()]
    for _ in range(3):
        along = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in start]
        ends = []
        for sign in (-1, 1):
            with torch.no_grad():
                for one, was, move in zip(model.parameters(), start, along, strict=True):
                    one.copy_(was + sign * direction * move)
            losses = gathered(step, x, y, beta)[1]
            ends.append(losses["task"] - beta * losses["discriminator"])
        slope = (ends[1] - ends[0]) / (2 * direction)
        expected = gradient @ torch.cat([one.flatten() for one in along])
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)


def cosine(one, other):
    return float(one @ other / one.norm() / other.norm())


def test_in_bfloat16_the_gradient_of_a_gradient_is_another():
    """Measured on a network trained on digits for 50 steps, half of them regularised: why those passes are in float32.

    The gradient of the cross-entropy agrees with float32's to a cosine of 0.999; what comes through the gradient of the
    input does not.
    """
    x, y = DIGITS
    torch.manual_seed(0)
    model = build_model("convnet", (1, 8, 8), 10, 8, "silu").train()
    step = JARN(eps=0.2, start_step=25, update_interval=2, discriminator_width=8).build(model)
    for number in range(50):
        rows = slice(number % 8 * 128, number % 8 * 128 + 128)
        step(x[rows], y[rows], seed=number)
    found = {}
    for precision in ("fp32", "bf16"):
        step.passes.execution = Execution(precision)
        step._in_float32 = lambda: torch.enable_grad()  # as if there were no such rule
        step.steps = 51
        both, task = (gathered(step, x[:128], y[:128], beta)[0] for beta in (1.0, 0.0))
        found[precision] = task, both - task
    of_task, through_the_gradient = (cosine(*pair) for pair in zip(found["fp32"], found["bf16"], strict=True))
    print(of_task, through_the_gradient)
    assert of_task > 0.995
    assert through_the_gradient < 0.99


def digits():
    """Half of scikit-learn's digits."""
    from afd.data.datasets import load

    images = load("digits").train
    return images.pixels.float() / images.scale, images.labels


DIGITS = digits()


def test_passes_are_in_float32_once_the_model_is_regularised():
    x, y = next(batches(1, channels=2, dtype=torch.float32))
    ends, kinds = {}, []
    for precision in ("fp32", "bf16"):
        model = network(dtype=torch.float32)
        model.encoder[0].register_forward_hook(lambda _layer, _given, out: kinds.append(out.dtype))
        torch.manual_seed(2)
        step = JARN(eps=EPS, **SMALL, start_step=1).build(model, Execution(precision))
        step.steps = 1
        for number in range(2):
            step(x, y, seed=number)
        ends[precision] = model.state_dict()
    assert set(kinds) == {torch.float32}
    assert all(torch.equal(one, ends["bf16"][name]) for name, one in ends["fp32"].items())
    step.steps = 0
    step(x, y, seed=0)
    assert kinds[-1] == torch.bfloat16


# --- Around it ------------------------------------------------------------------------------------------------------


def test_it_is_validated_in_the_ball_of_its_noise_and_takes_ramps():
    for norm in ("Linf", "L2"):
        judge = JARN(norm=norm, eps=0.3).judge(3)
        assert (judge.norm, judge.eps, judge.steps, judge.seed) == (norm, 0.3, 20, 3)
    check_ramps(JARN(), {"beta": Ramp(0.0, 1), "gamma": Ramp(0.0, 1), "eps": Ramp(0.0, 1)})
    with pytest.raises(InputError, match="start_step"):
        check_ramps(JARN(), {"start_step": Ramp(1, 1)})


@pytest.mark.parametrize("name", ["beta", "gamma", "eps"])
def test_a_number_that_is_live_is_followed(name):
    ends = []
    for live in (False, True):
        model = network()
        torch.manual_seed(2)
        own = {"eps": EPS, "beta": 0.6, "gamma": 0.6}
        step = JARN(**SMALL, **(own | ({name: 0.01} if live else {}))).build(model)
        if live:
            step.live(name, 0.0).fill_(own[name])
        for number, (x, y) in enumerate(batches(3)):
            step(x, y, seed=number)
        ends.append(everything([model, *step.players.values()], step.optimizers.values()))
    assert apart(*ends) < 1e-12


def test_each_players_gradient_is_clipped_and_its_own_optimizer_steps():
    model, (x, y) = network(), next(batches(1))
    seen = {}

    def noting(player):
        def made(parameters):
            optimizer = torch.optim.SGD(parameters, 0.1)
            optimizer.register_step_pre_hook(
                lambda one, *_: seen.update({player: float(torch.cat(
                    [p.grad.flatten() for group in one.param_groups for p in group["params"]]
                ).norm())})
            )  # fmt: skip
            return optimizer

        return made

    own = {player: noting(player) for player in ("task", "adapter", "discriminator")}
    JARN(**SMALL, optimizers=own, clip=1e-3).build(model)(x, y)
    assert seen.keys() == own.keys()
    assert all(norm <= 1.001e-3 for norm in seen.values())


def test_labels_are_smoothed_in_the_cross_entropy_alone():
    x, y = next(batches(1))
    losses = []
    for smoothing in (0.0, 0.3):
        torch.manual_seed(2)
        model = network()
        losses.append(JARN(**SMALL, label_smoothing=smoothing).build(model)(x, y, seed=1))
    assert losses[0]["task"] != losses[1]["task"]
    assert losses[0]["discriminator"] == losses[1]["discriminator"]


def test_the_discriminator_has_as_many_layers_as_leave_a_pixel():
    for shape, layers in (((1, 8, 8), 3), ((1, 28, 28), 5), ((3, 32, 32), 5), ((3, 64, 64), 5), ((2, 9, 5), 4)):
        model = build_model("resnet18", shape, 10, 4)
        assert (channels_of(model), layers_for(model)) == (shape[0], layers)
        images = torch.rand(3, *shape)
        assert ConvDiscriminator(shape[0], 4, layers)(images).shape == (3, 2)
        assert Adapter(shape[0])(images).shape == images.shape
    assert layers_for(nn.Conv2d(1, 1, 1)) == 5


def test_standardised_images_have_no_mean_and_length_1():
    found = standardised(torch.rand(3, 2, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert not standardised(torch.ones(1, 2, 4, 4)).any()


def test_a_gradient_that_is_zero_spoils_nothing():
    """Of a model whose logits do not hang on its input, but on its weights."""
    model, (x, y) = network(), next(batches(1))
    with torch.no_grad():
        model.encoder[0].weight.zero_()
    losses = JARN(**SMALL).build(model)(x, y)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(4, 3, 6, 6), torch.zeros(4).long(), r"x has shape \[4, 3, 6, 6\]; .* for images \[N, 2, H, W\]"),
        (torch.rand(4, 72), torch.zeros(4).long(), r"x has shape \[4, 72\]"),
        (torch.rand(4, 2, 6, 6), None, "y is None"),
    ],
)
def test_images_and_labels_of_another_kind_are_named(images, labels, message):
    step = JARN(**SMALL).build(network(dtype=torch.float32))
    before = [one.clone() for one in step.network.parameters()]
    with pytest.raises(InputError, match=message):
        step(images, labels)
    assert all(map(torch.equal, before, step.network.parameters()))


def test_what_cannot_be_built_is_named():
    flat = FeatureClassifier(nn.Flatten(), 36, 3)
    with pytest.raises(InputError, match="channels is missing, and the model has no convolution that says how many"):
        JARN().build(flat)
    JARN(channels=1, **SMALL).build(flat)(torch.rand(4, 1, 6, 6), torch.arange(4) % 3)
    with pytest.raises(InputError, match=r"compile is True, but torch\.compile allows no backward through a gradient"):
        JARN().build(network(), Execution(compile=True))
    with pytest.raises(InputTypeError, match="AWP goes around a supervised method"):
        AWP(JARN())


def test_a_layer_that_is_differentiable_only_once_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(_ctx, grad):
            return grad * 2

    model, (x, y) = network(), next(batches(1))
    model.encoder[2].forward = Once.apply
    step = JARN(**SMALL).build(model)
    with pytest.raises(InputError, match="a layer whose gradient torch cannot differentiate"):
        step(x, y)


def test_a_frozen_backbone_stays():
    model = network()
    model.encoder.requires_grad_(False)
    before = [one.clone() for one in model.encoder.parameters()]
    head = model.classifier.weight.clone()
    step = JARN(**SMALL).build(model)
    for x, y in batches(2):
        step(x, y)
    assert all(map(torch.equal, before, model.encoder.parameters()))
    assert not torch.equal(head, model.classifier.weight)


def test_trainable_parameters_that_have_no_part_in_the_logits_are_named():
    model, (x, y) = network().requires_grad_(False), next(batches(1))
    model.spare = nn.Linear(2, 2).double()
    with pytest.raises(InputError, match="no trainable parameter of the model has a part in the logits"):
        JARN(**SMALL).build(model)(x, y)
