"""The loop: what it calls, in which order, with which learning rates, and when it stops."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from afd.attacks import PGD, PGDSettings
from afd.errors import InputError, InputTypeError
from afd.methods import AFD, Natural
from afd.methods.attacking import GivenAttack
from afd.nn import FeatureClassifier
from afd.ops.spectral import schema
from afd.training import IntervalReport, Trainer, TrainingError, load_checkpoint
from afd.training.callbacks import LossTracker
from afd.training.schedules import step


def model():
    torch.manual_seed(0)
    return FeatureClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh()), 8, 2)


class Halves:
    """Images whose upper or lower half is brighter; two batches."""

    def __init__(self, size=32, batches=2):
        self.batches = batches
        generator = torch.Generator().manual_seed(1)
        self.y = torch.randint(2, (size,), generator=generator)
        self.x = torch.full((size, 1, 2, 2), 0.3) + 0.02 * torch.randn(size, 1, 2, 2, generator=generator)
        self.x[torch.arange(size), 0, self.y] += 0.4
        self.epochs = []

    def __len__(self):
        return self.batches

    def __iter__(self):
        yield from zip(self.x.chunk(self.batches), self.y.chunk(self.batches), strict=True)

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_learns_a_robust_classifier(schedule):
    trainer = Trainer(
        model(),
        AFD(
            schedule=schedule,
            lr_features=0.1,
            attack=PGDSettings(eps=0.1, alpha=0.05, steps=4),
            validation_attack=PGDSettings(eps=0.1, alpha=0.02, steps=10),
        ),
        epochs=40,
        schedule=lambda _: 1.0,
    )
    reports = trainer.fit(Halves(), Halves())
    assert reports[-1].natural == 1.0
    assert reports[-1].robust > 0.95
    assert reports[-1].losses["task"] < reports[0].losses["task"] / 2


def test_tells_its_callbacks_of_intervals_and_epochs():
    told = []
    train = Halves()
    Trainer(model(), Natural(), epochs=2, log_every=1, callbacks=[told.append]).fit(train, Halves())
    kinds = [type(report).__name__.removesuffix("Report") for report in told]
    assert kinds == ["Interval", "Interval", "Epoch"] * 2
    assert [(report.epoch, report.global_step) for report in told] == [(1, 1), (1, 2), (1, 2), (2, 3), (2, 4), (2, 4)]
    intervals = [report for report in told if isinstance(report, IntervalReport)]
    assert [(report.done, report.total) for report in intervals] == [(1, 2), (2, 2)] * 2
    assert told[2].losses["task"] == pytest.approx(sum(report.losses["task"] for report in told[:2]) / 2)
    assert train.epochs == [1, 2]


def test_losses_are_read_once_an_interval(monkeypatch):
    readings = []
    real = LossTracker.read
    monkeypatch.setattr(LossTracker, "read", lambda meter: (readings.append(len(meter.waiting)), real(meter))[1])
    Trainer(model(), Natural(), epochs=3, log_every=5).fit(Halves(size=32, batches=8), Halves())
    assert [steps for steps in readings if steps] == [5, 3, 2, 5, 1, 4, 4]


class NoWaiting(TorchDispatchMode):
    """Fails on what would wait for a device: reading a number or a mask's positions on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [AFD(), AFD(schedule="alternating"), AFD(clip=1.0, micro_batches=2), Natural()])
def test_a_round_never_waits_for_the_device(method, monkeypatch):
    monkeypatch.setattr(schema, "labels", lambda *_: None)  # it looks at labels where they cost no waiting: on the CPU
    network = model()
    round_ = method.build(network)
    round_.looks = 0  # as a trainer's, whose loaders are looked at
    x, y = next(iter(Halves()))
    for _ in range(2):
        with NoWaiting():
            round_(x, y, x_adv=x)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        float(x.sum())


