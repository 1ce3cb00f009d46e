"""A trainer's state_dict, loaded into a new trainer of the same arguments: it ends at the same weights, bit for bit."""

import io
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from afd.attacks import PGDSettings, UnionSettings
from afd.checkpoint import CheckpointError
from afd.errors import InputError
from afd.methods import AFD, ALP, AT, AWP, FGSMRS, GAT, JARN, LLR, MART, TRADES, Natural, NormPenalty, NuAT
from afd.training import EpochReport, Trainer

X = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3
BATCHES = 5  # an epoch
METHODS = {
    "natural": Natural(lr=0.1, momentum=0.9),
    "afd": AFD(lr=0.05, hidden=4, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2)),
    "afd, adversarial": AFD(
        lr=0.05, hidden=4, adversarial_weight=0.5, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2)
    ),
    "afd, joint": AFD.adam(
        schedule="joint",
        lr=0.01,
        hidden=4,
        adversarial_weight=0.5,
        divergence_weight=1.0,
        attack=PGDSettings(eps=0.1, alpha=0.05, steps=2),
    ),
    "trades": TRADES(lr=0.05, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2, loss="kl", init="gaussian")),
    "mart": MART(lr=0.05, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2, init="gaussian")),
    "alp": ALP(lr=0.05, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2, targeted=True)),
    "fgsm-rs": FGSMRS(lr=0.05),
    "norm-penalty": NormPenalty(lr=0.05, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2)),
    "llr": LLR(lr=0.05, eps=0.1, search_steps=2),
    "gat": GAT(lr=0.05, growth_epoch=2, attack=PGDSettings(eps=0.1, alpha=0.1, steps=1, init="coin-flip")),
    "nuat": NuAT(lr=0.05, attack=PGDSettings(eps=0.1, alpha=0.1, steps=1, init="coin-flip")),
    "at, union": AT(lr=0.05, attack=UnionSettings(eps=0.1, eps_l2=0.4, steps=2, choice="random")),
    "afd, union": AFD(lr=0.05, hidden=4, attack=UnionSettings(eps=0.1, eps_l1=1.5, steps=2, choice="average")),
    "jarn": JARN(lr=0.05, eps=0.1, start_step=4, update_interval=3, discriminator_width=4, discriminator_layers=2),
    "at+awp": AWP(AT(lr=0.05, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2)), gamma=0.05, start_epoch=2),
}


def network(seed):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
    return nn.Sequential(*body, nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def fit(trainer):
    train = DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator().manual_seed(1))
    return trainer.fit(train, [(X[:20], Y[:20])])


def trainer(method, seed=0, **settings):
    return Trainer(
        network(seed), METHODS[method], **{"epochs": 3, "ema": 0.9, "eps_warmup": 1.5, "log_every": 2, **settings}
    )


def outcome(made):
    """Weights of all that is trained, and the reports, without what a clock says."""
    players = [player.state_dict() for player in made.step.players.values()]
    states = [made.network.state_dict(), made.average.state_dict(), *players]
    return states, [{**vars(one), "images_per_second": 0} for one in made.history]


def assert_same(one, other):
    for here, there in zip(one[0], other[0], strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(value, there[name]) for name, value in here.items())
    assert one[1] == other[1]


