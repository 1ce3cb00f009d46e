"""Alarms: what sets them off and what does not, what is done about them, and that looking changes nothing."""

import dataclasses
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from toy_methods import Bursting

from afd import data
from afd.attacks import PGDSettings, UnionSettings
from afd.checkpoint import load_checkpoint
from afd.cli import main
from afd.data import Batches
from afd.errors import InputError
from afd.evaluation.report import alarms_of
from afd.experiments.display import plot_curves
from afd.methods import AFD, ALP, AT, AWP, FGSMRS, JARN, MART, TRADES, Execution, Free, Natural
from afd.methods.optimizers import GradientNorms
from afd.methods.ramps import remedied, with_stronger_attack
from afd.nn import build_model
from afd.presets import method_for
from afd.runtime import Group
from afd.training import EpochReport, Trainer, TrainingError, alarms, json_lines, tensorboard
from afd.training.alarms import Alarm, Probes, RollbackReport, Watch
from afd.training.data import MOST, Sample

X = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 2
X[:, :, :2] = 0.3 * X[:, :, :2] + 0.7 * Y[:, None, None, None]  # the upper half tells
TRAIN = [(X[:20], Y[:20]), (X[20:40], Y[20:40])]
HELD_OUT = [(X[40:], Y[40:])]
ONE_STEP = PGDSettings(eps=0.05, alpha=0.06, steps=1)
JUDGE = PGDSettings(eps=0.05, steps=2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))


def one_step_method(**settings):
    return FGSMRS(lr=0.5, attack=ONE_STEP, validation_attack=JUDGE, **settings)


def seen(natural=0.9, robust=0.5, one_step=0.6):
    return SimpleNamespace(natural=natural, robust=robust, one_step=one_step, global_step=1)


def weights(trainer):
    return [one.detach().clone() for one in trainer.network.parameters()]


def same(one, other):
    return all(map(torch.equal, one, other))


# --- Verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "now", "rings"),
    [
        ([seen(robust=0.5)], seen(robust=0.02, one_step=0.9), True),  # as FGSM-RS collapses
        ([seen(robust=0.5)], seen(robust=0.24, one_step=0.6), True),
        ([seen(robust=0.5)], seen(robust=0.3, one_step=0.9), False),  # not down to half
        ([seen(robust=0.5)], seen(robust=0.05, one_step=0.1), False),  # it fell, but under one step, too
        ([seen(robust=0.2)], seen(robust=0.05, one_step=0.5), False),  # a gap, before it is robust at all
        ([seen(robust=0.01, one_step=0.9)], seen(robust=0.0, one_step=0.95), True),  # never robust
        ([seen(robust=0.3, one_step=0.9)], seen(robust=0.2, one_step=0.9), False),
        ([], seen(robust=0.0, one_step=0.9), False),  # the first epoch
        ([seen(robust=None)], seen(robust=None, one_step=0.9), False),  # nobody knows
    ],
)
def test_collapse_is_a_fall_of_many_step_accuracy_that_one_step_does_not_follow(history, now, rings):
    found = alarms.collapsed(history, now, 7, (1000, 250), Probes())
    assert (found is not None) == rings
    if rings:
        assert (found.kind, found.epoch) == ("catastrophic overfitting", 7)
        assert found.figures["one_step"] == now.one_step


def test_few_images_are_no_evidence_of_a_collapse():
    assert alarms.collapsed([seen(robust=0.5)], seen(robust=0.2, one_step=0.6), 2, (10, 5), Probes()) is None


def test_without_a_validation_attack_probes_say_what_many_steps_leave():
    now, probes = seen(robust=None, one_step=0.9), Probes(found=[[60, 1, 0, 0, -1.0]])
    assert alarms.collapsed([seen(robust=0.5)], now, 3, (1000, 250), probes) is not None


@pytest.mark.parametrize(
    ("found", "rings"),
    [
        ([[100, 50, 50, 20, 0.5]], True),  # Square beats PGD
        ([[30, 16, 16, 1, 0.5], [30, 16, 16, 1, 0.5]], False),  # a lucky image or two
        ([[20, 7, 7, 2, 0.4]], False),  # too few to tell
        ([[30, 16, 0, 0, 0.5], [30, 16, 16, 4, 0.5]] * 3, True),
        ([[100, 50, 50, 0, 0.5]], False),
        ([[200, 40, 0, 0, 0.8]], True),  # restarts break what validation's attack could not
        ([[200, 100, 0, 0, 0.55]], False),
        ([], False),
    ],
)
def test_gradients_are_masked_where_square_or_restarts_break_what_pgd_could_not(found, rings):
    alarm = alarms.masked(Probes(found=[list(map(float, one)) for one in found]), 3)
    assert (alarm is not None) == rings
    assert alarm is None or alarm.kind == "masked gradients"


