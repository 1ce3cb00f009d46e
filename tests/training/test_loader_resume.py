"""A run over any loader that draws at random, stopped and gone on with by new objects, ends with the same weights."""

import itertools
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from afd.methods import Natural
from afd.training import Trainer, load_checkpoint
from afd.training.callbacks import EpochReport

COUNT, BATCH, ROUNDS, EPOCHS = 24, 4, 6, 3
X = torch.rand(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(COUNT) % 3
VALIDATION = [(X, Y)]
IN_A_GLOBAL = np.random.default_rng(3)


def seeded(number=7):
    return torch.Generator().manual_seed(number)


def noisy(x, noise):
    return (0.9 * x + 0.1 * float(noise)).clamp(0, 1)


class Drawing(Dataset):
    """Adds noise that a function draws."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return noisy(X[index], self.draw(self)), Y[index]


class Owning(Drawing):
    """Draws from generators of its own."""

    def __init__(self):
        super().__init__(lambda self: self.python.random() * self.numpy.random() * self.legacy.rand())
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        self.legacy = np.random.RandomState(1)


class Lazily(Drawing):
    """Makes its generator when it is first needed."""

    def __init__(self):
        super().__init__(lambda self: self.generator().random())
        self.own = None

    def generator(self):
        if self.own is None:
            self.own = np.random.default_rng(5)
        return self.own


class Transforming:
    def __init__(self):
        self.numpy = np.random.Generator(np.random.Philox(4))

    def __call__(self, x):
        return noisy(x, self.numpy.random())


class Transformed(Dataset):
    """Its transform has a generator, three objects deep."""

    def __init__(self):
        self.transforms = [Transforming()]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return self.transforms[0](X[index]), Y[index]


class Shuffled(Sampler):
    """A sampler of somebody's own; `order` is a function of it that makes an order."""

    def __init__(self, order, own=None):
        self.order, self.own, self.passes, self.indices = order, own, 0, list(range(COUNT))

    def __len__(self):
        return COUNT

    def __iter__(self):
        self.passes += 1
        yield from self.order(self)


def in_place(sampler):
    sampler.own.shuffle(sampler.indices)
    return sampler.indices


def lazily(sampler):
    """Draws index by index, while batches are being used."""
    for _ in range(COUNT):
        yield sampler.own.randrange(COUNT)


class Batched(BatchSampler):
    """Shuffles whole batches with a generator of its own."""

    def __init__(self):
        super().__init__(SequentialSampler(range(COUNT)), BATCH, False)
        self.own = random.Random(2)

    def __iter__(self):
        batches = list(super().__iter__())
        self.own.shuffle(batches)
        return iter(batches)


class Buffered(IterableDataset):
    """Shuffles in a buffer, drawing from Python's generator or from one of its own."""

    def __init__(self, own=random):
        self.own = own

    def __len__(self):
        return COUNT

    def __iter__(self):
        buffer = []
        for pair in zip(X, Y, strict=True):
            buffer.append(pair)
            if len(buffer) == 8:
                yield buffer.pop(self.own.randrange(8))
        while buffer:
            yield buffer.pop(self.own.randrange(len(buffer)))


class Continuing(IterableDataset):
    """Goes on, in each pass, where the last one has stopped."""

    position = 0

    def __len__(self):
        return COUNT

    def __iter__(self):
        for _ in range(COUNT):
            here = self.position % COUNT
            self.position += 5
            yield X[here], Y[here]


class Stateful:
    """A loader that says where it is, and draws from what nobody can find."""

    __slots__ = ("_drawn", "served")

    def __init__(self):
        self._drawn, self.served = itertools.count(1), 0

    def __len__(self):
        return ROUNDS

    def __iter__(self):
        for _ in range(ROUNDS):
            self.served += 1
            index = torch.randint(COUNT, (BATCH,), generator=seeded(next(self._drawn)))
            yield X[index], Y[index]

    def state_dict(self):
        return {"served": self.served}

    def load_state_dict(self, state):
        self.served = state["served"]
        self._drawn = itertools.count(1 + self.served)


class Wrapping:
    """Somebody's own loader around a DataLoader."""

    def __init__(self):
        self.inner = DataLoader(TensorDataset(X, Y), BATCH, shuffle=True, generator=seeded())

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        for x, y in self.inner:
            yield {"image": x, "label": y}


def seeds_from_the_worker(_):
    np.random.seed(torch.initial_seed() % 2**32)


def collating():
    own = random.Random(6)

    def collate(items):
        x, y = zip(*items, strict=True)
        return noisy(torch.stack(x), own.random()), torch.stack(y)

    return collate


def from_all_three(_):
    return torch.rand(()) * random.random() * np.random.rand()


def from_numpy(_):
    return np.random.rand()


def permuted(sampler):
    return sampler.own.permutation(COUNT)


def load(dataset=None, batch_size=BATCH, **settings):
    return DataLoader(dataset or TensorDataset(X, Y), batch_size, **settings)


def drawing(noise=lambda _: torch.rand(())):
    return Drawing(noise)


def workers(dataset, count=1, **settings):
    return load(dataset, num_workers=count, shuffle=True, **settings)


LOADERS = {
    "global generators": lambda: load(drawing(from_all_three), shuffle=True),
    "generator": lambda: load(shuffle=True, generator=seeded()),
    "RandomSampler": lambda: load(sampler=RandomSampler(range(COUNT), generator=seeded())),
    "with replacement": lambda: load(sampler=RandomSampler(range(COUNT), replacement=True, generator=seeded())),
    "WeightedRandomSampler": lambda: load(sampler=WeightedRandomSampler([1.0, 2.0] * 12, COUNT, generator=seeded())),
    "batch sampler": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=Batched()),
    "random.Random": lambda: load(sampler=Shuffled(lambda own: own.own.sample(range(COUNT), COUNT), random.Random(1))),
    "random.Random, index by index": lambda: load(sampler=Shuffled(lazily, random.Random(1))),
    "NumPy's Generator": lambda: load(sampler=Shuffled(permuted, np.random.default_rng(1))),
    "RandomState": lambda: load(sampler=Shuffled(permuted, np.random.RandomState(1))),
    "torch.Generator": lambda: load(sampler=Shuffled(lambda own: torch.randperm(COUNT, generator=own.own), seeded())),
    "passes counted": lambda: load(sampler=Shuffled(lambda own: torch.randperm(COUNT, generator=seeded(own.passes)))),
    "shuffled in place": lambda: load(sampler=Shuffled(in_place, random.Random(1))),
    "data set's own": lambda: load(Owning(), shuffle=True),
    "made when needed": lambda: load(Lazily()),
    "in a Subset": lambda: load(Subset(Owning(), range(COUNT))),
    "a transform's": lambda: load(Transformed()),
    "a global of the script": lambda: load(drawing(lambda _: IN_A_GLOBAL.random())),
    "a closure": lambda: load(collate_fn=collating()),
    "iterable, random": lambda: load(Buffered()),
    "iterable, own": lambda: load(Buffered(random.Random(1))),
    "iterable, continuing": lambda: load(Continuing()),
    "state_dict": Stateful,
    "wrapped": Wrapping,
    "workers": lambda: workers(drawing(), 2),
    "workers, own": lambda: workers(Owning(), generator=seeded()),
    "workers, worker_init_fn": lambda: workers(drawing(from_numpy), worker_init_fn=seeds_from_the_worker),
    "persistent workers": lambda: workers(drawing(), 2, persistent_workers=True),
    "persistent workers, own": lambda: workers(Owning(), persistent_workers=True),
    "persistent workers, iterable": lambda: load(Buffered(random.Random(1)), num_workers=1, persistent_workers=True),
}  # fmt: skip


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def seed(number):
    global IN_A_GLOBAL
    for seeds in (torch.manual_seed, random.seed, np.random.seed):
        seeds(number)
    IN_A_GLOBAL = np.random.default_rng(3)


