"""The split is a partition, class by class, and the same one for ever."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afd.data import load
from afd.data.split import stratified


@given(
    labels=st.lists(st.integers(0, 5), max_size=80),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    classes = torch.tensor(labels, dtype=torch.int64)
    rest, held = stratified(classes, fraction, seed)
    assert sorted(rest.tolist() + held.tolist()) == list(range(len(labels)))
    assert rest.tolist() == sorted(rest.tolist())
    assert held.tolist() == sorted(held.tolist())
    for label in set(labels):
        count, out = labels.count(label), int((classes[held] == label).sum())
        if count == 1:
            assert out == 0
        else:
            assert 1 <= out <= count - 1
            assert out in (1, count - 1) or abs(out - fraction * count) <= 0.5


def test_another_seed_is_another_split() -> None:
    labels = torch.arange(100) % 2
    assert stratified(labels, 0.2, 1)[1].tolist() == stratified(labels, 0.2, 1)[1].tolist()
    assert stratified(labels, 0.2, 1)[1].tolist() != stratified(labels, 0.2, 2)[1].tolist()


def test_split_of_today_is_the_split_of_tomorrow() -> None:
    """Were this to fail, models trained before would be validated on their own training images."""
    _, held = stratified(torch.arange(1000) % 10, 0.1, 6621)
    assert hashlib.sha256(held.numpy().astype("<i8").tobytes()).hexdigest()[:16] == "943e7ad18f891e5d"


@pytest.mark.parametrize("validation", [0.1, 0.5])
def test_digits_splits(validation: float) -> None:
    splits = load("digits", validation=validation)
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) == 1797
    assert [part.shape for part in parts] == [(1, 8, 8)] * 3
    assert len(splits.test) == 359
    assert abs(len(splits.validation) - validation * 1438) <= 5
    for part in parts:
        assert part.scale == 16.0
        assert part.images().max() == 1.0
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert shares.min() > 0.08
        assert shares.max() < 0.12


def test_digits_in_no_two_splits() -> None:
    splits = load("digits")
    # All 1797 images differ from one another, so an image tells its position.
    seen = [{part.pixels[i].numpy().tobytes() for i in range(len(part))} for part in (splits.train, splits.test)]
    seen.append({image.numpy().tobytes() for image in splits.validation.pixels})
    assert sum(map(len, seen)) == len(set().union(*seen)) == 1797


def test_digits_are_the_same_each_time_and_test_ignores_validation() -> None:
    first, second, larger = load("digits"), load("digits", root="/nowhere"), load("digits", validation=0.3)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).pixels, getattr(second, part).pixels)
        assert torch.equal(getattr(first, part).labels, getattr(second, part).labels)
    assert torch.equal(first.test.pixels, larger.test.pixels)
    assert torch.bincount(first.test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


@pytest.mark.parametrize("validation", [0.0, 1.0, -0.1, float("nan")])
def test_validation_must_be_a_fraction(validation: float) -> None:
    with pytest.raises(ValueError, match=r"validation is .*; it must be in \(0, 1\)"):
        load("digits", validation=validation)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name is 'imagenet'; allowed are digits, mnist, cifar10, cifar100"):
        load("imagenet")
