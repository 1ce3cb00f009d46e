"""JARN is what its authors released, in as few passes, and what it is in parts, in bfloat16 and of strange models."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from afd.attacks import PGDSettings
from afd.bench import released_jarn
from afd.bench.passes import counted
from afd.errors import InputError, InputTypeError
from afd.methods import AWP, JARN, Execution
from afd.methods import jarn as ours
from afd.methods.jarn import Adapter, ConvDiscriminator, channels_of, layers_for, standardised
from afd.methods.ramps import Ramp, check_ramps
from afd.nn import FeatureClassifier, build_model

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
    discriminator = released_jarn.Discriminator(2, width=4, layers=3).double()
    discriminator.load_state_dict(players["discriminator"].state_dict())
    noise = Noise()
    flow = released_jarn.JARN(
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
    return {f"{number}.{name}": one.clone() for number, one in enumerate(modules) for name, one in one.state_dict().items()}


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
    for module in (ours, released_jarn):
        monkeypatch.setattr(module.nn, "BatchNorm2d", lambda *_, **__: nn.Identity())
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