def chance(*natural, steps=100):
    """The alarm of a run whose epochs, of so many steps each, have these clean accuracies."""
    epochs = [SimpleNamespace(natural=one, global_step=steps * number) for number, one in enumerate(natural, 1)]
    return alarms.at_chance(epochs[:-1], epochs[-1], len(epochs), 1000, 0.1)


def test_chance_is_told_after_three_epochs_and_a_hundred_steps_of_it():
    assert chance(0.11, 0.1, 0.11) is not None
    assert chance(0.5, 0.11, 0.1, 0.11) is not None  # it has forgotten all
    assert chance(0.11, 0.1) is None
    assert chance(0.11, 0.1, 0.14) is None
    assert chance(0.11, 0.2, 0.1, 0.1) is None
    assert chance(0.11, 0.1, 0.11, steps=33) is None
    assert chance(*[0.1] * 9, steps=11) is None
    assert chance(*[0.1] * 10, steps=11) is not None
    told = str(chance(0.11, 0.1, 0.11))
    assert "eps_warmup" in told
    assert "smaller learning rate" in told


def test_gradients_explode_where_they_are_not_finite_or_far_beyond_the_usual():
    assert alarms.exploded([1.0, 2.0, 3.0, 2.0, 2.0], 1000.0, 6) is not None
    assert alarms.exploded([1.0, 2.0, 3.0, 2.0, 2.0], 100.0, 6) is None
    assert alarms.exploded([1.0], 1000.0, 2) is None
    assert alarms.exploded([], float("nan"), 1) is not None
    assert alarms.exploded([], float("inf"), 1) is not None


def test_an_alarm_survives_json():
    alarm = Alarm.of("at chance", 3, "so it is", natural=0.1)
    assert Alarm(**json.loads(json.dumps(dataclasses.asdict(alarm)))) == alarm
    report = EpochReport(1, 2, {}, 0.1, None, 1.0, {}, None, (alarm,))
    assert EpochReport.read(json.loads(json.dumps(dataclasses.asdict(report)))) == report


# --- What is looked at ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 500, 3000])
def test_a_sample_is_spread_over_all_images_and_the_same_for_any_batches(size):
    x, y = torch.arange(3000.0)[:, None], torch.arange(3000) % 3
    sample = Sample(5)
    for rows, labels in zip(x.split(size), y.split(size), strict=True):
        sample.look(rows, labels)
    kept, labels = sample.images(torch.device("cpu"), range(len(sample)))
    assert kept.flatten().tolist() == list(range(5, 3000, 16))
    assert MOST / 2 < len(sample) <= MOST
    assert torch.equal(labels, kept.flatten().long() % 3)
    assert (sample.seen, sample.largest_class) == (3000, 1 / 3)


def test_at_most_half_of_few_images_are_looked_at_and_others_in_the_next_epoch():
    halves = []
    for epoch in (1, 2):
        sample = Sample(epoch)
        sample.look(*HELD_OUT[0])
        halves.append(sample.images(torch.device("cpu"), range(len(sample)))[0])
    assert torch.equal(halves[0], X[41::2])
    assert torch.equal(halves[1], X[40::2])


def test_norms_of_gradients_are_kept_until_they_are_read():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter, nn.Parameter(torch.zeros(3))], lr=0.1)
    norms = GradientNorms(torch.device("cpu"))
    with norms.of(optimizer):
        for gradient in ([3.0, 4.0], [1.0, 0.0]):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
    assert norms.read() == 5.0
    parameter.grad = torch.tensor([7.0, 0.0])
    optimizer.step()  # nobody looks any more
    assert norms.read() == 0.0
    with norms.of(optimizer):
        for gradient in ([float("nan"), 0.0], [1.0, 0.0]):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
    assert norms.read() != norms.read()  # NaN, then 0


def test_recorded_steps_are_looked_at_too(tapes):
    plain, recorded = (
        Trainer(network(), Natural(lr=0.1), epochs=3, execution=Execution(graph=graph)) for graph in (False, True)
    )
    for trainer in (plain, recorded):
        trainer.fit(TRAIN, HELD_OUT)
    assert recorded.watch.state.norms == pytest.approx(plain.watch.state.norms, rel=1e-5)
    assert tapes