def trainer(folder, stop_after=0):
    made = Trainer(network(), Natural(), epochs=EPOCHS, folder=folder, resume="auto", log_every=1)
    at_end = stop_after % ROUNDS == 0  # of an epoch: not before it has been closed
    made.callbacks = [
        lambda report: (
            made.stop() if report.global_step == stop_after and isinstance(report, EpochReport) == at_end else None
        )
    ]
    return made


def weights(folder):
    return load_checkpoint(folder / "last.pt")[0]["model"]


@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_over_any_loader_goes_on_exactly(kind, tmp_path, capsys):
    seed(5)
    whole = trainer(tmp_path / "whole")
    whole.fit(LOADERS[kind](), VALIDATION)
    expected = weights(tmp_path / "whole")
    assert whole.position.global_step == EPOCHS * ROUNDS
    for stop_after in (ROUNDS + 2, 2 * ROUNDS):  # in the second epoch, and at its end
        folder = tmp_path / str(stop_after)
        seed(5)
        first = trainer(folder, stop_after)
        first.fit(LOADERS[kind](), VALIDATION)
        assert first.position.global_step == stop_after
        seed(99)  # another process: its generators stand elsewhere
        trainer(folder).fit(LOADERS[kind](), VALIDATION)
        same = {name: torch.equal(value, expected[name]) for name, value in weights(folder).items()}
        assert all(same.values()), stop_after
    assert "warning" not in capsys.readouterr().err


