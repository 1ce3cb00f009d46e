"""Batches: every image once an epoch, in an order that (seed, epoch) decides and nothing else does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd.data import Batches, Images
from afd.data.images import CropAndFlip


def numbered(count: int) -> Images:
    """Images that carry their number, in the label and in two pixels."""
    number = torch.arange(count)
    pixels = torch.stack([number // 256, number % 256], dim=1).to(torch.uint8).view(-1, 1, 1, 2)
    return Images(pixels, number, scale=255.0, num_classes=max(count, 1), name="numbered")


def order(batches: Batches) -> list[int]:
    return [int(label) for _, y in batches for label in y]


sizes = {"count": st.integers(1, 70), "batch_size": st.integers(1, 80), "shuffle": st.booleans()}
places = {"seed": st.integers(0, 2**63 - 1), "epoch": st.integers(0, 2**31)}


@given(**sizes, **places)
def test_each_image_once(count: int, batch_size: int, shuffle: bool, seed: int, epoch: int) -> None:
    images = numbered(count)
    batches = Batches(images, batch_size, shuffle=shuffle, seed=seed)
    batches.set_epoch(epoch)
    served = list(batches)
    assert len(served) == len(batches) == -(-count // batch_size)
    assert [len(y) for _, y in served[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(served[-1][1]) <= batch_size
    for x, y in served:
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert torch.equal(x, images.images(y))
    seen = order(batches)
    assert sorted(seen) == list(range(count))
    assert shuffle or seen == list(range(count))


@given(**sizes, **places)
def test_drop_last(count: int, batch_size: int, shuffle: bool, seed: int, epoch: int) -> None:
    images = numbered(count)
    if count < batch_size:
        with pytest.raises(
            ValueError, match=f"batch_size is {batch_size}; with drop_last it must be at most the {count}"
        ):
            Batches(images, batch_size, drop_last=True)
        return
    dropping = Batches(images, batch_size, shuffle=shuffle, seed=seed, drop_last=True)
    dropping.set_epoch(epoch)
    served = list(dropping)
    assert len(served) == len(dropping) == count // batch_size
    assert {len(y) for _, y in served} == {batch_size}
    whole = Batches(images, batch_size, shuffle=shuffle, seed=seed)
    whole.set_epoch(epoch)
    assert order(dropping) == order(whole)[: len(served) * batch_size]


@given(**places)
def test_seed_and_epoch_decide_the_order(seed: int, epoch: int) -> None:
    images = numbered(60)
    first = Batches(images, 7, shuffle=True, seed=seed)
    first.set_epoch(epoch)
    once = order(first)
    torch.rand(3)  # the global generator has no say
    assert order(first) == once
    second = Batches(images, 16, shuffle=True, seed=seed, augment=CropAndFlip())
    second.set_epoch(epoch + 1)
    assert order(second) != once
    second.set_epoch(epoch)
    assert order(second) == once  # nor have the batch size, the augmentation or what was served before
    third = Batches(images, 7, shuffle=True, seed=seed + 1)
    third.set_epoch(epoch)
    assert order(third) != once


def test_seed_and_epoch_are_not_added_up() -> None:
    images = numbered(60)
    first, second = Batches(images, 60, shuffle=True, seed=0), Batches(images, 60, shuffle=True, seed=1)
    first.set_epoch(1)
    assert order(first) != order(second)


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    list(Batches(numbered(20), 4, shuffle=True, augment=CropAndFlip()))
    assert torch.equal(torch.rand(4), expected)


def test_augmentation_sees_every_batch_and_follows_the_epoch() -> None:
    images = Images(
        torch.randint(256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8),
        torch.zeros(50, dtype=torch.int64),
        scale=255.0,
        num_classes=1,
        name="noise",
    )
    batches = Batches(images, 16, seed=3, augment=CropAndFlip())

    def epoch(number: int) -> Tensor:
        batches.set_epoch(number)
        return torch.cat([x for x, _ in batches])

    first = epoch(0)
    assert first.shape == (50, 3, 8, 8)
    assert not torch.equal(first, images.images())
    assert not torch.equal(first, epoch(1))
    assert torch.equal(first, epoch(0))
    abandoned = iter(batches)
    next(abandoned)
    assert torch.equal(first, epoch(0))


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_op_serves_what_several_would(channels_last: bool) -> None:
    """A function of one's own takes the long way: choose, augment, scale."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(17, (50, 3, 7, 9), generator=generator).to(torch.uint8)
    images = Images(pixels, torch.arange(50), scale=16.0, num_classes=50, name="noise")
    settings = {"batch_size": 16, "shuffle": True, "seed": 3, "channels_last": channels_last}
    augment = CropAndFlip(padding=2)
    one, several = (Batches(images, augment=how, **settings) for how in (augment, lambda x, draws: augment(x, draws)))
    for (x, y), (x_there, y_there) in zip(one, several, strict=True):
        assert torch.equal(x, x_there)
        assert torch.equal(y, y_there)
        assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert x.stride() == x_there.stride()


