"""Both loaders are looked at before the first step, and are as if nobody had looked."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from afd.attacks import PGDSettings
from afd.errors import AfdError, InputError, InputTypeError
from afd.methods import AFD, Natural
from afd.processes import LostError
from afd.runtime import Group
from afd.training import Trainer
from afd.training.data import check_loaders
from afd.training.validation import shared_accuracy

X = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
GOOD = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


class Lazy:
    """A loader that is neither a list nor a DataLoader."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        yield from self.batches


class Once(Lazy):
    """Has a length, and one iterator for all passes."""

    def __init__(self, batches):
        super().__init__(batches)
        self.iterator = iter(batches)

    def __iter__(self):
        return self.iterator


class Emptied(Lazy):
    """Empties itself in its first pass."""

    def __iter__(self):
        while self.batches:
            yield self.batches.pop(0)


class Served(IterableDataset):
    def __init__(self):
        self.iterator = iter(zip(X, Y, strict=True))

    def __iter__(self):
        return self.iterator


def fit(train, validation, **settings):
    """Trains, and returns the trainer; no step is taken where an error is raised."""
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = Trainer(model, Natural(), epochs=2, **settings)
    try:
        trainer.fit(train, validation)
    except AfdError:
        assert trainer.position.global_step == 0
        assert all(map(torch.equal, before, model.parameters()))
        raise
    return trainer


def spoiled(x=None, y=None, at=1):
    """The batches with other images or labels in one of them."""
    batches = list(GOOD)
    batches[at] = (batches[at][0] if x is None else x, batches[at][1] if y is None else y)
    return batches


WRONG = {
    "bytes": (spoiled(x=(X[4:] * 255).byte()), "x is torch.uint8"),
    "255": (spoiled(x=X[4:] * 255), r"x has values in \[.*\]; images must be finite and in \[0.0, 1.0\]"),
    "nan": (spoiled(x=X[4:] * torch.nan), "x has values in .*nan"),
    "normalised": (spoiled(x=(X[4:] - 0.5) / 0.2), "x has values in"),
    "half": (spoiled(x=X[4:].half()), "x is torch.float16"),
    "no images": (spoiled(x=X[:0], y=Y[:0]), r"x has shape \[0, 1, 4, 4\]; a batch must hold at least one image"),
    "fewer labels": (spoiled(y=Y[:2]), r"y has shape \[2\]; it must be \[4\]"),
    "labels [N, 1]": (spoiled(y=Y[4:, None]), r"y has shape \[4, 1\]; it must be \[4\]"),
    "one-hot": (spoiled(y=nn.functional.one_hot(Y[4:], 3)), r"y has shape \[4, 3\]; it must be \[4\]"),
    "float labels": (spoiled(y=Y[4:].float()), "y is torch.float32; labels must be torch.int64"),
    "another class": (spoiled(y=Y[4:] + 3), r"y holds the label 5; the model has classes 0 \.\.\. 2"),
    "negative": (spoiled(y=Y[4:] - 1), "y holds the label -1"),
    "a number": ([(torch.tensor(0.5), torch.tensor(1))], r"x has shape \[\]; it must be images"),
    "no labels": ([(X,)], "the loader yields a tuple of Tensor"),
}


