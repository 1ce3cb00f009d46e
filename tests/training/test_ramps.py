"""Ramps: numbers of a method and of its attack that grow in the first epochs, also in recorded steps."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from toy_methods import Perturbed

from afd.attacks import PGD, PGDSettings
from afd.cli import main
from afd.errors import InputError, InputTypeError
from afd.methods import AT, Execution, Ramp, Supervised
from afd.methods.attacking import GivenAttack
from afd.methods.ramps import ramps_of
from afd.nn import FeatureClassifier
from afd.options import train_config
from afd.training import Trainer, recording

X = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [(X[i : i + 8], torch.arange(8) % 3) for i in (0, 8, 16)]
ATTACK = PGDSettings(eps=0.12, steps=6, fold_batchnorm=False)


@dataclass(frozen=True, kw_only=True)
class Weighted(Supervised):
    """Two terms, of which one has a weight.

    Attributes:
        beta: of the attacked images' loss.
        limit: of nothing.
    """

    beta: float = 6
    limit: float | None = None
    attack: PGDSettings = ATTACK

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 0:
            raise InputError(f"beta is {self.beta}; it must be >= 0")

    def losses(self, model, batch):
        attacked = self.cross_entropy(model(self.attack(model, batch)), batch.y)
        return {"task": self.cross_entropy(model(batch.x), batch.y), "attacked": self.beta * attacked}


def network():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
    return FeatureClassifier(encoder, 5, 3)


def trainer(method=None, **settings):
    method = Weighted(lr=0.05) if method is None else method
    return Trainer(network(), method, **{"epochs": 4, "schedule": "cosine", **settings})


def seen_in(made):
    """Numbers of the method that each step meets."""
    update, seen = made.step.update, []

    def looking(batch):
        core = made.step.method
        core = getattr(core, "method", core)
        attack = made.step.attacks.of(core.attack)
        seen.append((float(core.beta), float(attack.eps), attack.steps, float(attack.alpha)))
        return update(batch)

    made.step.update = looking
    return seen


def way(first, own, steps, done):
    return first + (own - first) * min(1, (done + 1) / steps)


@pytest.mark.parametrize("around", [False, True])
def test_numbers_go_linearly_to_their_own_value(around):
    """In the order of steps; the step size stays that of the attack with all its steps, and follows its radius."""
    core = Weighted(lr=0.05)
    ramps = {"beta": Ramp(1, 2.5), "attack.eps": Ramp(0.03, 2), "attack.steps": Ramp(2, 3)}
    made = trainer(Perturbed(core) if around else core, ramps=ramps)
    seen = seen_in(made)
    made.fit(BATCHES, BATCHES)
    for done, (beta, eps, steps, alpha) in enumerate(seen):
        assert beta == pytest.approx(way(1, 6, 8, done))
        assert eps == pytest.approx(way(0.03, 0.12, 6, done))
        assert steps == round(way(2, 6, 9, done))
        assert alpha == pytest.approx(2.5 * eps / 6)
    assert len(seen) == 12
    assert seen[-1] == pytest.approx((6, 0.12, 6, 0.05))


def test_the_step_size_stays_that_of_the_whole_attack_where_only_its_steps_grow():
    made = trainer(ramps={"attack.steps": Ramp(1, 3)}, eps_warmup=0.0)
    seen = seen_in(made)
    made.fit(BATCHES, BATCHES)
    assert [alpha for *_, alpha in seen] == pytest.approx([0.05] * 12)
    made = trainer(ramps={"attack.steps": Ramp(1, 3)}, eps_warmup=2.0)
    seen = seen_in(made)
    made.fit(BATCHES, BATCHES)
    for done, (_, eps, _, alpha) in enumerate(seen):
        assert eps == pytest.approx(way(0, 0.12, 6, done))
        assert alpha == pytest.approx(way(0, 0.05, 6, done))


def test_ramps_of_a_run_that_was_left_are_gone_on_with():
    ramps = {"beta": Ramp(0, 3.5), "attack.steps": Ramp(1, 3)}
    whole = trainer(ramps=ramps)
    expected = seen_in(whole)
    whole.fit(BATCHES, BATCHES)
    first = trainer(ramps=ramps, log_every=1)
    first.callbacks = [lambda report: first.stop() if report.global_step == 5 else None]
    first.fit(BATCHES, BATCHES)
    second = trainer(ramps=ramps, log_every=1)
    second.load_state_dict(first.state_dict())
    seen = seen_in(second)
    second.fit(BATCHES, BATCHES)
    assert seen == expected[5:]
    assert all(torch.equal(one, whole.network.state_dict()[name]) for name, one in second.network.state_dict().items())
    with pytest.raises(Exception, match=r"ramps.beta.first is 0 there and 1 here"):
        trainer(ramps={**ramps, "beta": Ramp(1, 3.5)}, log_every=1).load_state_dict(first.state_dict())


@pytest.mark.parametrize("steps", [6, 12])
def test_a_recorded_step_is_captured_once_for_each_number_of_steps(steps, tapes, monkeypatch):
    """And follows all other numbers in what was captured; more counts than attacks stay built."""
    attack = PGDSettings(eps=0.12, steps=steps, fold_batchnorm=False)
    ramps = {"beta": Ramp(0, 3), "attack.eps": Ramp(0.03, steps - 1), "attack.steps": Ramp(1, steps)}

    def run():
        method = Weighted(lr=0.05, attack=attack)
        made = trainer(method, ramps=ramps, epochs=steps + 2, execution=Execution(graph=True))
        made.fit(BATCHES, BATCHES)
        return made.network.state_dict()

    replayed = run()
    counts = [round(way(1, steps, 3 * steps, done)) for done in range(3 * (steps + 2))]
    assert len(set(counts)) == steps
    captured = [count for count in set(counts) if counts.count(count) > 1]  # the other is met once, and not captured
    assert len(tapes) == len(captured) == steps - 1
    assert sum(tape.replays for tape in tapes) == len(counts) - steps  # all but the first of each count
    monkeypatch.setattr(recording.GraphedStep, "_capture", lambda *_: None)
    eager = run()
    assert all(torch.equal(one, eager[name]) for name, one in replayed.items())


@pytest.mark.parametrize(
    ("ramps", "message"),
    [
        ({"gamma": Ramp(0, 1)}, "ramps has 'gamma'; Weighted has no such number: "),
        ({"attack.epsilon": Ramp(0, 1)}, "ramps has 'attack.epsilon'; Weighted has no such number: .*attack.eps"),
        ({"validation_attack.eps": Ramp(0, 1)}, "no such number"),
        ({"lr": Ramp(0, 1)}, "ramps has lr, which is the optimizers' own; lr_warmup and schedule change their rates"),
        ({"micro_batches": Ramp(1, 1)}, "ramps has micro_batches, a whole number; of these only attack.steps may"),
        ({"attack.norm": Ramp(1, 1)}, "ramps has attack.norm, which is 'Linf', no number that may change"),
        ({"attack.random_start": Ramp(1, 1)}, "which is True, no number"),
        ({"attack": Ramp(1, 1)}, "no number that may change"),
        ({"limit": Ramp(1, 1)}, "ramps has limit, which is None: there is no value to go to"),
        ({"beta": Ramp(-1, 1)}, "ramps has beta, which cannot begin there: beta is -1; it must be >= 0"),
        ({"attack.eps": Ramp(-1, 1)}, "ramps has attack.eps, which cannot begin there: eps is -1"),
        ({"attack.steps": Ramp(1.5, 1)}, "ramps has attack.steps, which begins at 1.5; it must be a whole number"),
        ({"attack.steps": Ramp(-1, 1)}, "ramps has attack.steps, which cannot begin there: steps is -1"),
    ],
)
def test_what_cannot_be_meant_is_named_when_the_trainer_is_made(ramps, message):
    with pytest.raises(InputError, match=message):
        trainer(ramps=ramps)


def test_a_number_that_two_would_move_is_named():
    with pytest.raises(InputError, match=r"ramps has attack\.eps, which eps_warmup=1 lets grow already; name one of"):
        trainer(ramps={"attack.eps": Ramp(0, 1)}, eps_warmup=1)
    trainer(ramps={"beta": Ramp(0, 1)}, eps_warmup=1)


def test_other_mistakes_are_named():
    with pytest.raises(InputError, match=r"epochs of a ramp is -1"):
        Ramp(0, -1)
    with pytest.raises(InputError, match=r"first of a ramp is inf"):
        Ramp(float("inf"), 1)
    with pytest.raises(InputTypeError, match="ramps must be ramps by the name of a number"):
        trainer(ramps={"beta": (0, 5)})
    given = AT(attack=GivenAttack(lambda model: PGD(model)), validation_attack=None)
    with pytest.raises(InputError, match=r"but the attack is a GivenAttack, which has no settings"):
        trainer(given, ramps={"attack.eps": Ramp(0, 5)})


def test_ramps_are_written_in_words():
    assert ramps_of(["beta=0:5", "attack.eps=1/255:2.5"]) == {"beta": Ramp(0, 5), "attack.eps": Ramp(1 / 255, 2.5)}
    for word in ("beta", "beta=1", "=1:2", "beta=a:2", "beta=1:", "beta=1/0:2"):
        with pytest.raises(InputError, match=re.escape(f"ramps has {word!r}; a ramp is written NAME=FIRST:EPOCHS")):
            ramps_of([word])
    with pytest.raises(InputError, match="ramps names beta twice"):
        ramps_of(["beta=0:5", "beta=1:5"])


def test_a_command_and_its_file_say_them(tmp_path, capsys):
    config = train_config(["at", "--ramps", "attack.eps=0:10", "attack.steps=2:20", "--epochs", "3"], None)
    assert config.ramps == ("attack.eps=0:10", "attack.steps=2:20")
    (tmp_path / "run.toml").write_text(config.settled().as_toml())
    assert train_config(["--config", str(tmp_path / "run.toml")], None).ramps == config.ramps
    assert "ramps" not in train_config(["at"], None).as_json()
    few = ["train", "at", "--limit", "30", "--epochs", "1", "--width", "2", "--out", str(tmp_path / "out")]
    assert main([*few, "--ramps", "attack.eps=0:1", "--eps-warmup", "1"]) == 2
    assert "ramps has attack.eps, which eps_warmup=1 lets grow already" in capsys.readouterr().err
    assert main([*few, "--ramps", "attack.eps=0:1", "attack.steps=1:0.5", "--attack-steps", "3"]) == 0