def test_a_crop_alone_mirrors_nothing() -> None:
    ramp = torch.arange(1, 9, dtype=torch.uint8).expand(40, 1, 8, 8).contiguous()
    images = Images(ramp, torch.zeros(40, dtype=torch.int64), scale=255.0, num_classes=1, name="ramp")
    for flip in (False, True):
        ((x, _),) = Batches(images, 40, augment=CropAndFlip(padding=2, flip=flip))
        rises = x[:, 0, 4, 4] > x[:, 0, 4, 3]
        assert bool(rises.all()) is not flip


def test_an_image_is_augmented_alike_in_any_batch() -> None:
    images = Images(
        torch.randint(256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8),
        torch.arange(50), scale=255.0, num_classes=50, name="noise",
    )  # fmt: skip
    plain = Batches(images, 50, seed=3, augment=CropAndFlip())
    shuffled = Batches(images, 7, seed=3, augment=CropAndFlip(), shuffle=True)
    ((expected, _),) = plain
    for x, y in shuffled:
        assert torch.equal(x, expected[y])


@given(count=st.integers(2, 70), rows=st.integers(1, 9), world=st.integers(1, 4), drop_last=st.booleans())
def test_processes_share_every_batch(count: int, rows: int, world: int, drop_last: bool) -> None:
    """Rank by rank, the rows are those of one process; all get as many, and at most world - 1 images are left out."""
    size = rows * world
    if count < world or (drop_last and count < size):
        return
    settings = {"shuffle": True, "drop_last": drop_last}
    alone = [y.tolist() for _, y in Batches(numbered(count), size, **settings)]
    shared = [list(Batches(numbered(count), size, rank=r, world_size=world, **settings)) for r in range(world)]
    assert len({len(served) for served in shared}) == 1
    for i, batch in enumerate(zip(*shared, strict=True)):
        parts = [y.tolist() for _, y in batch]
        assert len({len(part) for part in parts}) == 1
        joint = [label for part in parts for label in part]
        assert joint == alone[i][: len(joint)]
        assert len(alone[i]) - len(joint) < world
    left_out = len(alone) - len(shared[0])
    assert left_out in (0, 1)
    assert left_out == 0 or len(alone[-1]) < world


@given(count=st.integers(1, 40), batch_size=st.integers(1, 9), start=st.integers(0, 50))
def test_an_epoch_may_be_entered_at_any_batch(count: int, batch_size: int, start: int) -> None:
    batches = Batches(numbered(count), batch_size, shuffle=True)
    rest = [y.tolist() for _, y in batches.starting_at(start)]
    assert rest == [y.tolist() for _, y in batches][start:]


def test_batches_are_copies() -> None:
    images = numbered(4)
    for x, y in Batches(images, 2):
        x.fill_(9.0)
        y.fill_(9)
    assert torch.equal(images.labels, torch.arange(4))
    assert torch.equal(images.images(), numbered(4).images())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be a finite number >= 1"),
        ({"batch_size": -3}, "batch_size is -3"),
        ({"batch_size": 1, "seed": -1}, "seed is -1"),
        ({"batch_size": 1, "images": numbered(0)}, "images is empty"),
        ({"batch_size": 3, "world_size": 2}, "batch_size is 3; it must be a multiple of the 2 processes"),
        ({"batch_size": 4, "world_size": 4}, "images holds 3; 4 processes need at least one each"),
        ({"batch_size": 2, "world_size": 2, "rank": 2}, r"rank is 2; it must be in \[0, 2\)"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(**({"images": numbered(3)} | arguments))  # type: ignore[arg-type]


def test_epoch_is_not_negative() -> None:
    with pytest.raises(ValueError, match="epoch is -1"):
        Batches(numbered(3), 1).set_epoch(-1)


@pytest.mark.gpu
def test_cuda_serves_the_same_batches(cuda: torch.device) -> None:
    images = numbered(300)
    here = Batches(images, 64, shuffle=True, seed=5, augment=CropAndFlip())
    there = Batches(images, 64, shuffle=True, seed=5, augment=CropAndFlip(), device=cuda)
    for (x, y), (x_there, y_there) in zip(here, there, strict=True):
        assert x_there.is_cuda
        assert torch.equal(x_there.cpu(), x)
        assert torch.equal(y_there.cpu(), y)


@pytest.mark.gpu
def test_cuda_batches_never_wait_for_the_device(cuda: torch.device) -> None:
    batches = Batches(numbered(300), 64, shuffle=True, augment=CropAndFlip(), device=cuda)
    served = iter(batches)
    next(served)  # the order of the epoch is copied once, at its start
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(served)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": [1, 2]}, "images is a list; it must be an afd.data.Images"),
        ({"batch_size": "2"}, "batch_size is '2', a str; it must be a whole number"),
        ({"batch_size": 1.5}, "batch_size is 1.5, a float; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5, a float; it must be a whole number"),
    ],
)
def test_what_is_of_another_type_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Batches(**{"images": numbered(3), "batch_size": 2, **arguments})  # type: ignore[arg-type]