def test_a_probe_waits_until_it_has_been_paid_for():
    watch, sample = Watch(one_step_method(), Group(), 0, JUDGE), Sample(0)
    sample.look(X, Y)
    watch.state.per_image, watch.state.seconds = [1.0, 1.0], 100.0  # five images
    watch.probe(network(), sample, 1, 0.5)
    assert watch.state.found == []
    watch.state.seconds = 20 * len(sample)
    watch.probe(network(), sample, 1, 0.5)
    ((tested, left, asked, broken, robust),) = watch.state.found
    assert (tested, asked, broken, robust) == (len(sample), 0, 0, 0.5)  # the first asks PGD alone
    assert 0 <= left <= tested
    assert 0 < watch.state.spent < 60
    watch.state.seconds = 60 * len(sample)
    watch.probe(network(), sample, 2, 0.5)
    tested, left, asked, broken, _ = watch.state.found[-1]
    assert 0 <= broken <= asked == left <= tested


def test_time_is_foreseen_by_the_quickest_look():
    state = Probes()
    for seconds in (3.0, 1.0, 2.0):
        state.expect(seconds)
    assert state.per_image == [alarms.CAUTION * 2 * alarms.STEPS * 2 / 3, alarms.CAUTION * alarms.QUERIES / 3]
    state.found.append([10, 5, 0, 0, 0.5])
    state.expect(0.1)
    assert state.per_image[1] == alarms.CAUTION * alarms.QUERIES / 3  # from then on by what probes have taken


