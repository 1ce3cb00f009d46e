"""CIFAR: which byte is the label, which plane is red, and what is said about files that are not whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from afd.data import DataError, cifar, load

Write = Callable[..., Path]
Layouts = dict[str, cifar.Layout]
FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("name", "train", "test"), [("cifar10", 100, 20), ("cifar100", 300, 200)])
def test_layout(
    tmp_path: Path, write_cifar: Write, small_cifar: Layouts, name: str, train: int, test: int, inside: bool
) -> None:
    write_cifar(tmp_path / FOLDERS[name] if inside else tmp_path, name)
    layout = small_cifar[name]
    training, testing = layout.read(tmp_path, download=False)
    per_file = layout.records[0]
    for images, count in ((training, train), (testing, test)):
        assert images.pixels.shape == (count, 3, 32, 32)
        assert images.num_classes == layout.num_classes
        position = torch.arange(count) % per_file
        assert torch.equal(images.labels, position % layout.num_classes)
        planes = torch.stack([position, position + 1, position + 2], dim=1).to(torch.uint8)
        assert torch.equal(images.pixels, planes[:, :, None, None].expand(-1, -1, 32, 32))
    splits = load(name, tmp_path, download=False)
    assert len(splits.train) + len(splits.validation) == train
    assert len(splits.validation) == layout.num_classes * max(round(train / layout.num_classes / 10), 1)
    assert torch.bincount(splits.validation.labels).unique().numel() == 1


def test_rows_before_columns(tmp_path: Path, write_cifar: Write, small_cifar: Layouts) -> None:
    path = write_cifar(tmp_path, "cifar10") / "test_batch.bin"
    image = torch.arange(3072).remainder(251).to(torch.uint8).view(3, 32, 32)
    path.write_bytes(bytes([7]) + image.numpy().tobytes() + path.read_bytes()[3073:])
    _, test = small_cifar["cifar10"].read(tmp_path, download=False)
    assert test.labels[0] == 7
    assert torch.equal(test.pixels[0], image)
    assert test.pixels[0, 0, 0, 1] == 1
    assert test.pixels[0, 0, 1, 0] == 32


def test_the_real_files_have_their_published_sizes() -> None:
    assert [count * 3073 for count in cifar.CIFAR10.records] == [30_730_000] * 6
    assert [count * 3074 for count in cifar.CIFAR100.records] == [153_700_000, 30_740_000]


@pytest.mark.parametrize("length", [0, 1, 3072, 3073, 19 * 3073, 20 * 3073 - 1, 20 * 3073 + 1])
def test_wrong_length(tmp_path: Path, write_cifar: Write, length: int) -> None:
    path = write_cifar(tmp_path, "cifar10") / "data_batch_3.bin"
    path.write_bytes((path.read_bytes() * 2)[:length])
    with pytest.raises(
        DataError, match=rf"data_batch_3\.bin holds {length} bytes; expected 61460 \(20 records of 3073\)"
    ):
        load("cifar10", tmp_path, download=False)


@pytest.mark.parametrize(
    ("name", "file", "at"), [("cifar10", "data_batch_5.bin", 3073), ("cifar100", "test.bin", 3075)]
)
def test_label_out_of_range(tmp_path: Path, write_cifar: Write, name: str, file: str, at: int) -> None:
    path = write_cifar(tmp_path, name) / file
    data = bytearray(path.read_bytes())
    data[at] = 111
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{file} holds label 111; expected labels 0 to (9|99)$"):
        load(name, tmp_path, download=False)
