"""The loop: what it calls, in which order, with which learning rates, and when it stops."""

import pytest
import torch
from torch import nn

from afd.attacks import PGD
from afd.errors import InputError, InputTypeError
from afd.methods import AFD, Natural
from afd.nn import FeatureClassifier
from afd.training import Trainer, TrainingError


def model():
    torch.manual_seed(0)
    return FeatureClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh()), 8, 2)


class Halves:
    """Images whose upper or lower half is brighter; two batches."""

    def __init__(self, size=32):
        generator = torch.Generator().manual_seed(1)
        self.y = torch.randint(2, (size,), generator=generator)
        self.x = torch.full((size, 1, 2, 2), 0.3) + 0.02 * torch.randn(size, 1, 2, 2, generator=generator)
        self.x[torch.arange(size), 0, self.y] += 0.4
        self.epochs = []

    def __len__(self):
        return 2

    def __iter__(self):
        yield from zip(self.x.chunk(2), self.y.chunk(2), strict=True)

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class Witness:
    def __init__(self):
        self.events = []

    def batch_done(self, epoch, done, total):
        self.events.append((epoch, done, total))

    def epoch_done(self, report):
        self.events.append(report.epoch)


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_learns_a_robust_classifier(schedule):
    trainer = Trainer(
        model(),
        AFD(schedule=schedule, lr_features=0.1),
        attack=PGD.partial(eps=0.1, alpha=0.05, steps=4),
        validation_attack=PGD.partial(eps=0.1, alpha=0.02, steps=10),
        epochs=40,
    )
    reports = trainer.fit(Halves(), Halves())
    assert reports[-1].natural == 1.0
    assert reports[-1].robust > 0.95
    assert reports[-1].losses["task"] < reports[0].losses["task"] / 2


def test_tells_its_listeners_of_batches_and_epochs():
    witness = Witness()
    train = Halves()
    Trainer(model(), Natural(), epochs=2, listeners=[witness]).fit(train, Halves())
    assert witness.events == [(1, 1, 2), (1, 2, 2), 1, (2, 1, 2), (2, 2, 2), 2]
    assert train.epochs == [1, 2]


def test_all_learning_rates_fall_at_the_milestones():
    trainer = Trainer(
        model(), AFD(schedule="alternating"), attack=PGD.partial(steps=0), epochs=6, milestones=(0.5, 5 / 6)
    )
    rates = [report.learning_rates for report in trainer.fit(Halves(), Halves())]
    for name, first in (("task", 0.1), ("discriminator", 0.1), ("features", 0.5)):
        assert [rate[name] for rate in rates] == pytest.approx([first] * 3 + [first / 10] * 2 + [first / 100])


def test_every_round_attacks_from_another_start():
    seeds = []

    def recording(_model):
        def attack(x, _y, *, seed):
            seeds.append(seed)
            return x

        return attack

    Trainer(model(), AFD(), attack=recording, epochs=2, seed=10).fit(Halves(), Halves())
    assert seeds == [10, 11, 12, 13]


def test_natural_training_attacks_nothing():
    def forbidden(_model):
        raise AssertionError("natural training built an attack")

    report = Trainer(model(), Natural(), attack=forbidden).fit(Halves(), Halves())[0]
    assert report.robust is None
    assert report.score == report.natural


def test_trains_in_training_mode_after_validation():
    net, modes = model(), []
    net.encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    net.eval()
    Trainer(net, Natural(), epochs=2).fit(Halves(), Halves())
    assert modes == [True, True, False, False] * 2


def test_a_loss_that_is_not_finite_stops_training():
    trainer = Trainer(model(), Natural(lr=1e38), epochs=3)
    with pytest.raises(TrainingError, match=r"the loss 'task' became (nan|inf) in epoch \d; learning rates were"):
        trainer.fit(Halves(), Halves())


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="attack is None; the method AFD trains against one"):
        Trainer(model(), AFD())
    with pytest.raises(InputError, match="epochs is -1"):
        Trainer(model(), Natural(), epochs=-1)
    with pytest.raises(InputError, match="train holds no images"):
        Trainer(model(), Natural()).fit([], Halves())


@pytest.mark.parametrize("method", [Natural(), AFD()])
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
        Trainer(model(), method, attack=PGD.partial(steps=1)).fit(loader, Halves())