@pytest.mark.parametrize("role", ["train", "validation"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_batch_is_named_before_the_first_step(role, wrong):
    batches, message = WRONG[wrong]
    loaders = {"train": GOOD, "validation": GOOD, role: batches}
    with pytest.raises((InputError, InputTypeError), match=f"{role}: {message}"):
        fit(**loaders)


@pytest.mark.parametrize("role", ["train", "validation"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_first_batch_of_any_loader_is_named_before_the_first_step(role, wrong):
    batches, message = WRONG[wrong]
    loaders = {"train": GOOD, "validation": GOOD, role: Lazy(batches[::-1])}
    with pytest.raises((InputError, InputTypeError), match=f"{role}: {message}"):
        fit(**loaders)


def test_a_wrong_batch_of_validation_is_named_wherever_it_comes():
    class Late(Lazy):
        pass

    trainer = Trainer(network(), Natural())
    with pytest.raises(InputError, match="validation: y holds the label 5"):
        trainer.fit(GOOD, Late(WRONG["another class"][0]))
    with pytest.raises(InputError, match=r"validation: y has shape \[4, 1\]"):
        shared_accuracy(network(), Late(WRONG["labels [N, 1]"][0]), None, Group())


@pytest.mark.parametrize(
    ("role", "loader", "message"),
    [
        ("train", list, "train holds no images"),
        ("validation", list, "validation holds no images"),
        ("validation", lambda: Lazy([]), "validation holds no images"),
        ("validation", lambda: DataLoader(TensorDataset(X, Y), 16, drop_last=True), "validation holds no images"),
        ("train", lambda: (batch for batch in GOOD), "train is a generator without a length"),
        ("validation", lambda: (batch for batch in GOOD), "validation is a generator that can be read only once"),
        ("train", lambda: Once(GOOD), "train is a Once that can be read only once"),
        ("validation", lambda: Once(GOOD), "validation is a Once that can be read only once"),
        ("validation", lambda: map(tuple, GOOD), "validation is a map that can be read only once"),
        ("validation", lambda: DataLoader(Served(), 4), "validation is a DataLoader that can be read only once"),
        ("train", lambda: Emptied(GOOD[:1]), "train is a Emptied that has no batches in a second pass"),
        ("validation", lambda: Emptied(GOOD[:1]), "validation is a Emptied that has no batches in a second pass"),
    ],
)
def test_a_loader_that_cannot_serve_every_epoch_is_named_before_the_first(role, loader, message):
    with pytest.raises(InputError, match=message):
        fit(**{"train": GOOD, "validation": GOOD, role: loader()})


FORMS = {
    "dicts": lambda x, y: {"image": x, "label": y},
    "hugging face": lambda x, y: {"pixel_values": x, "labels": y},
    "with an index": lambda x, y: (x, y, torch.arange(len(y))),
    "lists": lambda x, y: [x, y],
    "objects": lambda x, y: SimpleNamespace(images=x, labels=y),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form_train_and_validate_alike(form):
    expected = fit(GOOD, GOOD)
    made = [FORMS[form](x, y) for x, y in GOOD]
    trainer = fit(Lazy(made), Lazy(made))
    assert [report.natural for report in trainer.history] == [report.natural for report in expected.history]
    assert all(map(torch.equal, trainer.model.parameters(), expected.model.parameters()))


class Restless(Lazy):
    """Draws from all generators and from its own, and counts its passes."""

    def __init__(self, batches):
        super().__init__(batches)
        self.own, self.python = torch.Generator().manual_seed(3), random.Random(3)
        self.numpy, self.legacy, self.passes = np.random.default_rng(3), np.random.RandomState(3), 0

    def __iter__(self):
        self.passes += 1
        drawn = [torch.rand(()), np.random.rand(), random.random(), torch.rand((), generator=self.own)]
        drawn += [self.python.random(), self.numpy.random(), self.legacy.rand()]
        shift = float(sum(drawn)) / 100 + self.passes / 1000
        for x, y in self.batches:
            yield (x * 0.9 + shift).clamp(0, 1), y


def test_looking_moves_no_generator_and_counts_as_no_pass():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    first, second = Restless(GOOD), Restless(GOOD)
    expected = [next(iter(first))[0] for _ in range(2)]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    check_loaders(second, second, 2, lambda _: 3, Group())
    assert second.passes == 0
    assert all(map(torch.equal, expected, [next(iter(second))[0] for _ in range(2)]))


def test_looking_at_a_shuffling_loader_leaves_its_order():
    def loader():
        return DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=torch.Generator().manual_seed(5))

    looked_at, other = loader(), loader()
    check_loaders(looked_at, looked_at, 2, lambda _: 3, Group())
    assert torch.equal(torch.cat([y for _, y in looked_at]), torch.cat([y for _, y in other]))


def test_a_model_that_draws_in_evaluation_mode_moves_no_generator():
    class Smoothed(nn.Sequential):
        def forward(self, x):
            return super().forward(x + 0.01 * torch.randn_like(x))

    def drawn(*layers):
        state = torch.get_rng_state()
        Trainer(Smoothed(*layers), Natural(), epochs=0).fit(GOOD, GOOD)
        return torch.equal(state, torch.get_rng_state())

    assert drawn(nn.Flatten(), nn.Linear(16, 3))


class Two(Group):
    """This process beside another one, of which it is told."""

    def __init__(self, other):
        super().__init__(rank=0, size=2)
        object.__setattr__(self, "other", other)

    def gather(self, what):
        return [what, self.other]


def test_processes_that_would_wait_for_each_other_raise_together():
    with pytest.raises(InputError, match=r"\[3, 2\] in process 1 and \[2, 2\] in process 0; they must be the same"):
        check_loaders(GOOD, GOOD, 1, lambda _: 3, Two((None, [3, 2], None)))
    with pytest.raises(LostError, match="process 1 cannot train: validation holds no images"):
        check_loaders(GOOD, GOOD, 1, lambda _: 3, Two(("validation holds no images", [2], None)))
    assert check_loaders(GOOD, GOOD, 1, lambda _: 3, Two((None, [2, 2], None))) == 2


def test_one_process_says_what_another_has_found_of_its_loader():
    said = []
    check_loaders(GOOD, GOOD, 1, lambda _: 3, Two((None, [2, 2], "train draws from the clock")), said.append)
    assert said == ["train draws from the clock (process 1)"]


def test_a_loader_that_raises_in_one_process_is_told_to_the_others():
    class Broken(Lazy):
        def __iter__(self):
            raise OSError("the disk is gone")

    asked = []

    class Listening(Two):
        def gather(self, what):
            asked.append(what)
            return super().gather(what)

    with pytest.raises(OSError, match="the disk is gone"):
        check_loaders(Broken(GOOD), GOOD, 1, lambda _: 3, Listening((None, [2, 2], None)))
    assert asked == [("the disk is gone", [2], None)]


def test_a_datasets_own_iteration_is_not_taken_for_a_loaders():
    class Indexed(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return X[index], Y[index]

    loader = DataLoader(Indexed(), 4)
    trainer = Trainer(network(), AFD(lr=0.01, attack=PGDSettings(steps=1), validation_attack=None), epochs=2)
    assert len(trainer.fit(loader, loader)) == 2


class Endless(Lazy):
    """Serves its batches over and over, and says how many make an epoch."""

    def __iter__(self):
        while True:
            yield from self.batches


class Short(Lazy):
    """Serves one batch less than it says, from its third pass on (the first is a look)."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        yield from self.batches if self.passes < 3 else self.batches[:-1]


def test_an_epoch_is_as_long_as_the_loader_says():
    trainer = fit(Endless(GOOD), GOOD)
    assert trainer.position.global_step == 4
    expected = fit(GOOD, GOOD)
    assert trainer.history[-1].losses == expected.history[-1].losses


def test_a_loader_that_runs_dry_is_named():
    trainer = Trainer(network(), Natural(), epochs=5)
    with pytest.raises(InputError, match="train has a length of 2 batches, but had no more than 1 in epoch"):
        trainer.fit(Short(GOOD), GOOD)
    assert trainer.position.global_step < 10
