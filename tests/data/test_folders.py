"""Images in class folders: what is found, how it is split, and what is wrong, said before anything is trained."""

from __future__ import annotations

import io
import re

import image_files
import numpy as np
import pytest
import torch
from image_files import CLASSES, folder, write
from PIL import Image

from afd.data import DataError
from afd.data.files import FileSettings, load_files
from afd.data.sources import FolderSource, RowsSource
from afd.data.stored import stored
from afd.errors import InputError, InputTypeError

HERE = FileSettings(workers=0)


def names(images):
    return [images.told(place).rpartition("/")[2] for place in range(len(images))]


def test_classes_are_folders_by_name_and_images_files_at_any_depth(tmp_path):
    for number, file in enumerate(
        ["b/2.JPG", "b/deep/er/1.webp", "a/x.jpeg", "a/.hidden.png", "a/notes.txt", ".c/1.png"]
    ):
        if file.endswith(".txt"):
            (tmp_path / file).write_text("no image")
        else:
            write(tmp_path / file, number)
    source = FolderSource(tmp_path)
    assert source.classes == ("a", "b")
    assert [source.told(number) for number in range(3)] == [
        str(tmp_path / one) for one in ("a/x.jpeg", "b/2.JPG", "b/deep/er/1.webp")
    ]
    assert source.labels.tolist() == [0, 1, 1]


def test_pixels_and_labels_are_those_of_the_files(tmp_path):
    folder(tmp_path, {"": 4})
    images = stored(FolderSource(tmp_path), workers=0).loaded()
    expected = [np.asarray(image_files.picture(number)) for number in range(12)]
    assert torch.equal(images.pixels, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (images.num_classes, images.scale) == (3, 255.0)


def test_three_parts_are_the_three_parts(tmp_path):
    folder(tmp_path, {"train": 5, "val": 2, "test": 3})
    splits = load_files(f"folder:{tmp_path}", HERE)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [15, 6, 9]
    assert splits.train.classes == splits.test.classes == CLASSES


@pytest.mark.parametrize("part", ["val", "test", "validation", "Test"])
def test_one_part_beside_training_images_is_the_test_and_validation_is_held_out(tmp_path, part):
    folder(tmp_path, {"train": 10, part: 2})
    splits = load_files(f"folder:{tmp_path}", FileSettings(validation=0.2, workers=0))
    assert names(splits.test) == [f"{place:03d}.png" for place in range(2)] * 3
    assert splits.validation.labels.bincount().tolist() == [2, 2, 2]
    held, kept = set(splits.validation.index.tolist()), set(splits.train.index.tolist())
    assert held | kept == set(range(30))
    assert not held & kept


def test_without_parts_both_are_held_out_in_the_stated_shares(tmp_path):
    folder(tmp_path, {"": 20})
    splits = load_files(f"folder:{tmp_path}", FileSettings(validation=0.25, test_share=0.4, workers=0))
    assert [part.labels.bincount().tolist() for part in (splits.train, splits.validation, splits.test)] == [
        [9, 9, 9],
        [3, 3, 3],
        [8, 8, 8],
    ]
    parts = [set(part.index.tolist()) for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60


def test_tiny_imagenet_is_read_as_it_is(tmp_path):
    classes = ("n01", "n02")
    for number, name in enumerate(classes):
        for place in range(4):
            write(tmp_path / "train" / name / "images" / f"{name}_{place}.JPEG".replace(".JPEG", ".jpeg"), number)
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0 0 1 1")
    lines = []
    for place in range(3):
        write(tmp_path / "val" / "images" / f"val_{place}.jpeg", place)
        lines.append(f"val_{place}.jpeg\t{classes[(place + 1) % 2]}\t0\t0\t62\t62")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines))
    write(tmp_path / "test" / "images" / "test_0.jpeg", 9)  # without a class
    splits = load_files(f"folder:{tmp_path}", HERE)
    assert names(splits.test) == ["val_0.jpeg", "val_1.jpeg", "val_2.jpeg"]
    assert splits.test.labels.tolist() == [1, 0, 1]
    assert len(splits.train) + len(splits.validation) == 8


def test_images_of_many_sizes_become_one(tmp_path):
    for number, size in enumerate([(20, 30), (40, 16), (12, 12), (100, 64)]):
        write(tmp_path / CLASSES[number % 2] / f"{number}.png", number, height=size[0], width=size[1])
    images = stored(FolderSource(tmp_path), image_size=8, resize=10, workers=0)
    assert images.shape == (3, 8, 8)
    first = Image.open(tmp_path / "ant" / "0.png").resize((15, 10), Image.Resampling.BILINEAR).crop((3, 1, 11, 9))
    assert np.array_equal(images.loaded().pixels[0].permute(1, 2, 0).numpy(), np.asarray(first))


# --- What is wrong --------------------------------------------------------------------------------------------------


def refused(tmp_path, settings=HERE):
    with pytest.raises((DataError, InputError)) as caught:
        load_files(f"folder:{tmp_path}", settings)
    told = str(caught.value)
    assert "\n" not in told
    return told