class Shelf(nn.Module):
    """Brighter upper halves are of one class; gradients are those of something else, as rounding's might be."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        flat = x.flatten(1)
        step = (flat[:, :8].sum(1) - 4.5).detach() + self.scale * (flat[:, 8:].sum(1) - flat[:, 8:].sum(1).detach())
        return torch.stack([-step, step], 1)


def test_a_model_that_hides_its_gradients_is_flagged():
    method = FGSMRS(attack=PGDSettings(eps=0.4, alpha=0.4, steps=1))
    watch, sample = Watch(method, Group(), 0, method.judge()), Sample(0)
    sample.look(X, Y)
    watch.state.per_image, watch.state.seconds = [1e-9, 1e-9], 1e9
    for epoch in range(4):
        watch.probe(Shelf(), sample, epoch, 1.0)
        watch.state.per_image = [1e-9, 1e-9]
    found = watch.alarms([], seen(natural=1.0, robust=1.0, one_step=1.0), 4, sample)
    assert [alarm.kind for alarm in found] == ["masked gradients"]
    assert "Square" in found[0].told


# --- Looking changes nothing ----------------------------------------------------------------------------------------


class Noisy(nn.Sequential):
    """Draws in every pass, in evaluation mode, too."""

    def forward(self, x):
        return super().forward(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize(
    "method", [one_step_method(), AT(attack=JUDGE), Free(eps=0.05, replays=2), Natural(), AFD(hidden=8)]
)
@pytest.mark.parametrize("kind", [nn.Sequential, Noisy])
def test_a_run_is_the_same_whether_anybody_looks_or_not(method, kind):
    found = []
    for on_alarm in ("warn", "off"):
        model = kind(*network())
        data = torch.utils.data.TensorDataset(X[:40], Y[:40])
        trainer = Trainer(model, method, epochs=3, on_alarm=on_alarm, ema=0.5)
        if trainer.watch is not None:
            trainer.watch.state.per_image, trainer.watch.state.seconds = (
                [1e-9, 1e-9],
                1e6,
            )  # probes from the first epoch on
        torch.manual_seed(1)
        trainer.fit(torch.utils.data.DataLoader(data, 20, shuffle=True), HELD_OUT)
        reports = [{**vars(one), "images_per_second": 0, "one_step": 0, "alarms": ()} for one in trainer.history]
        found.append((weights(trainer), reports, torch.get_rng_state()))
        assert model.training
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])


def test_what_was_looked_at_is_gone_on_with_from_a_checkpoint(tmp_path):
    whole = Trainer(network(), one_step_method(), epochs=4)
    whole.fit(TRAIN, HELD_OUT)
    first = Trainer(network(), one_step_method(), epochs=4, folder=tmp_path, log_every=1)
    first.callbacks = [lambda report: report.global_step == 5 and first.stop()]
    first.fit(TRAIN, HELD_OUT)
    again = Trainer(network(), one_step_method(), epochs=4, folder=tmp_path, resume="auto")
    again.fit(TRAIN, HELD_OUT)
    assert again.watch.state.norms == whole.watch.state.norms
    assert [one.one_step for one in again.history] == [one.one_step for one in whole.history]


def test_a_checkpoint_of_a_time_without_alarms_is_gone_on_with(tmp_path):
    trainer = Trainer(network(), one_step_method(), epochs=2)
    trainer.fit(TRAIN, HELD_OUT)
    state = trainer.state_dict()
    for name in ("watch", "rollbacks"):
        del state["metadata"][name]
    for entry in state["metadata"]["history"]:
        del entry["one_step"], entry["alarms"]
    again = Trainer(network(), one_step_method(), epochs=3)
    again.load_state_dict(state)
    assert len(again.fit(TRAIN, HELD_OUT)) == 3
    assert again.history[0].one_step is None


# --- What is done about them ----------------------------------------------------------------------------------------


STUCK = Natural(lr=1e-9)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(alarms, "PATIENT_STEPS", 1)


def blank():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    return model


def test_a_warning_is_said_once_and_stands_in_each_report(impatient, capsys):
    trainer = Trainer(blank(), STUCK, epochs=7)
    history = trainer.fit(TRAIN, HELD_OUT)
    assert [len(report.alarms) for report in history] == [0, 0, 1, 1, 1, 1, 1]
    assert [alarm.epoch for alarm in trainer.alarms] == [3, 4, 5, 6, 7]
    assert capsys.readouterr().err.count("at chance") == 1


def test_a_run_stops_at_its_first_alarm_with_a_checkpoint(impatient, tmp_path):
    trainer = Trainer(blank(), STUCK, epochs=9, on_alarm="stop", folder=tmp_path)
    assert len(trainer.fit(TRAIN, HELD_OUT)) == 3
    assert trainer.stopped_by.kind == "at chance"
    assert load_checkpoint(tmp_path / "last.pt")[1]["position"]["epoch"] == 4


def test_the_command_measures_what_it_has_stopped_and_ends_with_status_3(impatient, tmp_path, capsys):
    few = ["--data", "digits", "--limit", "120", "--width", "2", "--epochs", "8", "--out", str(tmp_path)]
    assert main(["train", "natural", "--lr", "1e-9", "--on-alarm", "stop", *few]) == 3
    out, err = capsys.readouterr()
    assert "ALARM: at chance" in out
    assert "alarm: at chance in epoch 3: clean accuracy is" in out
    assert "afd: stopped by an alarm, at chance in epoch 3" in err
    found = json.loads((tmp_path / "result.json").read_text())
    assert [alarm["kind"] for alarm in found["alarms"]] == ["at chance"]
    assert found["rollbacks"] == []
    assert (tmp_path / "curves.png").exists()
    metadata = load_checkpoint(tmp_path / "last.pt")[1]
    assert alarms_of(metadata)[0].startswith("alarm: at chance in epoch 3")
    assert alarms_of({}) is None


def test_tensorboard_and_curves_show_alarms_and_hide_what_was_undone(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = Trainer(
        network(), Bursting(), epochs=5, on_alarm="rollback", log_every=1, schedule=lambda _: 1.0,
        callbacks=[tensorboard(tmp_path), json_lines(tmp_path / "log.jsonl")],
    )  # fmt: skip
    trainer.fit(TRAIN, HELD_OUT)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [one.step for one in events.Scalars("lr/task")] == list(range(1, 11))
    assert [one.value for one in events.Scalars("alarm/rollback_from_epoch")] == [3.0]
    assert [one.step for one in events.Scalars("alarm/exploding_gradients")] == [4]
    plot_curves(tmp_path / "curves.png", {"run": tmp_path})


def test_nobody_looks_where_alarms_are_off(impatient):
    trainer = Trainer(blank(), STUCK, epochs=7, on_alarm="off")
    assert all(one.alarms == () and one.one_step is None for one in trainer.fit(TRAIN, HELD_OUT))


def test_another_word_is_no_setting():
    with pytest.raises(InputError, match="on_alarm is 'shout'; allowed are warn, stop, rollback, off"):
        Trainer(blank(), STUCK, on_alarm="shout")


def test_a_loss_that_is_no_number_is_undone_with_half_the_rate(tmp_path, capsys):
    reports = []
    trainer = Trainer(
        network(), Bursting(), epochs=5, on_alarm="rollback", folder=tmp_path, log_every=1, schedule=lambda _: 1.0,
        callbacks=[reports.append, json_lines(tmp_path / "log.jsonl")],
    )  # fmt: skip
    history = trainer.fit(TRAIN, HELD_OUT)
    assert [one.epoch for one in history] == [1, 2, 3, 4, 5]
    assert [one.learning_rates["task"] for one in history] == [0.5, 0.5, 0.25, 0.25, 0.25]
    (undone,) = [one for one in reports if isinstance(one, RollbackReport)]
    assert (undone.epoch, undone.global_step, undone.remedy) == (3, 4, "learning rates times 0.5")
    assert undone.alarms[0].kind == "exploding gradients"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line["global_step"] for line in lines if line["kind"] == "interval"]
    assert steps == list(range(1, 11))
    assert [line["kind"] for line in lines].count("rollback") == 1
    assert "gone back to step 4, before epoch 3, and on with learning rates times 0.5" in capsys.readouterr().err
    metadata = load_checkpoint(tmp_path / "last.pt")[1]
    assert [one["remedy"] for one in metadata["rollbacks"]] == ["rates"]


def test_after_a_rollback_it_is_the_run_that_had_the_smaller_rate_from_there_on():
    trainer = Trainer(network(), Bursting(), epochs=5, on_alarm="rollback", schedule=lambda _: 1.0)
    trainer.fit(TRAIN, HELD_OUT)
    plain = Trainer(network(), Bursting(limit=9.0), epochs=5, schedule=lambda done: 1.0 if done < 0.4 else 0.5)
    plain.fit(TRAIN, HELD_OUT)
    assert same(weights(trainer), weights(plain))


def test_what_was_changed_stays_changed_in_a_run_that_goes_on(tmp_path):
    settings = {"on_alarm": "rollback", "schedule": lambda _: 1.0}
    whole = Trainer(network(), Bursting(), epochs=6, **settings)
    whole.fit(TRAIN, HELD_OUT)
    first = Trainer(network(), Bursting(), epochs=6, folder=tmp_path, **settings)
    first.callbacks = [lambda report: report.epoch == 4 and first.stop()]
    first.fit(TRAIN, HELD_OUT)
    again = Trainer(network(), Bursting(), epochs=6, folder=tmp_path, resume="auto", **settings)
    again.fit(TRAIN, HELD_OUT)
    assert same(weights(whole), weights(again))
    assert again.rates.scale == 0.5
    assert again.alarms == whole.alarms != []


def test_without_rollback_a_loss_that_is_no_number_is_the_error_that_it_was():
    with pytest.raises(TrainingError, match="the loss 'task' became nan in step 6"):
        Trainer(network(), Bursting(), epochs=5, log_every=1, schedule=lambda _: 1.0).fit(TRAIN, HELD_OUT)


def test_after_three_rollbacks_it_is_the_error_again():
    trainer = Trainer(network(), Bursting(limit=0.0), epochs=5, log_every=1, on_alarm="rollback")
    with pytest.raises(TrainingError, match="the loss 'task' became nan in step 6"):
        trainer.fit(TRAIN, HELD_OUT)
    assert len(trainer.rollbacks) == 3


def ringing(monkeypatch, while_steps):
    """Has epoch 3 collapse as long as the attack takes so few steps; returns the trainer's steps of attack by epoch."""
    taken = {}

    def collapsed(history, now, epoch, images, probes):
        taken.setdefault(epoch, []).append(held[0].step.method.attack.steps)
        rings = epoch == 3 and taken[epoch][-1] <= while_steps
        return Alarm.of("catastrophic overfitting", epoch, "it collapsed") if rings else None

    held = []
    monkeypatch.setattr(alarms, "collapsed", collapsed)
    return held, taken