def to_disk_and_back(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def disturb():
    """Another process has other generators."""
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


@pytest.mark.filterwarnings("ignore:LLR differentiates the gradient")
@pytest.mark.parametrize("stop_at", [3, BATCHES, BATCHES + 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_new_trainer_goes_on_to_the_same_weights(method, stop_at):
    """From within an epoch, and from the end of one, which is validated already."""
    torch.manual_seed(5)
    whole = trainer(method)
    fit(whole)

    torch.manual_seed(5)
    first = trainer(method)
    at_end = stop_at % BATCHES == 0
    first.log_every = 1
    first.callbacks = [
        lambda report: (
            first.stop() if report.global_step == stop_at and isinstance(report, EpochReport) == at_end else None
        )
    ]
    fit(first)
    assert first.position.global_step == stop_at
    assert len(first.history) == stop_at // BATCHES
    state = to_disk_and_back(first.state_dict())

    disturb()
    second = trainer(method, seed=7)
    second.load_state_dict(state)
    assert second.history == first.history
    assert second.best == first.best
    disturb()
    fit(second)
    assert_same(outcome(second), outcome(whole))


@pytest.mark.parametrize("kind", ["interval", "epoch"])
def test_a_callback_may_ask_for_it(kind):
    torch.manual_seed(5)
    states = []
    whole = trainer("afd")

    def keep(report):
        if isinstance(report, EpochReport) == (kind == "epoch") and not states:
            states.append(to_disk_and_back(whole.state_dict()))

    whole.callbacks = [keep]
    fit(whole)
    disturb()
    second = trainer("afd", seed=7)
    second.load_state_dict(states[0])
    fit(second)
    assert_same(outcome(second), outcome(whole))


def test_losses_that_were_not_read_yet_are_in_it():
    """After an error within an interval; the mean over the epoch is that of an undisturbed run."""
    torch.manual_seed(5)
    whole = trainer("natural", epochs=1, log_every=50)
    fit(whole)

    torch.manual_seed(5)
    first = trainer("natural", epochs=1, log_every=50)
    real = first.losses.count

    def failing(images, since):
        done = real(images, since)
        if first.position.global_step == 3:
            raise OSError("a disk, say")
        return done

    first.losses.count = failing
    with pytest.raises(OSError, match="a disk, say"):
        fit(first)
    assert len(first.losses.waiting) == 3
    second = trainer("natural", epochs=1, log_every=50, seed=0)
    second.load_state_dict(to_disk_and_back(first.state_dict()))
    fit(second)
    assert_same(outcome(second), outcome(whole))


def test_it_may_be_asked_for_before_anything_was_trained():
    torch.manual_seed(5)
    first = trainer("afd")
    state = to_disk_and_back(first.state_dict())
    second = trainer("afd", seed=7)
    second.load_state_dict(state)
    torch.manual_seed(6)
    fit(first)
    torch.manual_seed(6)
    fit(second)
    assert_same(outcome(second), outcome(first))


def test_several_trainers_go_on_from_one_state():
    first = trainer("afd")
    fit(first)
    state = first.state_dict()
    ends = []
    for _ in range(2):
        other = trainer("afd", epochs=4)
        other.load_state_dict(state)
        fit(other)
        ends.append(outcome(other))
    assert_same(*ends)


def test_a_model_of_another_width_is_refused_and_left_as_it_was():
    first = trainer("natural")
    wide = nn.Sequential(*list(network(1))[:-3], nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))
    other = Trainer(wide, METHODS["natural"], epochs=3, ema=0.9, eps_warmup=1.5, log_every=2)
    before = {name: value.clone() for name, value in other.network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"is of another model: .* is \[8, 64\] there and \[9, 64\] here"):
        other.load_state_dict(first.state_dict())
    assert all(value.equal(before[name]) for name, value in other.network.state_dict().items())


def test_a_folder_takes_the_checkpoints_of_the_run_that_goes_on(tmp_path):
    first = trainer("natural", epochs=1)
    fit(first)
    second = trainer("natural", folder=tmp_path, epochs=2)
    second.load_state_dict(first.state_dict())
    fit(second)
    third = trainer("natural", folder=tmp_path, resume="auto", epochs=2)
    fit(third)
    assert_same(outcome(third), outcome(second))
    assert [report.epoch for report in third.history] == [1, 2]


def test_another_number_of_classes_that_was_found_on_images_is_gone_on_with():
    """Four, and not the twelve that the layers' widths say: known after a look at images only."""

    class Pooled(nn.Sequential):
        def forward(self, x):
            return self[2](nn.functional.max_pool1d(self[1](self[0](x.flatten(1))), 2))

    def made(seed):
        torch.manual_seed(seed)
        model = Pooled(nn.Linear(36, 12), nn.ReLU(), nn.Linear(6, 4))
        return Trainer(model, METHODS["afd"], feature_layer="0", epochs=2, ema=0.9)

    torch.manual_seed(5)
    whole = made(0)
    fit(whole)
    torch.manual_seed(5)
    first = made(0)
    first.callbacks = [lambda _report: first.stop()]
    fit(first)
    second = made(7)
    second.load_state_dict(to_disk_and_back(first.state_dict()))
    fit(second)
    assert_same(outcome(second), outcome(whole))


def test_what_cannot_be_meant_is_refused(tmp_path):
    first = trainer("natural")
    state = first.state_dict()
    with pytest.raises(CheckpointError, match=r"what is loaded is no state_dict of a Trainer; it holds 0.weight, "):
        first.load_state_dict(network(0).state_dict())
    with pytest.raises(CheckpointError, match=r"the state_dict is of another run: .*ema is 0.9 there and 0.5 here"):
        trainer("natural", ema=0.5).load_state_dict(state)
    resumed = trainer("natural", folder=tmp_path, resume="auto")
    with pytest.raises(InputError, match="load_state_dict was called of a trainer that goes on from resume='auto'"):
        resumed.load_state_dict(state)
    first.callbacks = [lambda _report: first.load_state_dict(state)]
    with pytest.raises(InputError, match="load_state_dict was called while fit runs"):
        fit(first)


def test_an_epoch_of_another_number_of_batches_is_refused():
    first = trainer("natural", log_every=1)
    first.callbacks = [lambda _report: first.stop()]
    fit(first)
    second = trainer("natural")
    second.load_state_dict(first.state_dict())
    with pytest.raises(InputError, match="train has 2 batches, but the epoch in progress has 5, of which 1 are done"):
        second.fit([(X[:8], Y[:8])] * 2, [(X, Y)])