def test_an_empty_class_folder_is_named(tmp_path):
    folder(tmp_path, {"train": 2, "test": 1})
    (tmp_path / "train" / "dog").mkdir()
    assert re.search(r"train holds no JPEG, PNG or WebP files in dog; a class folder must", refused(tmp_path))


def test_one_class_is_not_enough(tmp_path):
    folder(tmp_path, {"": 5}, classes=["ant"])
    assert refused(tmp_path).endswith("holds one class, ant; there must be at least two")


def test_no_folder_no_classes_and_no_training_images_are_said(tmp_path):
    assert "which is not there" in refused(tmp_path / "nowhere")
    write(tmp_path / "1.png", 1)
    assert "holds no folders" in refused(tmp_path)
    assert "which is a file" in refused(tmp_path / "1.png")
    folder(tmp_path / "other", {"val": 2})
    assert "holds val, but no train" in refused(tmp_path / "other")


def test_damaged_files_are_counted_and_named_or_left_out(tmp_path):
    folder(tmp_path, {"train": 6, "test": 2}, ending=".jpg")
    (tmp_path / "train" / "ant" / "002.jpg").write_bytes(b"")
    cut = tmp_path / "train" / "bee" / "003.jpg"
    cut.write_bytes(cut.read_bytes()[:-20])
    told = refused(tmp_path)
    assert told.startswith(f"2 of 18 files of {tmp_path}/train hold no whole image: {tmp_path}/train/ant/002.jpg: ")
    assert "003.jpg: " in told
    assert told.endswith("--bad-images skip")
    splits = load_files(f"folder:{tmp_path}", FileSettings(workers=0, bad="skip"))
    left = {
        f"{splits.train.classes[label]}/{name}"
        for part in (splits.train, splits.validation)
        for label, name in zip(part.labels, names(part), strict=True)
    }
    assert len(left) == 16
    assert not left & {"ant/002.jpg", "bee/003.jpg"}
    assert [one.partition(": ")[0].rpartition("/")[2] for one in splits.train.left_out] == ["002.jpg", "003.jpg"]


def test_a_class_of_damaged_files_only_cannot_be_left_out(tmp_path):
    folder(tmp_path, {"train": 2, "test": 2})
    for file in (tmp_path / "train" / "cat").iterdir():
        file.write_bytes(b"no")
    assert "in cat holds a whole image" in refused(tmp_path, FileSettings(workers=0, bad="skip"))


def test_a_folder_or_a_dangling_link_called_like_an_image_is_damaged(tmp_path):
    folder(tmp_path, {"train": 3, "test": 1})
    (tmp_path / "train" / "ant" / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert "gone.png: it is no ordinary file" in refused(tmp_path)


def test_mixed_sizes_need_one_that_is_named(tmp_path):
    folder(tmp_path, {"train": 3, "test": 1})
    write(tmp_path / "train" / "ant" / "large.png", 5, height=16, width=12)
    told = refused(tmp_path)
    assert "2 sizes: 8x8 (9, such as" in told
    assert "16x12 (1, such as" in told
    assert told.endswith("--image-size")
    assert load_files(f"folder:{tmp_path}", FileSettings(image_size=8, workers=0)).train.shape == (3, 8, 8)


def test_parts_of_two_sizes_need_one_that_is_named(tmp_path):
    folder(tmp_path, {"train": 3})
    folder(tmp_path, {"test": 3}, height=12, width=12)
    assert "are of 12x12, and those of" in refused(tmp_path)


def test_a_class_that_only_the_test_has_is_named(tmp_path):
    folder(tmp_path, {"train": 3, "test": 3})
    write(tmp_path / "test" / "elk" / "1.png", 5)
    assert "test holds elk, which the training images have no class of" in refused(tmp_path)


def test_more_workers_than_files_are_too_many(tmp_path):
    folder(tmp_path, {"train": 3, "test": 1})
    assert "workers is 64; there are 9 images" in refused(tmp_path, FileSettings(workers=64))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"resize": 9}, "resize is 9, but image_size is missing"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 8, "resize": 7}, "resize is 7; it must be at least the image size, 8"),
        ({"validation": 0.0}, "validation is 0.0"),
        ({"test_share": 1.5}, "test-share is 1.5"),
        ({"test_share": 0.5}, "test-share is 0.5, but there are test images"),
        ({"bad": "ignore"}, "bad_images"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, told):
    folder(tmp_path, {"train": 3, "test": 1})
    assert told in refused(tmp_path, FileSettings(**{"workers": 0, **settings}))


def test_a_class_may_be_called_train(tmp_path):
    folder(tmp_path, {"": 10}, classes=["bus", "car", "train"])
    assert load_files(f"folder:{tmp_path}", HERE).train.classes == ("bus", "car", "train")


def test_a_part_without_class_folders_is_no_part(tmp_path):
    folder(tmp_path, {"train": 4})
    write(tmp_path / "val" / "1.png", 1)
    assert "val holds no folders" in refused(tmp_path)