@pytest.mark.parametrize("around", [lambda method: method, AWP])
def test_a_collapse_is_undone_with_twice_the_steps(monkeypatch, around):
    held, taken = ringing(monkeypatch, 2)
    trainer = Trainer(network(), around(one_step_method()), epochs=4, on_alarm="rollback")
    held.append(trainer)
    history = trainer.fit(TRAIN, HELD_OUT)
    assert taken == {1: [1], 2: [1], 3: [1, 2, 4], 4: [4]}
    assert [one.epoch for one in history] == [1, 2, 3, 4]
    assert [back["told"] for back in trainer.rollbacks] == [
        "attack.steps 1 → 2, attack.alpha 0.06 → 0.03",
        "attack.steps 2 → 4, attack.alpha 0.03 → 0.015",
    ]
    assert trainer.method.attack.steps == 1  # the run's settings are those of before


def test_after_three_rollbacks_a_collapse_stops_the_run(monkeypatch, tmp_path):
    held, _ = ringing(monkeypatch, 99)
    trainer = Trainer(network(), one_step_method(), epochs=6, on_alarm="rollback", folder=tmp_path)
    held.append(trainer)
    assert len(trainer.fit(TRAIN, HELD_OUT)) == 3
    assert (len(trainer.rollbacks), trainer.stopped_by.kind) == (3, "catastrophic overfitting")


def test_growing_numbers_grow_on_after_a_rollback(monkeypatch):
    held, _ = ringing(monkeypatch, 1)
    trainer = Trainer(network(), one_step_method(), epochs=4, on_alarm="rollback", eps_warmup=4.0)
    held.append(trainer)
    trainer.fit(TRAIN, HELD_OUT)
    attack = trainer.step.attacks.of(trainer.step.method.attack)
    assert (float(attack.eps), float(attack.alpha), attack.steps) == (0.05, 0.03, 2)


