"""Methods that take several steps on each batch, and remember tensors from batch to batch."""

import copy
import io
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_methods import Remembers

from afd.errors import InputError
from afd.graphs import CaptureWarning
from afd.methods import Execution
from afd.training import EpochReport, Trainer, load_checkpoint

X = torch.rand(22, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(22) % 3
BATCHES, REPEATS = 3, 3  # of 8 images, the last of 6


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Jittered(TensorDataset):
    """Images with noise that is drawn when they are read."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + 0.1 * torch.rand(())).clamp(0, 1), y


def loader():
    return DataLoader(Jittered(X, Y), 8, shuffle=True)


def trainer(seed=0, **settings):
    defaults = {"epochs": 2, "ema": 0.9, "log_every": 2, "schedule": "cosine"}
    return Trainer(network(seed), Remembers(lr=0.05), **{**defaults, **settings})


def outcome(made):
    """All that is trained or remembered, and the reports, without what a clock says."""
    states = [made.network.state_dict(), made.average.state_dict(), dict(made.step.memory)]
    momenta = [one["momentum_buffer"] for one in made.step.optimizers["task"].state_dict()["state"].values()]
    return states, momenta, [{**vars(one), "images_per_second": 0} for one in made.history]


def assert_same(one, other):
    for here, there in zip(one[0], other[0], strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(value, there[name]) for name, value in here.items())
    assert all(itertools.starmap(torch.equal, zip(one[1], other[1], strict=True)))
    assert one[2] == other[2]


def test_each_batch_is_given_as_often_as_the_method_says_and_every_step_counts():
    torch.manual_seed(5)
    seen, seeds, epochs, rates = [], [], [], []
    made = trainer(seed=0, ema=0.5)
    update = made.step.update

    def looking(batch):
        seen.append(batch.x.clone())
        seeds.append(batch.seed)
        epochs.append(made.step.epoch)
        rates.append(made.step.optimizers["task"].param_groups[0]["lr"])
        return update(batch)

    made.step.update = looking
    reports = []
    made.callbacks = [reports.append]
    made.fit(loader(), [(X, Y)])
    steps = 2 * BATCHES * REPEATS
    assert made.step.steps == made.position.global_step == int(made.average.n_averaged) == len(seen) == steps
    assert seeds == list(range(steps))
    assert epochs == [1] * (steps // 2) + [2] * (steps // 2)
    for first in range(0, steps, REPEATS):
        assert all(torch.equal(seen[first], again) for again in seen[first : first + REPEATS])
        assert not torch.equal(seen[first][:6], seen[first - 1][:6])
    assert len(set(rates)) == steps
    assert [report.global_step for report in reports if isinstance(report, EpochReport)] == [steps // 2, steps]
    intervals = [report for report in reports if not isinstance(report, EpochReport)]
    assert {report.total for report in intervals} == {BATCHES * REPEATS}
    assert [report.global_step for report in intervals[:4]] == [2, 4, 6, 8]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 8, 9, 11])
def test_a_run_goes_on_within_the_repeats_of_a_batch(stop_at):
    """Its images had noise drawn with the global generator, and δ is what the steps before have left."""
    torch.manual_seed(5)
    whole = trainer()
    whole.fit(loader(), [(X, Y)])
    torch.manual_seed(5)
    first = trainer(log_every=2)
    update = first.step.update

    def stopping(batch):
        if first.position.global_step == stop_at - 1:
            first.stop()
        return update(batch)

    first.step.update = stopping
    first.fit(loader(), [(X, Y)])
    assert first.position.global_step == stop_at
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    second = trainer(seed=7)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.step.epoch == second.position.epoch
    torch.manual_seed(98)
    second.fit(loader(), [(X, Y)])
    assert_same(outcome(second), outcome(whole))


def test_checkpoints_within_the_repeats_hold_what_the_step_remembers(tmp_path):
    torch.manual_seed(5)
    whole = trainer(folder=tmp_path / "whole", save_every=4)
    whole.fit(loader(), [(X, Y)])
    torch.manual_seed(5)
    first = trainer(folder=tmp_path / "part", save_every=4)
    saved = first.save

    def dying(*, best):
        saved(best=best)
        raise KeyboardInterrupt

    first.save = dying
    with pytest.raises(KeyboardInterrupt):
        first.fit(loader(), [(X, Y)])
    state, metadata = load_checkpoint(tmp_path / "part" / "last.pt")
    assert metadata["position"] == {"epoch": 1, "batch": 4, "global_step": 4}
    assert state["memory"][0]["delta"].abs().max() > 0
    second = trainer(seed=7, folder=tmp_path / "part", save_every=4, resume="auto")
    second.fit(loader(), [(X, Y)])
    assert_same(outcome(second), outcome(whole))


def test_a_state_of_before_remembers_nothing():
    first = trainer()
    first.fit(loader(), [(X, Y)])
    state = {name: one for name, one in first.state_dict().items() if name != "memory"}
    second = trainer(epochs=3)
    second.load_state_dict(state)
    assert second.step.memory == {}


def test_what_is_remembered_is_a_copy_of_what_was_loaded():
    first = trainer()
    first.fit(loader(), [(X, Y)])
    state = copy.deepcopy(first.state_dict())
    kept = state["memory"][0]["delta"].clone()
    second = trainer(epochs=3)
    second.load_state_dict(state)
    second.fit(loader(), [(X, Y)])
    assert torch.equal(state["memory"][0]["delta"], kept)
    assert not torch.equal(second.step.memory["delta"], kept)


@pytest.mark.parametrize("times", [0, -1])
def test_a_method_that_repeats_nothing_is_refused(times):
    with pytest.raises(InputError, match=f"repeats of the method is {times}; it must be"):
        Trainer(network(), Remembers(replays=times))


def test_an_epoch_of_another_number_of_steps_is_told_in_steps():
    first = trainer(log_every=1)
    first.callbacks = [lambda _report: first.stop()]
    first.fit(loader(), [(X, Y)])
    with pytest.raises(InputError, match="train has 6 steps, 3 on each batch, but the epoch in progress has 9"):
        first.fit([(X[:8], Y[:8])] * 2, [(X, Y)])


def test_a_recorded_run_remembers_as_an_eager_one(tapes, monkeypatch):
    """Of two shapes of batches; what is remembered lies where it lay."""
    from afd.training import recording

    def run():
        torch.manual_seed(5)
        made = trainer(epochs=3, execution=Execution(graph=True))
        made.fit([(X[:8], Y[:8]), (X[8:14], Y[8:14])], [(X, Y)])
        return made

    replayed = run()
    assert sum(tape.replays for tape in tapes) == 3 * 2 * REPEATS - 2
    assert len(tapes) == 2
    with monkeypatch.context() as patch:
        patch.setattr(recording.GraphedStep, "_capture", lambda *_: None)
        eager = run()
    assert len(tapes) == 2
    assert_same(outcome(replayed), outcome(eager))


@dataclass(frozen=True, kw_only=True)
class Replaces(Remembers):
    """Puts another tensor in the place of δ at every step, which a graph cannot do."""

    def update(self, step, batch):
        losses = super().update(step, batch)
        step.memory["delta"] = step.memory["delta"].clone()
        step.memory["other"] = torch.ones(1)
        return losses


def test_what_a_failed_capture_has_put_in_its_memory_is_taken_back(tapes):
    made = Trainer(network(), Replaces(lr=0.05), execution=Execution(graph=True), schedule="cosine")
    plain = Trainer(network(), Replaces(lr=0.05), schedule="cosine")
    batches = [(X[:8], Y[:8])] * 2
    torch.manual_seed(3)
    with pytest.warns(CaptureWarning, match="an optimizer's state or what the step remembers"):
        made.fit(batches, [(X, Y)])
    torch.manual_seed(3)
    plain.fit(batches, [(X, Y)])
    assert made.step.memory["delta"].isfinite().all()
    torch.testing.assert_close(made.step.memory["delta"], plain.step.memory["delta"])
