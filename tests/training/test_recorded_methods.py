"""Captured steps of supervised methods, on tapes that stand for CUDA graphs: equal to eager ones."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from toy_methods import Perturbed, Remembers, Replays, Steady

from afd.attacks import PGDSettings, UnionSettings
from afd.errors import InputError
from afd.methods import AFD, ALP, AT, AWP, FGSMRS, GAT, JARN, LLR, MART, TRADES, Free, NormPenalty, NuAT, Supervised
from afd.nn import FeatureClassifier
from afd.training import recording

CPU, STEPS = torch.device("cpu"), 6
# a tape is a mode, in which no layers are joined
PGD_2 = {"eps": 0.1, "alpha": 0.05, "steps": 2, "fold_batchnorm": False}
ONE = {**PGD_2, "alpha": 0.1, "steps": 1, "init": "coin-flip", "start_scale": 0.05}
KINDS = {"gat": 2, "nuat": 2, "nuat+awp": 2}  # of steps, where there is more than one: each is captured
UNION = {"eps": 0.1, "eps_l2": 0.4, "eps_l1": 1.5, "steps": 2, "fold_batchnorm": False}
METHODS = {
    **{mode: AT(lr=0.05, attack=PGDSettings(batchnorm=mode, **PGD_2)) for mode in ("eval", "train", "batch", "clean")},
    "in parts": AT(lr=0.05, micro_batches=2, clip=1.0, attack=PGDSettings(**PGD_2)),
    "trades": TRADES(lr=0.05, attack=PGDSettings(loss="kl", init="gaussian", **PGD_2)),
    "trades, one clean pass": TRADES(
        lr=0.05, attack=PGDSettings(loss="kl", init="gaussian", batchnorm="batch", **PGD_2)
    ),
    "mart": MART(lr=0.05, attack=PGDSettings(init="gaussian", **PGD_2)),
    "alp": ALP(lr=0.05, attack=PGDSettings(targeted=True, **PGD_2)),
    "fgsm-rs": FGSMRS(lr=0.05, attack=PGDSettings(**{**PGD_2, "steps": 1, "batchnorm": "train"})),
    "free": Free(lr=0.05, eps=0.1),
    "free in L2": Free(lr=0.05, eps=0.5, norm="L2"),
    "norm-penalty": NormPenalty(lr=0.05, attack=PGDSettings(**PGD_2)),
    "llr": LLR(lr=0.05, eps=0.1, search_steps=2),
    "llr in L2": LLR(lr=0.05, eps=0.5, norm="L2", search_steps=2, ascent="gap"),
    "gat": GAT(lr=0.05, attack=PGDSettings(**ONE)),
    "nuat": NuAT(lr=0.05, attack=PGDSettings(**ONE)),
    "llr+awp": AWP(LLR(lr=0.05, eps=0.1, search_steps=2), gamma=0.05),
    "nuat+awp": AWP(NuAT(lr=0.05, attack=PGDSettings(**ONE)), gamma=0.05),
    "jarn": JARN(lr=0.05, eps=0.1, update_interval=1, discriminator_width=4, discriminator_layers=2),
    "at+awp": AWP(AT(lr=0.05, attack=PGDSettings(**PGD_2))),
    "trades+awp": AWP(TRADES(lr=0.05, attack=PGDSettings(loss="kl", init="gaussian", **PGD_2)), gamma=0.05),
    "free+awp": AWP(Free(lr=0.05, eps=0.1), weight_decay_at="original"),
    "afd, adversarial": AFD(lr=0.05, hidden=4, adversarial_weight=0.5, attack=PGDSettings(**PGD_2)),
    "afd, divergence": AFD(lr=0.05, hidden=4, divergence_weight=1.0, attack=PGDSettings(**PGD_2)),
    "afd alternating, adversarial": AFD(
        lr=0.05, hidden=4, adversarial_weight=0.5, schedule="alternating", attack=PGDSettings(**PGD_2)
    ),
    "adamw, no decay of norms": AT(lr=0.01, optimizer="adamw", decay_norms=False, attack=PGDSettings(**PGD_2)),
    "nesterov": AT(lr=0.05, nesterov=True, attack=PGDSettings(**PGD_2)),
    **{
        f"union, {choice}": AT(lr=0.05, attack=UnionSettings(**UNION, choice=choice))
        for choice in ("worst", "random", "average", "fooling")
    },
    "trades, union": TRADES(lr=0.05, attack=UnionSettings(**UNION, loss="kl", choice="average")),
    "afd, union": AFD(lr=0.05, hidden=4, attack=UnionSettings(**UNION, choice="average", batchnorm="batch")),
    "replays": Replays(lr=0.05),
    "remembers": Remembers(lr=0.05),
    "wrapped": Perturbed(AT(lr=0.05, attack=PGDSettings(**PGD_2)), gamma=0.05),
    "no labels": Steady(lr=0.05),
}


def network():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    return FeatureClassifier(encoder, 5, 3).train()


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.rand(8, 1, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)


class Eager(recording.GraphedStep):
    """As if nothing could be captured: the same optimizers, which are made recordable."""

    def _capture(self, _inputs):
        return None


def trained(method, kind=recording.GraphedStep):
    """The network after some steps, and their losses."""
    model = network()
    step = method.build(model)
    calls, losses = kind(model, step, CPU), []
    for number, (x, y) in enumerate(batches()):
        losses.append({name: float(loss) for name, loss in calls(x, y, seed=number).items()})
    assert step.steps == STEPS
    return model, losses


@pytest.mark.filterwarnings("ignore:LLR differentiates the gradient")
@pytest.mark.parametrize("name", METHODS)
def test_a_captured_step_is_the_step(name, tapes):
    """Weights, running statistics and losses, bit for bit; all but the first of each kind are replays."""
    kinds = KINDS.get(name, 1)
    alone, told = trained(METHODS[name], Eager)
    before = len(tapes)
    replayed, losses = trained(METHODS[name])
    assert len(tapes) == before + kinds
    assert sum(tape.replays for tape in tapes[before:]) == STEPS - kinds
    assert losses == told
    for (key, ours), plain in zip(replayed.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(ours, plain), key


def test_each_way_that_jarn_goes_is_captured(tapes):
    """Before its start, after it, with an update of the discriminator, and after it, when that has its momentum."""
    ends = []
    for kind in (Eager, recording.GraphedStep):
        model = network()
        torch.manual_seed(2)
        method = JARN(lr=0.05, start_step=4, update_interval=3, discriminator_width=4, discriminator_layers=2)
        step = method.build(model)
        calls = kind(model, step, CPU)
        for number, (x, y) in enumerate(batches(14)):
            calls(x, y, seed=number)
        ends.append([one.clone() for module in (model, *step.players.values()) for one in module.state_dict().values()])
    assert len(tapes) == 4
    assert sum(tape.replays for tape in tapes) == 14 - 4
    assert all(map(torch.equal, *ends))


@dataclass(frozen=True, kw_only=True)
class Weighted(Supervised):
    """Two terms, of which one has a weight."""

    weight: float = 0.5
    attack: PGDSettings = PGDSettings(**PGD_2)

    def losses(self, model, batch):
        attacked = self.cross_entropy(model(self.attack(model, batch)), batch.y)
        return {"task": self.cross_entropy(model(batch.x), batch.y), "attacked": self.weight * attacked}


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("name", ["weight", "attack.eps", "attack.alpha"])
def test_a_number_that_grows_makes_no_other_capture(name, around, tapes):
    """A captured step follows what is filled in, as a method made anew with each number does."""
    values = [0.01, 0.02, 0.04, 0.06, 0.08, 0.1]
    ends = []
    for captured in (False, True):
        model = network()
        method = Perturbed(Weighted(lr=0.05)) if around else Weighted(lr=0.05)
        step = method.build(model)
        held = step.live(name, values[0])
        calls = (recording.GraphedStep if captured else Eager)(model, step, CPU)
        for number, ((x, y), value) in enumerate(zip(batches(), values, strict=True)):
            held.fill_(value)
            calls(x, y, seed=number)
        ends.append(copy.deepcopy(model))
    assert len(tapes) == 1
    plain = network()
    step = Weighted(lr=0.05).build(plain)
    calls = Eager(plain, step, CPU)
    for number, ((x, y), value) in enumerate(zip(batches(), values, strict=True)):
        if not around:
            attack = PGDSettings(**{**PGD_2, **({name.partition(".")[2]: value} if "." in name else {})})
            step.adopt(Weighted(lr=0.05, attack=attack, **({} if "." in name else {name: value})))
            step(x, y, seed=number)
    for key, ours in ends[1].state_dict().items():
        assert torch.equal(ours, ends[0].state_dict()[key]), key
        assert around or torch.equal(ours, plain.state_dict()[key]), key


def test_a_number_that_a_method_has_not_is_named():
    step = Weighted().build(network())
    with pytest.raises(Exception, match="PGDSettings has no number 'epsilon'"):
        step.live("attack.epsilon", 0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lr", "lr is the optimizers' own since the step was built"),
        ("weight_decay", "set it in step.optimizers"),
        ("micro_batches", "micro_batches of Weighted is 1, no number that may change"),
        ("optimizer", "is 'sgd', no number"),
        ("attack.steps", "steps of PGDSettings is 2, no number"),
        ("attack.norm", "no number"),
    ],
)
@pytest.mark.parametrize("around", [False, True])
def test_a_number_that_no_step_would_read_again_is_refused(name, message, around):
    step = (Perturbed(Weighted()) if around else Weighted()).build(network())
    with pytest.raises(InputError, match=message):
        step.live(name, 0.1)