def test_recorded_steps_follow_a_rollback(tapes, monkeypatch):
    found = []
    for graph in (False, True):
        held, _ = ringing(monkeypatch, 1)
        trainer = Trainer(network(), one_step_method(), epochs=5, on_alarm="rollback", execution=Execution(graph=graph))
        held.append(trainer)
        trainer.fit(TRAIN, HELD_OUT)
        found.append(weights(trainer))
    assert len(tapes) > 1
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_what_attacks_by_itself_takes_half_the_step():
    assert with_stronger_attack(Free(eps=0.2)).alpha == 0.1
    assert with_stronger_attack(AWP(Free(eps=0.2, alpha=0.1))).method.alpha == 0.05
    natural = Natural()
    assert with_stronger_attack(natural) is natural
    assert remedied(AT(), ["attack", "rates", "rates"])[1] == 0.25
    union = UnionSettings(eps=0.2, eps_l2=0.8, eps_l1=2.0, alpha_l2=0.4, steps=3)
    assert with_stronger_attack(AT(attack=union)).attack == dataclasses.replace(union, steps=6, alpha_l2=0.2)


def test_every_ball_of_a_union_is_looked_into():
    """One step in each ball, and a probe's PGD and Square in each: the radii of the two balls tell them apart."""
    union = UnionSettings(eps=0.1, eps_l2=0.5, steps=4, choice="average")
    found = alarms.one_step(AT(attack=union))
    assert (found.balls, found.steps, found.choice, found.random_start) == (
        {"Linf": 0.1, "L2": 0.5},
        1,
        "fooling",
        False,
    )
    watch, asked = Watch(AT(attack=union), Group(), 0, union.pgd(20)), []

    def noted(model, attack, x, y, seed, first):
        asked.append((type(attack).__name__, attack.norm, attack.eps))
        return torch.ones(len(x), dtype=torch.bool)

    watch.state.seconds, watch.state.per_image = 1e6, [1e-6, 1e-6]
    sample = Sample(0)
    sample.look(torch.rand(64, 1, 4, 4), torch.arange(64) % 3)
    with mock.patch.object(alarms, "_withstand", noted):
        for epoch in (1, 2):
            watch.state.per_image = [1e-6, 1e-6]
            watch.probe(torch.nn.Identity(), sample, epoch, 0.5)
    balls = [("Linf", 0.1), ("L2", 0.5)]
    first = [(kind, *ball) for kind in ("PGDSettings", "PGDSettings") for ball in balls]
    assert asked == [*first, *first, *(("SquareSettings", *ball) for ball in balls)]
    assert watch.state.found == [[32, 32, 0, 0, 0.5], [32, 32, 32, 0, 0.5]]


# --- Found by trying ----------------------------------------------------------------------------------------------


def rings_in(monkeypatch, epoch, once=True):
    """Has an alarm go off after one epoch, for as long as the trainer has not gone back."""
    held, orig = [], Watch.alarms

    def faked(self, history, now, number, sample):
        orig(self, history, now, number, sample)
        self.learning = True
        rings = number == epoch and not (once and held[0].rollbacks)
        return (Alarm.of(alarms.GRADIENTS, number, "faked"),) if rings else ()

    monkeypatch.setattr(Watch, "alarms", faked)
    return held


