"""Images in tar shards: what patterns stand for, what is read, what is kept of an index, and what is wrong."""

from __future__ import annotations

import gzip
import io
import tarfile

import image_files
import numpy as np
import pytest
import torch
from image_files import shard
from PIL import Image

from afd.data import DataError, shard_files, shards
from afd.data.files import FileSettings, load_files
from afd.data.shards import ShardSource, expanded, shards_by_part
from afd.data.stored import stored

HERE = FileSettings(workers=0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setattr(shard_files.fetch, "default_root", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "shards"


def three(tmp_path, **settings):
    for number in range(3):
        shard(tmp_path / f"train-{number:03d}.tar", 10 * number, 10, **settings)
    return f"{tmp_path}/train-{{000..002}}.tar"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{train,val}-{00..01}.tar", ["train-00.tar", "train-01.tar", "val-00.tar", "val-01.tar"]),
        ("a-{3..2}.tar", []),
    ],
)
def test_braces_stand_for_several_names(pattern, names):
    assert expanded(pattern) == names


@pytest.mark.parametrize("told", [".cls", ".json"])
@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_images_and_labels_are_those_of_the_members(tmp_path, told, ending):
    source = ShardSource(expanded(three(tmp_path, told=told, ending=ending)))
    images = stored(source, workers=0).loaded()
    assert len(source) == 30
    assert images.labels.tolist() == [number % 3 for number in range(30)]
    expected = np.asarray(Image.open(io.BytesIO(image_files.content(17, ending))))
    assert np.array_equal(images.pixels[17].permute(1, 2, 0).numpy(), expected)
    assert source.told(17) == f"000017{ending} in {tmp_path}/train-001.tar"


def test_labels_may_be_names(tmp_path):
    three(tmp_path, label=lambda number: ("elk", "ant")[number % 2])
    source = ShardSource(expanded(f"{tmp_path}/train-{{000..002}}.tar"))
    assert source.classes == ("ant", "elk")
    assert source.labels[:4].tolist() == [1, 0, 1, 0]


def test_names_of_shards_say_their_part(tmp_path):
    three(tmp_path)
    shard(tmp_path / "val-0.tar", 50, 6)
    shard(tmp_path / "imagenet-test-0.tar", 60, 9)
    splits = load_files(f"shards:{tmp_path}/*.tar", HERE)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [30, 6, 9]
    (tmp_path / "val-0.tar").unlink()
    splits = load_files(f"shards:{tmp_path}/*.tar", HERE)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [27, 3, 9]


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    pattern = three(tmp_path)
    first = ShardSource(expanded(pattern))
    made = []
    real = shard_files._indexed
    monkeypatch.setattr(shard_files, "_indexed", lambda one: made.append(one) or real(one))
    again = ShardSource(expanded(pattern))
    assert made == []
    assert np.array_equal(first.offsets, again.offsets)
    assert [again.told(place) for place in range(30)] == [first.told(place) for place in range(30)]
    shard(tmp_path / "train-001.tar", 10, 11)
    assert len(ShardSource(expanded(pattern))) == 31
    assert made == [f"{tmp_path}/train-001.tar"]