@pytest.mark.gpu
@pytest.mark.parametrize("method", [AFD(), AFD(schedule="alternating"), AFD.adam(clip=1.0, micro_batches=2), Natural()])
def test_a_round_on_the_gpu_never_waits(method, cuda):
    network = model().to(cuda)
    round_ = method.build(network)
    round_.looks = 0
    x, y = (tensor.to(cuda) for tensor in next(iter(Halves())))
    round_(x, y, x_adv=x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        round_(x, y, x_adv=x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_stops_when_a_callback_asks_it_to():
    trainer = Trainer(model(), Natural(), epochs=5, log_every=1)
    trainer.callbacks = [lambda report: trainer.stop() if report.global_step == 3 else None]
    history = trainer.fit(Halves(), Halves())
    assert [report.epoch for report in history] == [1]
    assert trainer.position.global_step == 3


def test_all_learning_rates_fall_at_the_milestones():
    method = AFD(schedule="alternating", attack=PGDSettings(steps=0), validation_attack=None)
    trainer = Trainer(model(), method, epochs=6, schedule=step((0.5, 5 / 6)))
    rates = [report.learning_rates for report in trainer.fit(Halves(), Halves())]
    for name, first in (("task", 0.1), ("discriminator", 0.1), ("features", 0.5)):
        assert [rate[name] for rate in rates] == pytest.approx([first] * 3 + [first / 10] * 2 + [first / 100])


def test_every_round_attacks_from_another_start():
    seeds = []

    def recording(_model):
        def attack(x, _y, *, seed, first_sample):
            seeds.append(seed)
            assert first_sample == 0
            return x

        return attack

    method = AFD(attack=GivenAttack(recording), validation_attack=None)
    Trainer(model(), method, epochs=2, seed=10).fit(Halves(), Halves())
    assert seeds == [10, 11, 12, 13]


def test_natural_training_attacks_nothing():
    trainer = Trainer(model(), Natural())
    report = trainer.fit(Halves(), Halves())[0]
    assert list(trainer.step.attacks) == []
    assert trainer.judge is None
    assert report.robust is None
    assert report.score == report.natural


def test_a_method_brings_its_own_attack_and_the_one_it_is_validated_by():
    trainer = Trainer(model(), AFD(attack=PGDSettings(norm="L2", eps=0.25, steps=1)), seed=7)
    trainer.fit(Halves(), Halves())
    (attack,) = trainer.step.attacks
    assert (type(attack), attack.norm, attack.eps, attack.steps) == (PGD, "L2", 0.25, 1)
    judge = trainer.judge
    assert (type(judge), judge.norm, judge.eps, judge.steps, judge.seed) == (PGD, "L2", 0.25, 20, 7)
    assert judge.alpha == 2.5 * 0.25 / 20
    assert trainer.history[0].robust is not None
    assert Trainer(model()).method == AFD()


def test_trains_in_training_mode_after_validation():
    net, modes = model(), []
    net.encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    net.eval()
    Trainer(net, Natural(), epochs=2).fit(Halves(), Halves())
    tried = [False, False]  # on images of both loaders
    assert modes == tried + [True, True, False, False] * 2


class Breaks(Natural):
    """Natural training whose loss stops being finite in step 5."""

    def update(self, step, batch):
        losses = super().update(step, batch)
        return {"task": losses["task"] * (float("inf") if step.steps == 5 else 1.0), "other": torch.tensor(1.0)}


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    trainer = Trainer(model(), Breaks(), epochs=5, log_every=50, folder=tmp_path)
    message = r"'task' became inf in step 5 \(epoch 3\); learning rates were task 0.1; last good checkpoint: .*last.pt"
    with pytest.raises(TrainingError, match=message):
        trainer.fit(Halves(), Halves())
    assert load_checkpoint(tmp_path / "last.pt")[1]["position"] == {"epoch": 3, "batch": 0, "global_step": 4}


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = Trainer(model(), Natural(lr=1e38), epochs=1, folder=tmp_path)
    one_batch = Halves(batches=1)
    with pytest.raises(TrainingError, match=r"a weight stopped being finite by step 1; .* last good checkpoint: none"):
        trainer.fit(one_batch, Halves())
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="epochs is -1"):
        Trainer(model(), Natural(), epochs=-1)
    for settings, message in [
        ({"schedule": "stairs"}, "schedule is 'stairs'; allowed are step, cosine, one-cycle"),
        ({"ema": 1.0}, r"ema is 1.0; it must be in \[0, 1\)"),
        ({"log_every": 0}, "log_every is 0"),
        ({"resume": "auto"}, "resume is 'auto'; it needs a folder"),
    ]:
        with pytest.raises(InputError, match=message):
            Trainer(model(), Natural(), **settings)
    with pytest.raises(InputError, match="train is a generator without a length"):
        Trainer(model(), Natural()).fit((batch for batch in Halves()), Halves())
    with pytest.raises(InputError, match="train holds no images"):
        Trainer(model(), Natural()).fit([], Halves())


@pytest.mark.parametrize("method", [Natural(), AFD(attack=PGDSettings(steps=1), validation_attack=None)])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda loader: loader.x[20].fill_(1.5),
            r"x has values in \[.*1.5\]; images must be finite and in \[0.0, 1.0\]",
        ),
        (lambda loader: loader.x[20].fill_(float("nan")), "x has values in .*nan"),
        (lambda loader: loader.y[20].fill_(2), r"y holds the label 2; the model has classes 0 \.\.\. 1"),
        (lambda loader: loader.y[20].fill_(-1), "y holds the label -1"),
        (lambda loader: setattr(loader, "y", loader.y.int()), "y is torch.int32"),
        (lambda loader: setattr(loader, "x", (loader.x * 255).byte()), "x is torch.uint8"),
    ],
)
def test_wrong_batches_are_named(method, spoil, message):
    loader = Halves()
    spoil(loader)
    with pytest.raises((InputError, InputTypeError), match=message):
        Trainer(model(), method).fit(loader, Halves())


def test_validation_attacks_with_one_attack_which_keeps_what_it_has_recorded():
    made = []

    def attack(network):
        made.append(PGD(network, eps=0.1, alpha=0.05, steps=1))
        return made[-1]

    trainer = Trainer(model(), Natural(validation_attack=GivenAttack(attack)), epochs=3, ema=0.9)
    assert [report.robust is not None for report in trainer.fit(Halves(), Halves())] == [True] * 3
    assert [one.model for one in made] == [trainer.evaluated]
