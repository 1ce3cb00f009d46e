"""Extra data: what is read from files and folders and what is not, and batches in which a share is extra images."""

from __future__ import annotations

import collections
import io
import itertools
import re
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from afd.checkpoint import load_checkpoint
from afd.cli import main
from afd.data import Batches, DataError, Images, MixedBatches, extra, read_extra
from afd.data.images import CropAndFlip
from afd.errors import InputError, InputTypeError
from afd.methods import Natural
from afd.training import Trainer

SHAPE = (3, 5, 4)  # of one image: channels, height, width


def like(shape=SHAPE, scale=255.0, classes=3):
    pixels = torch.zeros(2, *shape, dtype=torch.uint8)
    return Images(pixels, torch.zeros(2, dtype=torch.int64), scale, classes, "small")


def noise(count=7, shape=SHAPE, most=255, classes=3):
    generator = np.random.default_rng(0)
    return generator.integers(most + 1, size=(count, *shape), dtype=np.uint8), np.arange(count) % classes


# --- An .npz file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [("image", "label"), ("images", "labels"), ("x", "y")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("last", [False, True])
def test_an_npz_is_read_in_either_layout_block_by_block(last, save, keys, tmp_path, monkeypatch):
    monkeypatch.setattr(extra, "BLOCK", 130)  # two images
    pixels, labels = noise()
    save(tmp_path / "more.npz", **{keys[0]: pixels.transpose(0, 2, 3, 1) if last else pixels, keys[1]: labels})
    found = read_extra(tmp_path / "more.npz", like())
    assert torch.equal(found.pixels, torch.from_numpy(pixels))
    assert found.labels.tolist() == labels.tolist()
    assert (found.scale, found.num_classes) == (255.0, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i8", np.uint64])
def test_labels_may_be_any_integers(dtype, tmp_path):
    pixels, labels = noise()
    np.savez(tmp_path / "more.npz", image=pixels, label=labels.astype(dtype))
    assert read_extra(str(tmp_path / "more.npz"), like()).labels.tolist() == labels.tolist()


def test_where_both_layouts_fit_channels_are_the_last(tmp_path):
    pixels, labels = noise(shape=(3, 3, 3))
    np.savez(tmp_path / "more.npz", image=pixels, label=labels)
    found = read_extra(tmp_path / "more.npz", like((3, 3, 3)))
    assert torch.equal(found.pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_images_of_one_channel_need_no_axis_for_it(tmp_path):
    pixels, labels = noise(shape=(8, 8), most=16)
    np.savez(tmp_path / "more.npz", image=pixels, label=labels)
    found = read_extra(tmp_path / "more.npz", like((1, 8, 8), scale=16.0))
    assert torch.equal(found.pixels[:, 0], torch.from_numpy(pixels))


class Trap:
    """Would be run by whoever unpickles it."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


PIXELS, LABELS = noise()
OBJECTS = np.array([Trap()] * 7, dtype=object)
WRONG = {
    "shape": (
        {"image": noise(shape=(3, 4, 4))[0]},
        r"'image' of shape \[7, 3, 4, 4\]; for small it must be \[N, 5, 4, 3\] or \[N, 3, 5, 4\]",
    ),
    "no axis of images": ({"image": PIXELS[0]}, r"'image' of shape \[3, 5, 4\]; for small"),
    "dtype": ({"image": PIXELS / 255}, r"'image' of float64; images must be uint8, with values in \[0, 255\]"),
    "signed": ({"image": PIXELS.astype(np.int8)}, "'image' of int8; images must be uint8"),
    "float labels": ({"label": LABELS / 1.0}, r"'label', float64 \[7\]; labels must be integers \[N\]"),
    "soft labels": ({"label": np.eye(7, 3)}, r"'label', float64 \[7, 3\]; labels must be integers"),
    "label too large": ({"label": LABELS + 1}, r"the label 3; the data set has classes 0 \.\.\. 2"),
    "negative label": ({"label": LABELS - 1}, "the label -1; the data set has classes"),
    "huge label": ({"label": np.full(7, 2**64 - 1, np.uint64)}, "the label 18446744073709551615"),
    "fewer labels": ({"label": LABELS[1:]}, "holds 7 images and 6 labels; it must hold as many of both"),
    "no images": ({"image": PIXELS[:0], "label": LABELS[:0]}, "holds no images; there must be at least one"),
    "no image key": (
        {"image": None, "data": PIXELS},
        "holds data, label; it must hold an array 'image' or 'images' or",
    ),
    "no label key": ({"label": None}, "holds image; it must hold an array 'label' or 'labels' or 'y'"),
    "objects": ({"label": OBJECTS}, r"'label', object \[7\]; labels must be"),
    "image objects": ({"image": OBJECTS}, "'image' of object; images must be"),
    "columns first": ({"image": np.asfortranarray(PIXELS)}, "in Fortran's order; save it in C's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_npz_holds_otherwise_is_named(name, tmp_path):
    changes, message = WRONG[name]
    arrays = {"image": PIXELS, "label": LABELS} | changes
    np.savez(tmp_path / "more.npz", **{key: one for key, one in arrays.items() if one is not None})
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "more.npz")) + ".* " + message):
        read_extra(tmp_path / "more.npz", like())


def test_pixels_above_the_scale_are_named(tmp_path):
    pixels, labels = noise(shape=(1, 8, 8), most=17)
    np.savez(tmp_path / "more.npz", image=pixels, label=labels)
    with pytest.raises(DataError, match=r"more\.npz holds pixels up to 17; those of small are in \[0, 16\]"):
        read_extra(tmp_path / "more.npz", like((1, 8, 8), scale=16.0))


def test_a_damaged_file_is_named(tmp_path):
    np.savez(tmp_path / "whole.npz", image=PIXELS, label=LABELS)
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "text": b"no zip", "empty": b""}
    flipped = bytearray(whole)
    flipped[whole.index(PIXELS.tobytes()[:64]) + 5] ^= 0xFF
    damaged["flipped"] = bytes(flipped)
    early = io.BytesIO()
    with zipfile.ZipFile(early, "w") as archive, zipfile.ZipFile(io.BytesIO(whole)) as source:
        archive.writestr("label.npy", source.read("label.npy"))
        archive.writestr("image.npy", source.read("image.npy")[:-10])
    damaged["early"] = early.getvalue()
    for name, content in damaged.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.npz cannot be read as an \.npz file: ."):
            read_extra(path, like())


def test_other_paths_are_named(tmp_path):
    with pytest.raises(DataError, match=r"extra-data is .*nowhere; there is no such file or folder"):
        read_extra(tmp_path / "nowhere", like())
    (tmp_path / "more.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"extra-data is .*more\.npy; it must be an \.npz file or a folder"):
        read_extra(tmp_path / "more.npy", like())
    with pytest.raises(InputTypeError, match=r"like is a str; it must be an afd\.data\.Images"):
        read_extra(tmp_path / "more.npy", "digits")
    with pytest.raises(InputError, match="which is a device or pipe"):
        read_extra("/dev/zero", like())


# --- A folder -------------------------------------------------------------------------------------------------------


def folder_of(root, names, pixels, labels):
    """A PNG an image, in folders by class."""
    for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        content = image.transpose(1, 2, 0) if len(image) > 1 else image[0]
        Image.fromarray(content).save(root / names[label] / f"{row:02}.PNG")
    return root


@pytest.mark.parametrize("names", [["ape", "bee", "cat"], ["0", "1", "2"], ["00", "01", "02"]])
@pytest.mark.parametrize("shape", [SHAPE, (1, 5, 4)])
def test_a_folder_has_one_for_each_class(shape, names, tmp_path):
    pixels, labels = noise(shape=shape)
    folder_of(tmp_path, names, pixels, labels)
    (tmp_path / ".cache").mkdir()
    (tmp_path / names[0] / "notes.txt").write_text("of the class")
    (tmp_path / "README").write_text("of all")
    found = read_extra(tmp_path, like(shape))
    order = np.argsort(labels, kind="stable")
    assert torch.equal(found.pixels, torch.from_numpy(pixels[order]))
    assert found.labels.tolist() == labels[order].tolist()


def test_folders_by_numbers_are_those_classes_and_need_not_be_all(tmp_path):
    """Of their names as words, 10 would come before 9."""
    pixels, _ = noise(2)
    folder_of(tmp_path, {9: "9", 10: "10"}, pixels, [9, 10])
    found = read_extra(tmp_path, like(classes=12))
    assert sorted(found.labels.tolist()) == [9, 10]
    assert torch.equal(found.pixels[found.labels.tolist().index(10)], torch.from_numpy(pixels[1]))


def test_a_jpeg_is_read(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((5, 4, 3), 128, np.uint8)).save(tmp_path / name / "one.jpg")
    assert read_extra(tmp_path, like()).pixels.unique().tolist() == [128]


def break_folder(kind, root):
    """What is wrong with a folder, and what is said of it."""
    first, shown = root / "a" / "00.PNG", r"a/00\.PNG"
    image = Image.fromarray(noise(shape=(64, 64, 3))[0][0])
    if kind == "another size":
        image.save(first)
        return rf"{shown} is RGB of 64x64; images of small are RGB of 5x4"
    if kind == "transparent":
        image.convert("RGBA").resize((4, 5)).save(first)
        return rf"{shown} is RGBA of 5x4; images of small are RGB of 5x4"
    if kind == "no image":
        first.write_text("no image")
        return rf"{shown} cannot be read as an image: "
    if kind == "cut short":
        image.save(first)
        first.write_bytes(first.read_bytes()[:-2000])
        return rf"{shown} cannot be read as an image: "
    if kind == "an empty class":
        first.unlink()
        for one in (root / "a").iterdir():
            one.unlink()
        return "a holds no PNG or JPEG files; the folder of a class must hold at least one"
    if kind == "a class more":
        (root / "d").mkdir()
        return r"holds 4 folders \(a, b, c, \.\.\.\); it must hold one for each of 3 classes"
    for one in list(root.iterdir()):
        one.rename(root / {"a": "0", "b": "1", "c": "3" if kind == "a number too large" else "01"}[one.name])
    return "holds the label 3; the data set has" if kind == "a number too large" else "holds two folders of one class"


KINDS = [
    "another size", "transparent", "no image", "cut short", "an empty class", "a class more", "a number too large",
    "a number twice",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_folder_holds_otherwise_is_named(kind, tmp_path):
    folder_of(tmp_path, "abc", *noise())
    shape = (3, 64, 64) if kind == "cut short" else SHAPE
    message = break_folder(kind, tmp_path)
    with pytest.raises(DataError, match=message):
        read_extra(tmp_path, like(shape))


def test_a_folder_of_nothing_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no folders; it must hold one for each class, with PNG or JPEG files"):
        read_extra(tmp_path, like())


# --- Batches --------------------------------------------------------------------------------------------------------


def numbered(count, first=0, classes=1000):
    """Images that carry their number, in the label and in two pixels."""
    number = torch.arange(first, first + count)
    pixels = torch.stack([number // 256, number % 256], dim=1).to(torch.uint8).view(-1, 1, 1, 2)
    return Images(pixels, number, 255.0, classes, "numbered")


REAL, EXTRA = numbered(50), numbered(90, first=100)


def mixed(size=20, **settings):
    return MixedBatches(REAL, size, **{"extra": EXTRA, "share": 0.3, **settings})


def epoch_of(batches, epoch, start=0):
    batches.set_epoch(epoch)
    return list(batches.with_index(start))


@given(
    size=st.integers(4, 40), share=st.floats(0.2, 0.8), images=st.integers(4, 150), epoch=st.integers(0, 9),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_a_share_of_every_batch_is_extra_images(size, share, images, epoch, seed):
    batches = mixed(size, share=share, epoch_images=images, seed=seed)
    served = epoch_of(batches, epoch)
    assert len(served) == len(batches) == -(-images // size)
    assert sum(len(y) for _, y, _ in served) == images
    for x, y, index in served:
        assert int((index >= len(REAL)).sum()) == round(share * len(y))
        assert torch.equal(y, torch.where(index < len(REAL), index, index + 50))
        assert torch.equal(x, numbered(200).images(y))
        assert (x.dtype, y.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)


def test_every_image_comes_once_before_any_comes_again():
    """Over the bounds of epochs and batches."""
    batches = mixed(16, epoch_images=37)
    index = torch.cat([index for epoch in range(40) for *_, index in epoch_of(batches, epoch)])
    for number, count in ((index[index < 50], 50), (index[index >= 50] - 50, 90)):
        orders = [one for one in number.split(count) if len(one) == count]
        assert len(orders) >= 4
        for one, other in itertools.pairwise(orders):
            assert torch.equal(one.sort().values, torch.arange(count))
            assert not torch.equal(one, other)


def test_without_extra_images_an_epoch_is_that_of_batches_or_of_another_length():
    settings = {"seed": 5, "augment": CropAndFlip(1)}
    plain, endless = Batches(REAL, 16, shuffle=True, **settings), MixedBatches(REAL, 16, **settings)
    for epoch in (1, 2):
        plain.set_epoch(epoch)
        expected = list(plain.with_index())
        for one, other in zip(epoch_of(endless, epoch), expected, strict=True):
            assert all(map(torch.equal, one, other))
    longer = MixedBatches(REAL, 25, epoch_images=100, **settings)
    counts = collections.Counter(int(i) for *_, index in epoch_of(longer, 3) for i in index)
    assert len(longer) == 4
    assert set(counts.values()) == {2}


@given(
    rows=st.integers(2, 12), world=st.integers(1, 4), images=st.integers(8, 90), share=st.floats(0.3, 0.7),
    epoch=st.integers(1, 5),
)  # fmt: skip
def test_processes_share_every_batch(rows, world, images, share, epoch):
    settings = {"share": share, "epoch_images": images, "augment": CropAndFlip(1)}
    alone = epoch_of(mixed(rows * world, **settings), epoch)
    parts = [epoch_of(mixed(rows * world, rank=rank, world_size=world, **settings), epoch) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert len(alone) - len(parts[0]) in (0, 1)
    for whole, *shared in zip(alone, *parts, strict=False):
        joint = [torch.cat(columns) for columns in zip(*shared, strict=True)]
        assert len(whole[1]) - len(joint[1]) < world
        for one, other in zip(whole, joint, strict=True):
            assert torch.equal(one[: len(other)], other)


@pytest.mark.parametrize("world", [2, 4, 8, 16])
def test_each_process_has_its_share_of_extra_images_and_neighbours_are_of_any_kind(world):
    pairs = collections.Counter()
    for rank in range(world):
        for _, y, index in epoch_of(mixed(256, share=0.5, epoch_images=2048, rank=rank, world_size=world), 1):
            kinds = (index >= 50).long()
            assert int(kinds.sum()) == len(y) // 2
            pairs.update((kinds[::2] + kinds[1::2]).tolist())
    assert min(pairs[0], pairs[2]) > 150  # of 1024
    assert pairs[1] > 400


def test_an_epoch_may_be_entered_at_any_batch_and_needs_none_before_it():
    settings = {"epoch_images": 70, "augment": CropAndFlip(1)}
    for epoch in (1, 4):
        whole = epoch_of(mixed(**settings), epoch)
        for start in range(5):
            rest = epoch_of(mixed(**settings), epoch, start)
            assert len(rest) == max(0, 4 - start)
            for one, other in zip(rest, whole[start:], strict=True):
                assert all(map(torch.equal, one, other))


def test_the_seed_decides_and_the_global_generators_do_not():
    index = torch.cat([index for *_, index in epoch_of(mixed(seed=3), 1)])
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state()
    assert torch.equal(torch.cat([index for *_, index in epoch_of(mixed(seed=3), 1)]), index)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(torch.cat([index for *_, index in epoch_of(mixed(seed=4), 1)]), index)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_an_image_is_augmented_by_its_own_draw_of_each_order(own, channels_last):
    """In whatever batch, by the op or by a function of one's own; and anew when it comes again within an epoch."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (32, 3, 8, 8), generator=generator).to(torch.uint8)
    sets = [Images(one, torch.arange(len(one)), 255.0, 99, "noise") for one in pixels.split([12, 20])]
    crop = CropAndFlip(2)
    augment = (lambda x, draws: crop(x, draws)) if own else crop

    def served(size, how=augment):
        batches = MixedBatches(
            sets[0], size, extra=sets[1], share=0.5, epoch_images=48, augment=how, channels_last=channels_last
        )
        found = collections.defaultdict(list)
        for x, _, index in epoch_of(batches, 1):
            assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
            for image, number in zip(x, index.tolist(), strict=True):
                found[number].append(image)
        return found

    first, other, plain = served(16), served(24), served(16, how=None)
    twice = 0
    for number, images in first.items():
        assert all(map(torch.equal, images, other[number]))
        twice += len(images) == 2 and not torch.equal(*images)
        assert torch.equal(
            plain[number][0], (sets[0] if number < 12 else sets[1]).images()[number - 12 * (number > 11)]
        )
    assert twice > 8


@pytest.mark.gpu
def test_cuda_serves_the_same_batches_and_never_waits(cuda):
    settings = {"epoch_images": 200, "augment": CropAndFlip(1)}
    served = mixed(device=cuda, **settings).with_index()
    there = [next(served)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        there += list(served)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(mixed(**settings).with_index(), there, strict=True):
        assert all(torch.equal(mine, theirs.cpu()) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"extra": [1]}, InputTypeError, r"extra is a list; it must be an afd\.data\.Images"),
        ({"extra": numbered(0)}, InputError, "extra is empty"),
        (
            {"extra": numbered(5, classes=999)},
            InputError,
            "extra has num_classes 999; it must be 1000, as of the images",
        ),
        ({"extra": like((1, 2, 1), classes=1000)}, InputError, r"extra has shape \(1, 2, 1\); it must be \(1, 1, 2\)"),
        ({"extra": like((1, 1, 2), 16.0, 1000)}, InputError, r"extra has scale 16\.0; it must be 255\.0"),
        ({"share": 0.0}, InputError, r"share is 0\.0; with extra images it must be in \(0, 1\)"),
        ({"share": 1.0}, InputError, r"share is 1\.0; with extra"),
        ({"share": float("nan")}, InputError, "share is nan"),
        ({"share": "0.3"}, InputTypeError, "share is '0.3', a str; it must be a number"),
        (
            {"share": 0.01},
            InputError,
            r"share is 0\.01 of batch_size 20, which is 0 rows; a batch must have at least one",
        ),
        ({"share": 0.99}, InputError, "which is 20 rows; a batch must have at least one row"),
        ({"extra": None}, InputError, r"share is 0\.3; without extra images it must be 0"),
        ({"epoch_images": 0}, InputError, "epoch_images is 0"),
        ({"epoch_images": 1.5}, InputTypeError, r"epoch_images is 1\.5, a float; it must be a whole number"),
        ({"epoch_images": 3, "world_size": 4}, InputError, "epoch_images is 3; 4 processes need at least one each"),
    ],
)
def test_a_mistake_is_named(settings, kind, message):
    with pytest.raises(kind, match=message):
        mixed(**settings)


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    """As many are known to it; that they are the same is the user's word, as for any data set."""

    def fit(train, **settings):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1000))
        trainer = Trainer(model, Natural(), epochs=2, **settings)
        trainer.fit(train, Batches(REAL, 50))
        return trainer

    fit(mixed(epoch_images=60), folder=tmp_path, save_every=1)
    within = tmp_path / "previous.pt"
    assert load_checkpoint(within)[1]["position"]["batch"] == 2
    fewer = MixedBatches(REAL, 20, extra=numbered(89, first=100), share=0.3, epoch_images=60)
    told = "trained on 50 images, 90 extra, and here are 50 images, 89 extra; it needs the same ones"
    with pytest.raises(InputError, match=told):
        fit(fewer, resume=within)
    with pytest.warns(UserWarning, match=r"drew from train\.state_dict\(\), which these have not"):
        fit(Batches(numbered(60), 20, shuffle=True), resume=within)