def test_an_order_keeps_shards_together_and_is_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GROUP", 2)
    for number in range(6):
        shard(tmp_path / f"{number}.tar", 10 * number, 10)
    source = ShardSource([f"{tmp_path}/{number}.tar" for number in range(6)])
    index = torch.arange(60)
    orders = [source.order(index, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(60))
        groups = [set((part // 10).tolist()) for part in order.split(20)]
        assert all(len(one) == 2 for one in groups)
        assert set.union(*groups) == set(range(6))
        assert order[:20].tolist() != sorted(order[:20].tolist())
    assert not torch.equal(*orders)
    part = torch.tensor([3, 12, 15, 44, 59])  # of a split
    assert sorted(source.order(part, torch.Generator().manual_seed(0)).tolist()) == list(range(5))


# --- URLs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store():
    """Shards at URLs, in memory."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec, which torch brings, is not installed")
    system = fsspec.filesystem("memory")
    system.store.clear()
    return system


def test_what_is_at_urls_is_read_alike_and_few_copies_stay(tmp_path, store, cache, monkeypatch):
    monkeypatch.setattr(shard_files, "KEPT", 2)
    pattern = three(tmp_path)
    for number in range(3):
        store.pipe(f"/set/train-{number:03d}.tar", (tmp_path / f"train-{number:03d}.tar").read_bytes())
    here, there = ShardSource(expanded(pattern)), ShardSource(expanded("memory://set/train-{000..002}.tar"))
    assert there.labels.tolist() == here.labels.tolist()
    for place in (0, 15, 29, 3):
        assert np.array_equal(here.pixels(place), there.pixels(place))
    assert len(list(cache.glob("*.tar"))) <= 2
    assert list(cache.glob("*.part")) == []
    assert [one.rpartition("/")[2] for one in shards_by_part("memory://set/*.tar", {})["train"]] == [
        f"train-{number:03d}.tar" for number in range(3)
    ]


def test_a_url_that_is_not_there_is_missing(store):
    with pytest.raises(DataError, match=r"the shard memory://set/train-0\.tar is missing"):
        shards_by_part("memory://set/train-0.tar", {})
    with pytest.raises(DataError, match=r"nothing://set/0\.tar cannot be read"):
        shards_by_part("nothing://set/0.tar", {})


# --- What is wrong --------------------------------------------------------------------------------------------------


def refused(pattern, settings=HERE):
    with pytest.raises(DataError) as caught:
        load_files(f"shards:{pattern}", settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    pattern = three(tmp_path)
    (tmp_path / "train-001.tar").unlink()
    assert refused(pattern) == f"the shard {tmp_path}/train-001.tar is missing"
    assert f"of numbered shards, {tmp_path}/train-001.tar is missing" in refused(f"{tmp_path}/*.tar")
    assert refused(f"{tmp_path}/none-*.tar") == f"no shard is named {tmp_path}/none-*.tar"


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    pattern = three(tmp_path)
    held = (tmp_path / "train-001.tar").read_bytes()
    for cut in (len(held) // 3, 5 * 512, 700, 100):
        (tmp_path / "train-001.tar").write_bytes(held[:cut])
        assert "train-001.tar" in refused(pattern)


def test_a_shard_without_images_or_classes_is_named(tmp_path):
    pattern = three(tmp_path)
    with tarfile.open(tmp_path / "train-001.tar", "w") as archive:
        member = tarfile.TarInfo("a.txt")
        archive.addfile(member, io.BytesIO())
    assert "train-001.tar holds no JPEG, PNG or WebP files" in refused(pattern)
    shard(tmp_path / "train-001.tar", 10, 2, told=".text")
    assert "train-001.tar has no class of 000010, 000011" in refused(pattern)
    shard(tmp_path / "train-001.tar", 10, 2, told=".json", label=lambda number: [number])
    assert "names no class, but [10]" in refused(pattern)


def test_damaged_images_in_shards_are_found_when_they_are_indexed(tmp_path):
    pattern = three(tmp_path)
    with tarfile.open(tmp_path / "train-001.tar", "w") as archive:
        for number in range(10, 20):
            data = image_files.content(number, ".jpg")
            for name, held in ((".jpg", data[:-9] if number == 14 else data), (".cls", b"1")):
                member = tarfile.TarInfo(f"{number:06d}{name}")
                member.size = len(held)
                archive.addfile(member, io.BytesIO(held))
    told = refused(pattern)
    assert told.startswith("1 of 30 files of ")
    assert f"000014.jpg in {tmp_path}/train-001.tar: " in told
    splits = load_files(f"shards:{pattern}", FileSettings(workers=0, bad="skip"))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 29


def test_one_class_in_all_shards_is_not_enough(tmp_path):
    three(tmp_path, label=lambda _: "0")
    assert "holds one class, 0" in refused(f"{tmp_path}/*.tar")


def tar(path, members):
    """A shard of members, by name."""
    with tarfile.open(path, "w") as archive:
        for name, held in members:
            member = tarfile.TarInfo(name)
            member.size = len(held)
            archive.addfile(member, io.BytesIO(held))
    return str(path)


def images(*names):
    return [(name, image_files.content(number, f".{name.rpartition('.')[2]}")) for number, name in enumerate(names)]


def test_a_mask_beside_an_image_is_no_image(tmp_path):
    members = images("a.jpg", "a.seg.png", "b.seg.png", "b.jpg")
    source = ShardSource([tar(tmp_path / "0.tar", [*members, ("a.cls", b"0"), ("b.cls", b"1\n")])])
    assert [source.told(number).partition(" ")[0] for number in range(2)] == ["a.jpg", "b.jpg"]
    assert source.labels.tolist() == [0, 1]


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("a.jpg", "a.jpg")])
def test_two_images_of_one_sample_are_named(tmp_path, names):
    told = refused(tar(tmp_path / "0.tar", [*images(*names), ("a.cls", b"0")]))
    assert f"holds {names[0]} and {names[1]}, two images of one sample" in told


def test_names_with_dots_are_hinted_at(tmp_path):
    assert "has no dot but before its ending" in refused(tar(tmp_path / "0.tar", images("0.000.jpg", "0.001.jpg")))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["train/0.tar", "val/0.tar"], {"train": 1, "validation": 1}),
        (["my-train-test-0.tar", "my-test-0.tar"], {"train": 1, "test": 1}),
        (["set/0.tar", "set/1.tar"], {"train": 2}),
        (["test/train-0.tar"], {"train": 1}),
    ],
)
def test_a_shard_is_of_the_part_that_it_tells_first_or_its_folder_is_called(tmp_path, names, parts):
    for name in names:
        shard(tmp_path / name, 0, 3)
    told = {"train": ("train",), "validation": ("val",), "test": ("test",)}
    pattern = f"{tmp_path}/{{{','.join(names)}}}"
    assert {part: len(found) for part, found in shards_by_part(pattern, told).items()} == parts


def test_a_pattern_of_nothing_or_of_too_much_is_said(tmp_path):
    assert refused(f"{tmp_path}/a-{{5..1}}.tar") == f"{tmp_path}/a-{{5..1}}.tar stands for no shard"
    for pattern in ("a-{0..99999}.tar", "a-{0..999}{0..999}{0..999}.tar"):
        assert "stands for more than 10000 shards" in refused(pattern)


def test_numbers_with_zeros_in_front_are_numbers(tmp_path):
    shard(tmp_path / "0.tar", 0, 6, label=lambda number: f"{number % 2:02d}")
    assert ShardSource([f"{tmp_path}/0.tar"]).labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_a_class_file_goes_before_a_json_that_says_none(tmp_path):
    members = [*images("a.jpg"), ("a.json", b'{"caption": "x"}'), ("a.cls", b"2")]
    assert ShardSource([tar(tmp_path / "0.tar", members)]).labels.tolist() == [2]


def test_links_and_packed_shards_are_named(tmp_path):
    path = tar(tmp_path / "0.tar", [*images("a.jpg"), ("a.cls", b"0")])
    packed = tmp_path / "1.tar"
    packed.write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    assert "is packed (gzip); unpack it" in refused(packed)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    assert "b.jpg in the shard" in refused(path)


def test_a_label_that_would_make_a_hundred_million_classes_is_refused(tmp_path):
    shard(tmp_path / "0.tar", 0, 3, label=lambda number: str(300_000_000 + number))
    assert "a label is 300000002; numbers of classes must be below 100000" in refused(f"{tmp_path}/0.tar")


def test_a_damaged_index_is_made_anew(tmp_path, cache):
    pattern = three(tmp_path)
    ShardSource(expanded(pattern))
    for file in cache.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:50])
    assert len(ShardSource(expanded(pattern))) == 30


def test_a_cache_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(shard_files.fetch, "default_root", lambda: tmp_path / "file" / "afd")
    assert "the cache folder" in refused(three(tmp_path))


def test_a_digest_knows_what_lies_in_the_shards(tmp_path):
    pattern = three(tmp_path)
    before = stored(ShardSource(expanded(pattern)), workers=0).digest()
    assert stored(ShardSource(expanded(pattern)), workers=0).digest() == before
    shard(tmp_path / "train-001.tar", 40, 10, label=lambda number: str((number - 30) % 3))
    assert stored(ShardSource(expanded(pattern)), workers=0).digest() != before