def drawing(folder=None, **settings):
    """A trainer whose model and loader draw at random."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)
    trainer = Trainer(nn.Sequential(*layers), Natural(lr=0.1), epochs=5, folder=folder, on_alarm="rollback", **settings)
    torch.manual_seed(5)
    rows = torch.utils.data.TensorDataset(X[:40], Y[:40])
    return trainer, torch.utils.data.DataLoader(rows, 10, shuffle=True)


@pytest.mark.parametrize("moment", ["after the rollback", "in the bad epoch", "in the next epoch"])
def test_a_run_that_went_back_and_was_killed_ends_as_one_that_was_not(moment, tmp_path, monkeypatch):
    held = rings_in(monkeypatch, 3)
    whole, loader = drawing(tmp_path / "whole")
    held[:] = [whole]
    whole.fit(loader, HELD_OUT)
    assert len(whole.rollbacks) == 1
    killed, loader = drawing(tmp_path / "killed", log_every=1, save_every=1)
    held[:] = [killed]

    def kill(report):
        kind, back = type(report).__name__, bool(killed.rollbacks)
        at = {"after the rollback": kind == "RollbackReport", "in the bad epoch": report.global_step == 10 and not back,
              "in the next epoch": report.global_step == 10 and back}[moment]  # fmt: skip
        if at:
            raise KeyboardInterrupt

    killed.callbacks = [kill]
    with pytest.raises(KeyboardInterrupt):
        killed.fit(loader, HELD_OUT)
    again, loader = drawing(tmp_path / "killed", log_every=1, save_every=1, resume="auto")
    held[:] = [again]
    again.fit(loader, HELD_OUT)
    assert len(again.rollbacks) == 1
    assert same(weights(again), weights(whole))


def test_a_run_that_an_alarm_has_stopped_stays_so_until_it_is_asked_for_something_else(tmp_path, monkeypatch):
    held = rings_in(monkeypatch, 2)
    made = [{"on_alarm": "stop"}, {"on_alarm": "stop", "resume": "auto"}, {"on_alarm": "warn", "resume": "auto"}]
    ends = []
    for settings in made:
        trainer = Trainer(network(), Natural(lr=0.1), epochs=4, folder=tmp_path, **settings)
        held[:] = [trainer]
        trainer.fit(TRAIN, HELD_OUT)
        ends.append((len(trainer.history), trainer.stopped_by is not None))
    assert ends == [(2, True), (2, True), (4, False)]


def test_what_is_undone_is_not_the_best(tmp_path, monkeypatch):
    """Epochs at chance, not known to be so yet, are robust; after the way back, best.pt is of an epoch that is left."""
    held = rings_in(monkeypatch, 4)
    faked = Watch.alarms

    def at_chance(self, history, now, number, sample):
        found = faked(self, history, now, number, sample)
        self.learning = number == 1 or bool(held[0].rollbacks)
        return found

    monkeypatch.setattr(Watch, "alarms", at_chance)
    trainer = Trainer(network(), one_step_method(), epochs=5, folder=tmp_path, on_alarm="rollback")
    held[:] = [trainer]
    robust = iter([0.1, 0.5, 0.5, 0.5, 0.05, 0.05, 0.05, 0.05])
    measure = Trainer._measure

    def fixed(self, loader, attack, *more):
        return next(robust) if attack is not None else measure(self, loader, attack, *more)

    monkeypatch.setattr(Trainer, "_measure", fixed)
    trainer.fit(TRAIN, HELD_OUT)
    assert [one.robust for one in trainer.history] == [0.1, 0.05, 0.05, 0.05, 0.05]
    assert load_checkpoint(tmp_path / "best.pt")[1]["report"]["epoch"] == trainer.best.epoch == 1


def test_weights_that_the_last_step_of_an_epoch_spoils_are_undone(monkeypatch):
    trainer = Trainer(network(), Natural(lr=0.1), epochs=3, on_alarm="rollback")
    held = rings_in(monkeypatch, 99)
    held[:] = [trainer]
    step, calls = trainer._train_step, []

    def spoilt(x, y, index):
        step(x, y, index)
        calls.append(1)
        if len(calls) == 4:  # the second step of the second epoch, its last
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))

    trainer._train_step = spoilt
    trainer.fit(TRAIN, HELD_OUT)
    assert [back["epoch"] for back in trainer.rollbacks] == [2]
    assert [report.epoch for report in trainer.history] == [1, 2, 3]


def test_few_images_tell_nothing_of_chance():
    epochs = [SimpleNamespace(natural=1.0, global_step=100 * number) for number in range(1, 6)]
    assert alarms.at_chance(epochs[:-1], epochs[-1], 5, 4, 0.5) is None


def test_accuracies_in_two_balls_are_not_compared():
    """Validation in a larger ball than training's is no collapse, and in a smaller one no masking."""
    for train, judge in ((0.02, 0.6), (0.45, 0.02)):
        attack, other = PGDSettings(eps=train, steps=2), PGDSettings(eps=judge, steps=5)
        watch, sample = Watch(AT(attack=attack), Group(), 0, other), Sample(0)
        sample.look(X, Y)
        watch.state.seconds, watch.state.per_image = 1e6, [1e-6, 1e-6]
        watch.probe(network(), sample, 1, 0.9)
        assert watch.state.found[0][4] == -1.0
        before, now = EpochReport(1, 9, {}, 0.9, 0.9, 1.0, {}, 0.9), EpochReport(2, 18, {}, 0.9, 0.0, 1.0, {}, 1.0)
        assert not watch.alarms([before], now, 2, sample)


class Plain:
    """An optimizer that only looks like one of torch's, as some wrappers of others do."""

    def __init__(self, parameters):
        self.inner = torch.optim.SGD(parameters, 0.1)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self):
        self.inner.step()

    def zero_grad(self):
        self.inner.zero_grad()

    def state_dict(self):
        return self.inner.state_dict()