def test_the_loaders_tell_runs_apart(tmp_path):
    """Were training not to depend on what they draw, the test above could not fail."""
    found = []
    for kind, loader in LOADERS.items():
        if "workers" not in kind:
            seed(5)
            trainer(tmp_path / kind).fit(loader(), VALIDATION)
            found.append(weights(tmp_path / kind)["1.weight"])
    alike = [(a, b) for a, b in itertools.combinations(range(len(found)), 2) if torch.equal(found[a], found[b])]
    assert len(alike) < 5


class Clock(Drawing):
    def __init__(self):
        super().__init__(lambda _: time.perf_counter_ns() % 1000 / 1000)


UNKNOWN = {
    "the clock": lambda: load(Clock()),
    "the system": lambda: load(drawing(lambda _: random.SystemRandom().random())),
    "a generator that is made anew": lambda: load(drawing(lambda _: np.random.default_rng().random())),
    "the clock, in a worker": lambda: workers(Clock()),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_no_checkpoint_can_hold_is_said_at_the_start(kind, tmp_path, capsys):
    run = Trainer(network(), Natural(), epochs=1, folder=tmp_path)
    run.callbacks = [lambda _: run.stop()]
    run.fit(UNKNOWN[kind](), VALIDATION)
    assert capsys.readouterr().err.count("train served another first batch when it was read again") == 1


def test_without_a_folder_nothing_is_said_and_nothing_read_twice(capsys):
    Trainer(network(), Natural(), epochs=1).fit(UNKNOWN["the clock"](), VALIDATION)
    assert capsys.readouterr().err == ""


def test_batches_that_come_as_they_are_ready_are_named(tmp_path, capsys):
    loader = workers(drawing(), 2, in_order=False)
    Trainer(network(), Natural(), epochs=1, folder=tmp_path).fit(loader, VALIDATION)
    assert "train has in_order=False" in capsys.readouterr().err


def test_a_checkpoint_without_loaders_is_gone_on_from(tmp_path, monkeypatch):
    """As those of earlier days."""
    from afd.training import data, loader_state

    seed(5)
    whole = trainer(tmp_path / "whole")
    whole.fit(LOADERS["global generators"](), VALIDATION)
    seed(5)
    with monkeypatch.context() as earlier:
        earlier.setattr(data.ResumableLoader, "capture", lambda _: loader_state.global_generators())
        trainer(tmp_path / "first", ROUNDS + 2).fit(LOADERS["global generators"](), VALIDATION)
    trainer(tmp_path / "first").fit(LOADERS["global generators"](), VALIDATION)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "first").items())


def test_a_loader_that_has_lost_its_generator_is_named(tmp_path):
    trainer(tmp_path, ROUNDS + 2).fit(LOADERS["random.Random"](), VALIDATION)
    with pytest.warns(UserWarning, match=r"drew from train.sampler.own, which these have not"):
        trainer(tmp_path).fit(load(), VALIDATION)


def test_samplers_in_batch_samplers_are_told_of_epochs():
    told = []

    class Told(SequentialSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

    loader = DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(Told(range(COUNT)), BATCH, False))
    Trainer(network(), Natural(), epochs=2).fit(loader, VALIDATION)
    assert told == [1, 2]
