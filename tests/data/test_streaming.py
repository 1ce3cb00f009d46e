"""Batches of images in files: the same as from memory, from any batch on, by any number of workers and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import image_files
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import folder

from afd.data import Batches, DataError
from afd.data.decoding import BadImageError
from afd.data.images import CropAndFlip
from afd.data.sizing import Resolution, Sizing, resolutions_of
from afd.data.sources import FolderSource, Source
from afd.data.stored import Decoder, StoredImages, by_workers, stored, usual_workers
from afd.data.streaming import ResizedCropAndFlip, StreamedBatches
from afd.errors import InputError, InputTypeError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """21 images of 8x8 in three classes."""
    return stored(FolderSource(folder(tmp_path_factory.mktemp("files"), {"": 7})), workers=0)


def with_workers(images, workers):
    return StoredImages(images.source, images.index, images.shape, images.sizing, images.bad, workers)


def served(loader, epoch=3, batch=0):
    loader.set_epoch(epoch)
    return [tuple(part.clone() for part in item) for item in loader.with_index(batch)]


def same(left, right):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("augment", [None, CropAndFlip(2)])
def test_batches_are_bit_for_bit_those_of_the_same_images_in_memory(files, workers, augment):
    settings = {"shuffle": True, "seed": 5, "augment": augment, "channels_last": True}
    expected = served(Batches(files.loaded(), 4, **settings))
    same(served(StreamedBatches(with_workers(files, workers), 4, **settings)), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [CropAndFlip(2), ResizedCropAndFlip(6)])
def test_an_epoch_goes_on_from_any_batch_by_any_number_of_workers(files, workers, augment):
    settings = {"shuffle": True, "seed": 1, "augment": augment}
    whole = served(StreamedBatches(files, 4, **settings))
    for batch in (1, 4, 5):
        same(served(StreamedBatches(with_workers(files, workers), 4, **settings), batch=batch), whole[batch:])
    assert served(StreamedBatches(files, 4, **settings), batch=6) == []


def test_processes_share_a_batch_row_by_row(files):
    settings = {"shuffle": True, "seed": 2, "augment": ResizedCropAndFlip(8)}
    whole = served(StreamedBatches(files, 6, **settings))
    shares = [served(StreamedBatches(files, 6, rank=rank, world_size=3, **settings)) for rank in range(3)]
    for number, batch in enumerate(whole):
        joined = [torch.cat(parts) for parts in zip(*(share[number] for share in shares), strict=True)]
        for one, other in zip(joined, batch, strict=True):
            assert torch.equal(one, other[: len(one)])


def test_epochs_differ_and_come_again(files):
    loader = StreamedBatches(files, 21, shuffle=True, augment=ResizedCropAndFlip(8))
    first, second, again = (served(loader, epoch) for epoch in (1, 2, 1))
    same(first, again)
    assert not torch.equal(first[0][2], second[0][2])
    by_index = [dict(zip(index.tolist(), x, strict=True)) for ((x, _, index),) in (first, second)]
    assert any(not torch.equal(by_index[0][number], by_index[1][number]) for number in range(21))


def test_the_global_generators_are_left_alone(files):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    served(StreamedBatches(with_workers(files, 2), 4, shuffle=True, augment=CropAndFlip()))
    assert torch.equal(torch.rand(4), expected)


def test_what_is_left_half_read_leaves_no_worker_behind(files):
    loader = StreamedBatches(with_workers(files, 2), 2, shuffle=True)
    batches = loader.with_index()
    next(batches)
    mine = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    with open(mine) as file:  # noqa: PTH123
        assert file.read().split()
    batches.close()
    with open(mine) as file:  # noqa: PTH123
        left = file.read().split()
    assert not [one for one in left if _is_worker(one)]


def _is_worker(number):
    with open(f"/proc/{number}/cmdline") as file:  # noqa: PTH123
        return "resource_tracker" not in file.read()


# --- Sizes ------------------------------------------------------------------------------------------------------------


@given(draw=st.integers(0, 2**62 - 1), height=st.integers(1, 40), width=st.integers(1, 40), scale=st.floats(0.01, 1))
def test_a_part_lies_within_its_image_and_has_its_share(draw, height, width, scale):
    crop = ResizedCropAndFlip(4, scale)
    top, left, high, wide = (float(one) for one in crop.parts(torch.tensor([draw]), height, width))
    assert -1e-4 <= top <= top + high <= height * (1 + 1e-5) + 1e-4
    assert -1e-4 <= left <= left + wide <= width * (1 + 1e-5) + 1e-4
    assert high * wide <= height * width * (1 + 1e-5)
    if high < height and wide < width:  # nothing was cut
        assert high * wide >= scale * height * width * (1 - 1e-4)
        assert 3 / 4 * (1 - 1e-4) <= wide / high <= 4 / 3 * (1 + 1e-4)


def test_parts_are_spread_over_areas_aspects_and_places():
    draws = torch.randint(2**62, (4000,), generator=torch.Generator().manual_seed(0))
    top, left, high, wide = ResizedCropAndFlip(8, 0.1).parts(draws, 100, 100)
    shares = high * wide / 1e4
    inside = (high < 100) & (wide < 100)
    assert abs(float(shares[inside].min()) - 0.1) < 0.01
    assert abs(float((wide / high)[inside].log().mean())) < 0.02
    for place, length in ((top, high), (left, wide)):
        relative = (place / (100 - length).clamp(min=1e-3))[length < 99]
        assert abs(float(relative.mean()) - 0.5) < 0.02
        assert float(relative.min()) < 0.01
        assert float(relative.max()) > 0.99
    assert abs(float(((draws >> 60) & 1).float().mean()) - 0.5) < 0.03


def test_a_whole_part_is_the_image_and_a_flip_its_mirror():
    x = torch.randint(256, (64, 3, 9, 9), dtype=torch.uint8)
    draws = torch.randint(2**62, (64,)) & ~((1 << 60) - 1) | ((1 << 15) - 1) | (1 << 29)  # all of the area, square
    found = ResizedCropAndFlip(9, 1.0)(x, draws)
    for image, one, draw in zip(x.float(), found, draws.tolist(), strict=True):
        expected = image.flip(2) if draw >> 60 & 1 else image
        assert (one - expected).abs().max() < 0.05
    assert len({draw >> 60 & 1 for draw in draws.tolist()}) == 2


def test_what_becomes_of_an_image_does_not_hang_on_its_batch():
    x, draws = torch.randint(256, (7, 3, 20, 13), dtype=torch.uint8), torch.randint(2**62, (7,))
    crop = ResizedCropAndFlip(10, 0.3)
    whole = crop(x, draws)
    assert whole.shape == (7, 3, 10, 10)
    for row in range(7):
        assert torch.equal(crop(x[row : row + 1], draws[row : row + 1])[0], whole[row])


def test_resolutions_grow_over_the_run_and_keep_the_margin(tmp_path):
    images = stored(FolderSource(folder(tmp_path, {"": 3}, height=40, width=40)), image_size=16, resize=20, workers=0)
    loader = StreamedBatches(
        images, 4, augment=ResizedCropAndFlip(16), resolutions=(Resolution(8, 1), Resolution(12, 3), Resolution(16, 4))
    )
    sides = {epoch: served(loader, epoch)[0][0].shape[-1] for epoch in range(6)}
    assert sides == {0: 8, 1: 8, 2: 8, 3: 12, 4: 16, 5: 16}
    assert images.sizing.scaled(12) == Sizing(12, 15)


@pytest.mark.parametrize("words", [["128"], ["0:1"], ["a:1"], ["128:2"], ["128:1", "64:1"], ["8:1", "9:4", "10:3"]])
def test_resolutions_that_say_nothing_are_refused(words):
    with pytest.raises(InputError, match="resolutions"):
        resolutions_of(words)


def test_parts_of_images_that_are_no_squares_keep_their_shape(tmp_path):
    images = stored(FolderSource(folder(tmp_path, {"": 3}, height=12, width=20)), workers=0)
    loader = StreamedBatches(images, 4, augment=ResizedCropAndFlip((12, 20), 0.5))
    assert served(loader)[0][0].shape == (4, 3, 12, 20)
    assert served(StreamedBatches(images, 4, augment=ResizedCropAndFlip(9)))[0][0].shape == (4, 3, 9, 9)


@pytest.mark.parametrize("resolutions", [["8:1"], [Resolution(8, 3)]])
def test_resolutions_of_another_kind_are_refused(files, resolutions):
    with pytest.raises((InputError, InputTypeError), match="resolutions"):
        StreamedBatches(files, 4, resolutions=resolutions)


def test_resolutions_need_a_size(files):
    with pytest.raises(InputError, match="no image_size"):
        StreamedBatches(files, 4, resolutions=(Resolution(8, 1),))


@pytest.mark.parametrize(
    "settings", [{"side": 0}, {"side": (8, 0)}, {"side": 8, "scale": 0.0}, {"side": 8, "scale": 1.5}]
)
def test_crops_out_of_range_are_refused(settings):
    with pytest.raises(InputError):
        ResizedCropAndFlip(**settings)


def test_only_stored_images_are_streamed(files):
    with pytest.raises(InputTypeError, match="StoredImages"):
        StreamedBatches(files.loaded(), 4)
    with pytest.raises(InputTypeError, match=r"afd\.data\.Images"):
        Batches(files, 4)


# --- Damage that only decoding shows ----------------------------------------------------------------------------------


class Late(Source):
    """Numbered grey images, some of which turn out damaged when they are decoded."""

    def __init__(self, count, damaged):
        self.labels, self.classes, self.name = torch.arange(count) % 2, ("a", "b"), "late"
        self.damaged = damaged

    def told(self, number):
        return f"image {number}"

    def size(self, _number):
        return 4, 4

    def pixels(self, number, least=0):  # noqa: ARG002
        if number in self.damaged:
            raise BadImageError("broken in the middle")
        return np.full((4, 4, 3), number, dtype=np.uint8)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_named_or_the_next_image_takes_the_place(workers):
    source = Late(10, {3, 4, 9})
    with pytest.raises(DataError, match=r"image 3 holds no whole image: broken in the middle; .*--bad-images skip"):
        served(StreamedBatches(stored(source, workers=workers), 5))
    loader = StreamedBatches(stored(source, workers=workers, bad="skip"), 5)
    found = served(loader)
    numbers = [round(float(one[0, 0, 0]) * 255) for x, _, _ in found for one in x]
    assert numbers == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    assert torch.cat([index for _, _, index in found]).tolist() == numbers
    assert torch.cat([y for _, y, _ in found]).tolist() == [number % 2 for number in numbers]
    assert loader.damaged == dict.fromkeys((3, 4, 9), "broken in the middle")


def test_a_set_of_damaged_images_ends():
    with pytest.raises(DataError, match="none of the 4 images of late can be decoded"):
        served(StreamedBatches(stored(Late(4, set(range(4))), workers=0, bad="skip"), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_half_of_the_images_may_be_damaged(workers):
    loader = StreamedBatches(stored(Late(60, set(range(30))), workers=workers, bad="skip"), 20)
    assert {number for _, _, index in served(loader) for number in index.tolist()} == set(range(30, 60))
    assert sorted(loader.damaged) == list(range(30))


def test_what_was_found_is_kept_with_the_position_and_other_images_are_refused():
    loader = StreamedBatches(stored(Late(10, {3}), workers=0, bad="skip"), 5)
    served(loader)
    other = StreamedBatches(stored(Late(10, set()), workers=0, bad="skip"), 5)
    other.load_state_dict(loader.state_dict())
    assert other.damaged == {3: "broken in the middle"}
    fewer = StreamedBatches(stored(Late(9, set()), workers=0), 3)
    with pytest.raises(InputError, match="trained on 10 other images than the 9"):
        fewer.load_state_dict(loader.state_dict())


class Fatal:
    """Work that kills its process."""

    def __getitem__(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_worker_that_dies_is_an_error_in_a_line():
    with pytest.raises(DataError, match="a process that reads images has died") as caught:
        list(by_workers(Fatal(), range(6), 1))
    assert "\n" not in str(caught.value)


def test_workers_go_on_when_a_terminal_interrupts_everybody():
    found = list(by_workers(_Interrupted(), range(4), 1))
    assert found == [0, 1, 2, 3]


class _Interrupted:
    def __getitem__(self, number):
        os.kill(os.getpid(), signal.SIGINT)
        return number


def test_what_workers_keep_does_not_grow_with_the_images(tmp_path):
    few, many = (FolderSource(folder(tmp_path / str(count), {"": count})) for count in (10, 100))
    sizes = [sum(map(sys.getsizeof, (one.files.joined, one.files.ends.tobytes()))) for one in (few, many)]
    assert (sizes[1] - sizes[0]) / 270 < 25  # bytes an image
    assert Decoder(stored(few, workers=0), None).source is few


def test_a_digest_knows_names_and_classes(tmp_path):
    for place in "ab":
        folder(tmp_path / place, {"": 2})
    one, other = (stored(FolderSource(tmp_path / place), workers=0) for place in "ab")
    assert one.digest() == other.digest()  # in another place
    (tmp_path / "b" / "ant" / "000.png").rename(tmp_path / "b" / "ant" / "zzz.png")
    assert stored(FolderSource(tmp_path / "b"), workers=0).digest() != one.digest()
    assert one.take(torch.tensor([0, 1, 2])).digest() != one.digest()
    before, file = one.digest(), tmp_path / "a" / "bee" / "001.png"
    file.write_bytes(file.read_bytes() + b"\0")
    assert stored(FolderSource(tmp_path / "a"), workers=0).digest() != before


def test_images_are_the_same_however_they_are_loaded(files):
    whole = files.loaded()
    part = torch.tensor([20, 3, 3, 11])
    assert torch.equal(with_workers(files, 2).take(part).loaded().pixels, whole.take(part).pixels)
    assert torch.equal(files.take(part).labels, whole.take(part).labels)
    assert np.array_equal(whole.pixels[20].permute(1, 2, 0).numpy(), np.asarray(image_files.picture(20)))


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(2, 1, 1), (1, 1, 1), (8, 1, 7), (64, 1, 8), (16, 4, 3), (4, 4, 1)]
)
def test_the_usual_workers_leave_a_core_to_each_process(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert usual_workers() == workers


def test_a_process_ends_although_it_has_read_half_of_an_epoch(tmp_path):
    folder(tmp_path, {"": 20})
    code = """
        import sys
        from pathlib import Path
        from afd.data.sources import FolderSource
        from afd.data.stored import stored
        from afd.data.streaming import StreamedBatches
        batches = iter(StreamedBatches(stored(FolderSource(Path(sys.argv[1])), workers=2), 2))
        next(batches)
        print("read", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "read\n"), ended.stderr