def test_an_optimizer_without_hooks_trains_unwatched():
    trainer = Trainer(network(), Natural(optimizers={"task": Plain}), epochs=1)
    trainer.fit(TRAIN, HELD_OUT)
    assert trainer.watch.state.norms == [0.0]


def test_a_look_takes_no_more_images_than_are_paid_for():
    watch, sample = Watch(one_step_method(), Group(), 0, JUDGE), Sample(0)
    sample.look(X, Y)
    assert watch.under_one_step(network(), sample, 20 * 4 * 15.0) is None  # of fifteen images
    assert watch.under_one_step(network(), sample, 20 * 4 * 20.0) is not None
    assert watch.looked == 20


def test_several_alarms_of_one_epoch_are_told_as_such():
    found = [Alarm.of(alarms.CHANCE, 3, "at chance")] * 4
    assert alarms.alarm_lines(found)[0].startswith("alarm: at chance in epoch 3, 4 times: ")


# --- Digits ---------------------------------------------------------------------------------------------------------


def digits(method, epochs, seed=0, batch=128, **settings):
    """A run on digits with a small convolutional network, or `model`."""
    splits = data.load("digits", None)
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
    model = settings.pop("model", None) or nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))
    trainer = Trainer(model, method, epochs=epochs, seed=seed, **settings)
    trainer.fit(Batches(splits.train, batch, shuffle=True, seed=seed), Batches(splits.validation, 500))
    return trainer


@pytest.mark.slow
def test_fgsm_rs_that_collapses_is_caught_and_rolled_back():
    attack = PGDSettings(eps=0.25, alpha=0.25, steps=1, random_start=False)
    trainer = digits(FGSMRS(lr=0.05, attack=attack), 32, batch=32, on_alarm="rollback", schedule=lambda _: 1.0)
    first = trainer.rollbacks[0]
    assert [alarm["kind"] for alarm in first["alarms"]] == ["catastrophic overfitting"]
    figures = first["alarms"][0]["figures"]
    assert figures["many_steps"] <= figures["best"] / 2
    assert figures["one_step"] > figures["many_steps"] + 0.3
    assert first["told"] == "attack.steps 1 → 2, attack.alpha 0.25 → 0.125"
    assert [report.epoch for report in trainer.history] == list(range(1, 33))
    assert not any(report.alarms for report in trainer.history)
    since = [report.robust for report in trainer.history[first["epoch"] - 1 :]]
    assert max(since) > figures["best"]


@pytest.mark.slow
def test_alp_that_hides_its_gradients_is_flagged(monkeypatch):
    """Validation's PGD leaves 45%, two starts with two losses a quarter. Digits pay for few probes; this has more."""
    monkeypatch.setattr(alarms, "SHARE", 1.0)
    attack = PGDSettings(eps=0.2, alpha=0.2, steps=1, random_start=False)
    trainer = digits(
        ALP(weight=50.0, attack=attack, lr=0.02, label_smoothing=0.0), 16, batch=64, schedule=lambda _: 1.0
    )
    assert "masked gradients" in {alarm.kind for alarm in trainer.alarms}


def test_jarn_that_hides_its_gradients_is_flagged(monkeypatch):
    """Logits so large that the cross-entropy has no gradient in float32: PGD on it fails, on the margin it does not."""
    monkeypatch.setattr(alarms, "SHARE", 1.0)
    model = build_model("convnet", (1, 8, 8), 10, 16)
    digits(Natural(), 6, model=model)
    with torch.no_grad():
        for weight in model.classifier.parameters():
            weight.mul_(1000)
    trainer = digits(JARN(eps=0.2, lr=1e-7, start_step=24, update_interval=2), 4, model=model)
    assert {alarm.kind for alarm in trainer.alarms} == {"masked gradients"}
    found = trainer.alarms[-1].figures
    assert found["left_by_pgd"] / found["images"] < found["validation"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "method",
    [
        AT(attack=PGDSettings(eps=0.2)),
        TRADES(attack=PGDSettings(eps=0.2, loss="kl", init="gaussian")),
        MART(lr=0.1, weight_decay=7e-4, attack=PGDSettings(eps=0.2, init="gaussian")),
        method_for("digits"),
    ],
    ids=["at", "trades", "mart", "afd"],
)
def test_no_alarm_goes_off_in_honest_training(method, seed):
    torch.manual_seed(seed)
    model = build_model("convnet", (1, 8, 8), 10, 32)
    batch = 64 if isinstance(method, AFD) else 128
    trainer = digits(method, 30, seed, batch, model=model)
    assert trainer.alarms == []
    assert trainer.watch.state.found  # it has looked
    assert trainer.history[-1].natural > 0.5
