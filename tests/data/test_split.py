"""The split is a partition, class by class, and the same one for ever."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afd.data import load
from afd.data.datasets import drawn_by_class, stratified
from afd.errors import InputError


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


@given(labels=st.lists(st.integers(0, 5), max_size=80), count=st.integers(1, 90), seed=st.integers(0, 2**32 - 1))
def test_what_is_drawn_is_in_proportion_and_grows_with_the_count(labels: list[int], count: int, seed: int) -> None:
    classes = torch.tensor(labels, dtype=torch.int64)
    found = drawn_by_class(classes, count, seed)
    assert len(found) == min(count, len(labels))
    assert found.tolist() == sorted(set(found.tolist()))
    assert set(found.tolist()) <= set(drawn_by_class(classes, count + 1, seed).tolist())
    numbers = torch.bincount(classes[found], minlength=6)
    if count >= len(set(labels)):
        assert all(numbers[label] for label in set(labels))
    for label in set(labels):
        assert abs(int(numbers[label]) - len(found) * labels.count(label) / len(labels)) <= 6


def test_draw_of_today_is_the_draw_of_tomorrow() -> None:
    found = drawn_by_class(torch.arange(1000) % 10, 100, 6622)
    assert torch.bincount(found % 10).tolist() == [10] * 10
    assert hashlib.sha256(found.numpy().astype("<i8").tobytes()).hexdigest()[:16] == "68429fa21ceef164"


def test_a_limit_is_of_each_part_and_keeps_them_apart() -> None:
    whole, few, more = load("digits"), load("digits", limit=50), load("digits", limit=200)
    for part in ("train", "validation", "test"):
        size = len(getattr(whole, part))
        images = [{image.numpy().tobytes() for image in getattr(one, part).pixels} for one in (few, more, whole)]
        assert [len(one) for one in images] == [50, min(200, size), size]
        assert images[0] < images[1] <= images[2]
        assert getattr(few, part).labels.bincount().min() >= 4
    assert load("digits", limit=10**9).train.pixels.equal(whole.train.pixels)


@pytest.mark.parametrize("limit", [0, -1, -(10**30)])
def test_a_limit_must_be_positive(limit: int) -> None:
    with pytest.raises(InputError, match=f"limit is {limit}; it must be a finite number >= 1"):
        load("digits", limit=limit)


@pytest.mark.parametrize("limit", [1.5, "9", True, float("nan")])
def test_a_limit_must_be_a_whole_number(limit: object) -> None:
    with pytest.raises(TypeError, match=r"limit is .*; it must be a whole number"):
        load("digits", limit=limit)