def test_names_that_cannot_be_shown_are_refused(tmp_path):
    folder(tmp_path, {"": 4}, classes=["a", "b\nc"])
    assert "holds the class folder 'b\\nc'" in refused(tmp_path)


def test_what_archives_and_systems_leave_behind_is_no_class(tmp_path):
    folder(tmp_path, {"": 10})
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "ant" / "Thumbs.db").write_bytes(b"no image")
    assert load_files(f"folder:{tmp_path}", HERE).train.classes == CLASSES


def test_a_link_to_a_folder_above_ends_in_one_line(tmp_path):
    folder(tmp_path, {"": 4})
    (tmp_path / "ant" / "up").symlink_to(tmp_path)
    assert refused(tmp_path).count("cannot be read") == 1


def test_one_image_of_each_class_is_none_to_spare(tmp_path):
    folder(tmp_path, {"": 1})
    assert "has one image of each class, and none to spare" in refused(tmp_path)


def test_a_listing_without_lines_is_named(tmp_path):
    folder(tmp_path, {"train": 3})
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "val_annotations.txt").write_text("\n\n")
    assert "val_annotations.txt lists no images" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"), [("folder:", "name is 'folder:'"), ("ants", "name is 'ants'"), (None, "name is a NoneType")]
)
def test_names_of_no_files_are_refused(name, told):
    with pytest.raises((InputError, InputTypeError), match=told):
        load_files(name)


def test_fewer_validation_images_than_workers_are_enough(tmp_path):
    folder(tmp_path, {"train": 4, "val": 1, "test": 1})
    splits = load_files(f"folder:{tmp_path}", FileSettings(workers=8))
    assert [part.workers for part in (splits.train, splits.validation, splits.test)] == [8, 3, 3]


def test_a_source_is_wanted():
    with pytest.raises(InputTypeError, match="source is a str"):
        stored("flowers")


# --- Rows of somebody's own -------------------------------------------------------------------------------------------


class Rows:
    """What a split of a Hugging Face data set looks like to us; the real one is in tests/models."""

    def __init__(self, images, labels):
        self.images, self.kept = images, labels

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, number):
        return {"image": self.images[number], "label": self.kept[number]}


FORMS = {
    "Pillow": lambda data: Image.open(io.BytesIO(data)),
    "bytes": lambda data: data,
    "dict": lambda data: {"bytes": data, "path": None},
    "HWC": lambda data: np.asarray(Image.open(io.BytesIO(data))),
    "bytearray": bytearray,
    "CHW": lambda data: torch.from_numpy(np.asarray(Image.open(io.BytesIO(data))).copy()).permute(2, 0, 1),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rows_hold_images_in_any_usual_form(form):
    held = [form(image_files.content(number)) for number in range(4)]
    images = stored(RowsSource(Rows(held, [1, 0, 2, 1])), workers=0)
    expected = np.stack([np.asarray(image_files.picture(number)) for number in range(4)])
    assert torch.equal(images.loaded().pixels, torch.from_numpy(expected).permute(0, 3, 1, 2))
    assert images.labels.tolist() == [1, 0, 2, 1]
    assert images.classes == ("0", "1", "2")


def test_rows_may_name_files_and_grey_images_are_coloured(tmp_path):
    path = write(tmp_path / "1.png", 3)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    images = stored(RowsSource(Rows([path, str(path), grey, grey[..., None], grey[None]], [0, 1, 0, 1, 1])), workers=0)
    found = images.loaded().pixels
    assert torch.equal(found[0], found[1])
    for row in (2, 3, 4):
        assert np.array_equal(found[row].numpy(), np.broadcast_to(grey, (3, 8, 8)))


@pytest.mark.parametrize("rows", [{"image": [1], "label": [0]}, iter([1])])
def test_what_has_no_rows_is_refused(rows):
    with pytest.raises(InputTypeError, match="it must have rows by their number, and a length"):
        RowsSource(rows)


def test_rows_that_hold_no_image_are_named(tmp_path):
    rows = Rows(
        [np.zeros((4, 4), np.float32), {"bytes": None, "path": str(tmp_path / "gone.png")}, b"", None], [0, 1, 1, 0]
    )
    with pytest.raises(
        DataError, match=r"4 of 4 files of Rows hold no whole image: row 0: .*float32.*; row 1: .*gone\.png"
    ):
        stored(RowsSource(rows), workers=0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (Rows([], []), "rows is empty"),
        (Rows([image_files.picture(0)], ["ant"]), "labels must be integers"),
        (Rows([image_files.picture(0)], [-1]), "labels run from -1 to -1"),
        ([{"img": 0, "label": 1}], "rows have img, label; they have no 'image'"),
        ([(0, 1)], "rows have no names"),
    ],
)
def test_rows_of_another_kind_are_refused(rows, told):
    with pytest.raises(InputError, match=re.escape(told)):
        RowsSource(rows)
