"""Every method is what its authors released: twenty steps in float64 beside `afd.bench.released`, to 1e-10.

Compared are weights, momentum, and BatchNorm's running statistics and counts. Some released flows pass images for
nobody (Rice's attack, and so AT-AWP's, ends with a forward that only restarts would read, and clean images are passed
for a log), or in another order (TRADES-AWP passes attacked images before clean ones). In training mode such passes move
the running statistics, and nothing else. So what each forward does to them is noted, and ours are held to be what the
other forwards make of them, in the order of ours: `Flow.passes`. Where the next attack reads them (TRADES-AWP's does),
both go on from the released ones.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from afd.attacks import PGDSettings
from afd.bench import released, released_players, released_regularized
from afd.methods import ALP, AT, AWP, FGSMRS, GAT, LLR, MART, TRADES, Batch, Free, NormPenalty, NuAT
from afd.nn import FeatureClassifier

STEPS, CLASSES, EPS = 20, 4, 0.1
BALL = {"eps": EPS, "alpha": 0.04, "steps": 3}


def network(norm=nn.BatchNorm2d, activation=nn.ReLU):
    """A small network with two norms, in training mode, in float64."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), norm(4), activation(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), norm(6), activation(),
        nn.Flatten(), nn.Linear(54, 8),
    )  # fmt: skip
    return FeatureClassifier(encoder, 8, CLASSES).double().train()


def batches(count=STEPS, sizes=(10,)):
    generator = torch.Generator().manual_seed(1)
    for size in itertools.islice(itertools.cycle(sizes), count):
        x = torch.rand(size, 1, 6, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(CLASSES, (size,), generator=generator)


class Starts:
    """Where our attack begins in the step of a seed, handed to a transcription."""

    def __init__(self, init):
        self.seed = 0
        # a gaussian start is not projected before the first step, but where there is none: so a ball that holds it
        ball = {"eps": 10.0, "bounds": (-10.0, 10.0)} if init == "gaussian" else {"eps": EPS}
        scale = EPS / 2 if init == "coin-flip" else None
        self.settings = PGDSettings(**ball, init=init, start_scale=scale, steps=0)

    def __call__(self, x):
        return self.settings(nn.Flatten(), Batch(x, torch.zeros(len(x), dtype=torch.int64), seed=self.seed))


def attack(**settings):
    return PGDSettings(**{**BALL, **settings}, fold_batchnorm=False)


class OriginalDecay(released_players.ATAWP):
    """Not released: the weights are put back before the optimizer's step, so that weight decay is that of w."""

    def step(self, loss, moves):
        self.optimizer.zero_grad()
        loss.backward()
        self.add(moves, -self.gamma)
        self.optimizer.step()


@dataclass(frozen=True)
class Flow:
    """A method of ours and its released flow.

    Attributes:
        method: ours.
        build: (model, optimizer, start=) -> the released flow.
        init: what starts are drawn from.
        passes: the released flow's forwards in training mode in each step that ours has as well, in the order of ours.
        handed_on: whether our running statistics are made the released ones after each step.
        activation: of the network.
    """

    method: object
    build: Callable
    init: str = "uniform"
    passes: tuple = ()
    handed_on: bool = False
    activation: type = nn.ReLU


RICE = (0, 1, 2, 4)  # three of the attack, (one after it,) training (, clean images)
ALPHA = {"alpha": EPS, "steps": 1}
ONE = {**ALPHA, "init": "coin-flip", "start_scale": EPS / 2}
LINEAR = {"task_weight": 1.5, "linearity": 3.0, "slope": 1.5, "search_steps": 3}
KL, TRAIN = {"loss": "kl", "init": "gaussian"}, {"batchnorm": "train"}
FLOWS = {
    "at of robustness": Flow(AT(attack=attack()), partial(released.RobustnessAT, **BALL)),
    "at of rice": Flow(AT(attack=attack(**TRAIN)), partial(released.RiceAT, **BALL), passes=RICE),
    "fgsm-rs": Flow(FGSMRS(attack=attack(**TRAIN, steps=1, alpha=0.12)), partial(released.FGSMRS, eps=EPS, alpha=0.12)),
    "trades": Flow(TRADES(beta=3.0, attack=attack(**KL)), partial(released.TRADES, **BALL, beta=3.0), "gaussian"),
    "mart": Flow(MART(beta=4.0, attack=attack(init="gaussian")), partial(released.MART, **BALL, beta=4.0), "gaussian"),
    "alp": Flow(
        ALP(weight=0.3, label_smoothing=0.2, attack=attack(targeted=True)),
        partial(released.ALP, **BALL, weight=0.3, label_smoothing=0.2),
    ),
    "free": Flow(Free(eps=EPS, replays=3), lambda *built, **_: released.Free(*built, eps=EPS, repeats=3)),
    "at+awp": Flow(
        AWP(AT(attack=attack(**TRAIN)), gamma=0.02, start_epoch=2),
        partial(released_players.ATAWP, **BALL, gamma=0.02, start_epoch=2),
        passes=RICE,
    ),
    "at+awp whose original weights decay": Flow(
        AWP(AT(attack=attack(**TRAIN)), gamma=0.02, weight_decay_at="original"),
        partial(OriginalDecay, **BALL, gamma=0.02),
        passes=RICE,
    ),
    "trades+awp": Flow(
        AWP(TRADES(beta=3.0, attack=attack(**KL)), start_epoch=2),
        partial(released_players.TRADESAWP, **BALL, beta=3.0, gamma=0.005, start_epoch=2, proxy_lr=0.1),
        "gaussian",
        passes=(1, 0, 2),
        handed_on=True,
    ),
    "llr": Flow(
        LLR(eps=EPS, decay_norms=True, **LINEAR),
        partial(
            released_regularized.LLR,
            eps=EPS,
            alpha=0.1,
            steps=3,
            task_weight=1.5,
            loss_weight=3.0,
            smoothing_factor=0.5,
        ),
        passes=(0,),  # those of the regulariser change no running statistics
        activation=nn.Softplus,
    ),
    "gat": Flow(
        GAT(weight=3.0, growth=2.0, growth_epoch=2, attack=attack(**ONE)),
        partial(released_regularized.GAT, **BALL | ALPHA, weight=3.0, growth=2.0, growth_epoch=2),
        "coin-flip",
    ),
    "nuat": Flow(
        NuAT(weight=2.0, attack=attack(**ONE)),
        partial(released_regularized.NuAT, **BALL | ALPHA, weight=2.0),
        "coin-flip",
    ),
} | {
    f"norm-penalty {distance}": Flow(
        NormPenalty(weight=0.7, distance=distance, attack=attack()),
        partial(released.NormPenalty, **BALL, weight=0.7, distance=distance),
    )
    for distance in ("L1", "L2", "squared-L2")
}


class Forwards:
    """Notes what each forward in training mode shows a BatchNorm layer: mean and variance of the batch."""

    def __init__(self, layer):
        self.seen = []
        layer.register_forward_pre_hook(self)

    def __call__(self, layer, given):
        if layer.training:
            (x,) = given
            self.seen.append((x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3))))

    def after(self, before, passes):
        """Running mean and variance, and their count, that these forwards leave."""
        mean, variance, calls = before
        for one in passes or range(len(self.seen)):
            batch = self.seen[one]
            mean, variance, calls = 0.9 * mean + 0.1 * batch[0], 0.9 * variance + 0.1 * batch[1], calls + 1
        return mean, variance, calls