# --- afd train --------------------------------------------------------------------------------------------------------


FEW = [
    "--epochs",
    "2",
    "--width",
    "2",
    "--limit",
    "40",
    "--attack-steps",
    "1",
    "--eval-steps",
    "1",
    "--batch-size",
    "20",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Eight-by-eight images of noise, as of digits."""
    pixels, labels = noise(30, (1, 8, 8), most=16, classes=10)
    path = tmp_path_factory.mktemp("extra") / "more.npz"
    np.savez(path, image=pixels, label=labels)
    return path


@pytest.mark.filterwarnings("ignore::afd.errors.ModelWarning")
def test_the_command_trains_on_extra_data_and_goes_on_in_mid_epoch(digits, tmp_path):
    out = {name: str(tmp_path / name) for name in ("whole", "half", "plain", "long", "again")}
    words = ["train", "at", *FEW, "--extra-data", str(digits), "--extra-share", "3/10", "--epoch-images", "100"]
    assert main([*words, "--out", out["whole"]]) == 0
    metadata = load_checkpoint(tmp_path / "whole" / "last.pt")[1]
    assert metadata["batches"] == 5
    assert metadata["config"]["data"]["extra_data"] == str(digits)
    assert (metadata["config"]["data"]["extra_share"], metadata["config"]["data"]["epoch_images"]) == (0.3, 100)
    # from a checkpoint within the first epoch, with the file moved
    assert main([*words, "--epochs", "1", "--save-every", "3", "--out", out["half"]]) == 0
    within = tmp_path / "half" / "previous.pt"
    assert load_checkpoint(within)[1]["position"] == {"epoch": 1, "batch": 3, "global_step": 3}
    moved = tmp_path / "moved.npz"
    moved.write_bytes(digits.read_bytes())
    words[words.index(str(digits))] = str(moved)
    assert main([*words, "--resume", str(within), "--out", out["again"]]) == 0
    assert main(["train", "at", *FEW, "--out", out["plain"]]) == 0
    assert main(["train", "at", *FEW, "--epoch-images", "100", "--out", out["long"]]) == 0
    weights = {name: torch.load(tmp_path / name / "model.pt") for name in ("whole", "again", "plain", "long")}
    assert all(torch.equal(one, weights["again"][name]) for name, one in weights["whole"].items())
    for other in ("plain", "long"):
        assert any(not torch.equal(one, weights[other][name]) for name, one in weights["whole"].items())
    assert load_checkpoint(tmp_path / "long" / "last.pt")[1]["batches"] == 5
    plain = load_checkpoint(tmp_path / "plain" / "last.pt")[1]["config"]["data"]
    assert not {"extra_data", "extra_share", "epoch_images"} & plain.keys()


@pytest.mark.filterwarnings("ignore::afd.errors.ModelWarning")
def test_the_share_is_that_of_its_source_where_nobody_names_one_and_the_file_repeats_it(digits, tmp_path):
    words = ["train", "natural", "--epochs", "1", "--width", "2", "--limit", "40", "--batch-size", "20"]
    assert main([*words, "--extra-data", str(digits), "--out", str(tmp_path / "first")]) == 0
    assert load_checkpoint(tmp_path / "first" / "last.pt")[1]["config"]["data"]["extra_share"] == 0.7
    assert main(["train", "--config", str(tmp_path / "first" / "run.toml"), "--out", str(tmp_path / "again")]) == 0
    one, other = (torch.load(tmp_path / name / "model.pt") for name in ("first", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--extra-share 0.3", "extra-share is 0.3, but there is no extra-data to take a share of"),
        ("--extra-data DIGITS --extra-share 1", "extra-share is 1.0; it must be a share between 0 and 1"),
        ("--extra-data DIGITS --extra-share 0.01", "share is 0.01 of batch_size 20, which is 0 rows"),
        ("--extra-data DIGITS --epoch-images 0", "epoch-images is 0"),
        ("--extra-data nowhere.npz", "extra-data is nowhere.npz; there is no such file or folder"),
        ("--extra-data=", "extra-data is ''; it must not be empty"),
    ],
)
def test_the_command_names_a_mistake(words, message, digits, tmp_path, capsys):
    words = words.replace("DIGITS", str(digits)).split()
    assert main(["train", "at", *FEW, *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
