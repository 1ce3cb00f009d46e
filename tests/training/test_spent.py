"""What a run has cost: seconds in fit, images, memory, over stops, checkpoints and rollbacks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from afd.attacks import PGDSettings
from afd.machine import available_memory, peak_memory
from afd.methods import AT, Free, Natural
from afd.training import Trainer, position
from afd.training.position import Spent

CPU = torch.device("cpu")


def batches(count=3, rows=8):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(rows, 1, 2, 2, generator=generator), torch.arange(rows) % 3) for _ in range(count)]


def trainer(method=None, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    attack = PGDSettings(eps=0.1, steps=1)
    method = AT(lr=0.01, attack=attack, validation_attack=None) if method is None else method
    return Trainer(model, method, on_alarm="off", **settings)


@pytest.fixture
def clock(monkeypatch):
    """Seconds of `Spent`: one goes by at each look."""
    now = SimpleNamespace(seconds=0.0)

    def look():
        now.seconds += 1.0
        return now.seconds

    monkeypatch.setattr(position, "time", SimpleNamespace(perf_counter=look))
    return now


def test_images_seen_are_those_of_all_epochs():
    made = trainer(epochs=2)
    made.fit(batches(), batches(1))
    assert made.spent.images == 2 * 3 * 8
    assert made.spent.epochs == 2
    assert made.spent.seconds > 0
    assert made.spent.since is None


def test_a_batch_that_is_repeated_is_seen_so_often():
    made = trainer(Free(lr=0.01, replays=3, validation_attack=None), epochs=1)
    made.fit(batches(), batches(1))
    assert made.spent.images == 3 * 3 * 8


@pytest.mark.usefixtures("clock")
def test_seconds_are_those_within_fit_and_no_pause(clock):
    spent = Spent()
    spent.begin()
    clock.seconds += 10
    spent.end()
    clock.seconds += 1000
    spent.begin()
    clock.seconds += 20
    assert spent.until_now == pytest.approx(10 + 20 + 2)
    spent.end()
    assert spent.seconds == pytest.approx(10 + 20 + 3)


def test_a_run_that_goes_on_adds_up(tmp_path):
    first = trainer(epochs=1, folder=tmp_path)
    first.fit(batches(), batches(1))
    there = first.checkpoints.load_newest(CPU)[1]["spent"]
    assert there["images"] == 24
    assert 0 < there["seconds"] <= first.spent.seconds
    there_of = {**there, "seconds": 3600.0, "memory": 2**50}
    rest = trainer(epochs=3, folder=tmp_path, resume="auto")
    load = rest.checkpoints.load_named

    def of_an_hour(*arguments):
        state, metadata = load(*arguments)
        return state, metadata | {"spent": there_of}

    rest.checkpoints.load_named = of_an_hour
    rest.fit(batches(), batches(1))
    assert rest.spent.images == 3 * 24
    assert rest.spent.epochs == 3
    assert 3600.0 < rest.spent.seconds < 3600.0 + 600
    assert rest.spent.memory == 2**50


def test_a_state_dict_goes_on_likewise_and_one_of_earlier_days_says_nothing():
    first = trainer(epochs=1)
    first.fit(batches(), batches(1))
    state = first.state_dict()
    rest = trainer(epochs=2)
    rest.load_state_dict(state)
    rest.fit(batches(), batches(1))
    assert rest.spent.images == 48
    del state["metadata"]["spent"]
    other = trainer(epochs=2)
    other.load_state_dict(state)
    other.fit(batches(), batches(1))
    assert other.spent.images == 24


def test_what_a_rollback_undoes_was_spent_all_the_same():
    class Breaking(nn.Module):
        """Whose weights stop being finite once, in the second epoch."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.passes = 0

        def forward(self, x):
            self.passes += self.training
            logits = self.linear(x.flatten(1))
            return logits * float("nan") if self.training and self.passes == 5 else logits

    torch.manual_seed(0)
    made = Trainer(Breaking(), Natural(lr=0.01), epochs=2, on_alarm="rollback", log_every=1)
    made.fit(batches(), batches(1))
    assert len(made.rollbacks) == 1
    assert (made.spent.epochs, made.spent.images) == (3, 24 + 16 + 2 * 24)  # back to the beginning, in the second epoch


def test_memory_of_this_process_is_what_it_has_held_at_most():
    before = peak_memory(CPU)
    assert before > 50 * 2**20
    held = torch.ones(before // 4 + 2**24)  # 4 bytes each
    assert peak_memory(CPU) >= max(before, held.numel() * 4)
    assert available_memory(CPU) is None or available_memory(CPU) > 0