@pytest.mark.parametrize("name", FLOWS)
def test_twenty_steps_are_those_of_the_released_flow(name):
    flow = FLOWS[name]
    ours, theirs = network(activation=flow.activation), network(activation=flow.activation)
    begun = [parameter.detach().clone() for parameter in ours.parameters()]
    step, settings = flow.method.build(ours), flow.method.core
    optimizer = torch.optim.SGD(theirs.parameters(), settings.lr, 0.9, weight_decay=settings.weight_decay)
    start = Starts(flow.init)
    transcription = flow.build(theirs, optimizer, start=start)
    forwards = [Forwards(layer) for layer in norms(theirs)]
    for number, (x, y) in enumerate(batches(sizes=(10, 7) if name == "free" else (10,))):
        step.epoch, start.seed, before = 1 + number // 10, number, statistics(ours)
        expected = transcription(x, y, epoch=step.epoch)
        for _ in range(flow.method.repeats):
            found = step(x, y, seed=number)
        same("loss", sum(found.values()), expected)
        for one, was, seen in zip(statistics(ours), before, forwards, strict=True):
            same("statistics", one, seen.after(was, flow.passes))
            seen.seen.clear()
        if flow.handed_on:
            for one, other in zip(norms(ours), norms(theirs), strict=True):
                one.load_state_dict({**one.state_dict(), **dict(other.named_buffers())})

    for (key, one), other, was in zip(ours.named_parameters(), theirs.parameters(), begun, strict=True):
        same(key, one, other)
        assert (one - was).abs().max() > 1e-3
        same(key, step.optimizers["task"].state[one]["momentum_buffer"], optimizer.state[other]["momentum_buffer"])
    if not flow.passes:
        for one, other in zip(statistics(ours), statistics(theirs), strict=True):
            same("statistics", one, other)
    assert all(module.training for module in ours.modules())


@pytest.mark.parametrize("name", [name for name in FLOWS if not FLOWS[name].method.core.coupled])
def test_micro_batches_without_batchnorm_are_the_released_flow_too(name):
    flow = FLOWS[name]
    ours, theirs = network(nn.Identity, flow.activation), network(nn.Identity, flow.activation)
    core = replace(flow.method.core, micro_batches=3)
    step = (replace(flow.method, method=core) if flow.method is not flow.method.core else core).build(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), core.lr, 0.9, weight_decay=core.weight_decay)
    start = Starts(flow.init)
    transcription = flow.build(theirs, optimizer, start=start)
    for number, (x, y) in enumerate(batches(6)):
        step.epoch, start.seed = 1 + number // 2, number
        expected = transcription(x, y, epoch=step.epoch)
        for _ in range(flow.method.repeats):
            found = step(x, y, seed=number)
        same("loss", sum(found.values()), expected)
    for (key, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        same(key, one, other)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llr", {"task_weight": 1.499}),
        ("llr", {"linearity": 3.001}),
        ("llr", {"slope": 1.499}),
        ("llr", {"search_rate": 0.0999}),
        ("llr", {"search_steps": 2}),
        ("llr", {"ascent": "gap"}),
        ("gat", {"weight": 3.001}),
        ("gat", {"growth": 2.001}),
        ("gat", {"growth_epoch": 3}),
        ("gat", {"attack": attack(**{**ONE, "start_scale": 0.051})}),
        ("nuat", {"weight": 2.001}),
        ("nuat", {"attack": attack(**{**ONE, "alpha": 0.099})}),
    ],
)
def test_another_constant_is_another_flow(name, changed, monkeypatch):
    flow = FLOWS[name]
    monkeypatch.setitem(FLOWS, name, replace(flow, method=replace(flow.method, **changed)))
    with pytest.raises(AssertionError):
        test_twenty_steps_are_those_of_the_released_flow(name)


def same(name, one, other):
    """To 1e-10."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=lambda text: f"{name}: {text}")


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def statistics(model):
    """Running mean and variance, and their count, of each BatchNorm."""
    return [tuple(one.clone() for one in norm.buffers()) for norm in norms(model)]
