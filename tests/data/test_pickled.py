"""CIFAR's Python archives: the same images as the binary ones hold, and files that could run code run none."""

from __future__ import annotations

import os
import pickle
import pickletools
import resource
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afd.data import DataError, cifar, datasets, load

Layouts = dict[str, cifar.Layout]
Write = Callable[..., Path]
FOLDERS = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}


def python_2(pixels: np.ndarray, label: str, labels: list[int], **others: list[int]) -> bytes:
    """A file as Python 2's cPickle wrote the published ones: protocol 2, every string one of bytes."""

    def string(text: bytes) -> bytes:
        short = len(text) < 256
        return (b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text))) + text

    def numbers(values: list[int]) -> bytes:
        return b"]q\x05(" + b"".join(b"K" + bytes([value]) for value in values) + b"e"

    dtype = b"cnumpy\ndtype\nq\x03U\x02u1K\x00K\x01\x87Rq\x04(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"J" + struct.pack("<i", pixels.shape[0]) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    entries = string(b"data") + array + string(b"batch_label") + string(b"training batch 1 of 5")
    for name, values in {label: labels, **others}.items():
        entries += string(name.encode()) + numbers(values)
    return b"\x80\x02}q\x00(" + entries + string(b"filenames") + b"]q\x06(" + string(b"a.png") * 3 + b"e" + b"u."


def python_3(pixels: np.ndarray, label: str, labels: list[int], protocol: int = 4, **others: list[int]) -> bytes:
    """The same, as somebody has saved it anew."""
    return pickle.dumps({"data": pixels, label: labels, "filenames": ["a.png"] * 3, **others}, protocol=protocol)


@pytest.fixture
def write_pickles(write_cifar: Write, small_cifar: Layouts) -> Write:
    """Writes a small CIFAR in both archives; their files hold the same random images."""

    def write(root: Path, name: str, form: Callable[..., bytes] = python_2) -> Path:
        binary, python = (root / folder for folder in FOLDERS[name])
        layout, draw = small_cifar[name], np.random.default_rng(0)
        write_cifar(binary, name)
        python.mkdir(parents=True)
        for here, there, count in zip(layout.source.files, layout.pickled.files, layout.records, strict=True):
            pixels = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = draw.integers(0, layout.num_classes, count, dtype=np.uint8)
            coarse = draw.integers(0, 20, count, dtype=np.uint8)
            columns = (
                [labels[:, None], pixels] if layout.label_bytes == 1 else [coarse[:, None], labels[:, None], pixels]
            )
            (binary / here).write_bytes(np.concatenate(columns, axis=1).tobytes())
            others = {} if layout.label_bytes == 1 else {"coarse_labels": coarse.tolist()}
            (python / there).write_bytes(form(pixels, layout.label, labels.tolist(), **others))
        return python

    return write


def same(first: Any, second: Any) -> bool:
    parts = ("train", "validation", "test")
    pairs = [(getattr(first, part), getattr(second, part)) for part in parts]
    return all(torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) for a, b in pairs)


@pytest.mark.parametrize("form", [python_2, python_3])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_holds_the_images_of_the_binary_archive_bit_for_bit(
    tmp_path: Path, write_pickles: Write, name: str, form: Callable[..., bytes]
) -> None:
    python = write_pickles(tmp_path, name, form)
    binary = load(name, tmp_path, download=False)
    assert binary.train.pixels.float().std() > 50
    shutil.rmtree(tmp_path / FOLDERS[name][0])
    assert same(load(name, tmp_path, download=False), binary)
    assert same(load(name, python, download=False), binary)  # the folder itself named


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_may_lie_in_either_order_and_under_either_name_of_numpys(
    tmp_path: Path, write_pickles: Write, protocol: int
) -> None:
    python = write_pickles(tmp_path, "cifar10", lambda pixels, *a: python_3(np.asfortranarray(pixels), *a, protocol))
    binary = load("cifar10", tmp_path, download=False)
    shutil.rmtree(tmp_path / FOLDERS["cifar10"][0])
    assert same(load("cifar10", tmp_path, download=False), binary)
    names = {b"numpy.core.multiarray", b"numpy._core.multiarray"}
    for other in names if protocol == 3 else ():  # in protocol 4, lengths of frames stand before them
        for path in python.iterdir():
            path.write_bytes(path.read_bytes().replace(*(names - {other}), other))
            assert other in path.read_bytes()
        assert same(load("cifar10", tmp_path, download=False), binary)


@pytest.fixture
def archive(tmp_path: Path, write_pickles: Write, small_cifar: Layouts, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small cifar-100-python.tar.gz in a folder with nothing else."""
    import hashlib

    python, root = write_pickles(tmp_path / "made", "cifar100"), tmp_path / "root"
    root.mkdir()
    path = root / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(python, arcname=python.name)
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    layout = small_cifar["cifar100"]
    source = replace(layout.pickled, md5={path.name: md5})
    monkeypatch.setitem(datasets.READERS, "cifar100", replace(layout, pickled=source).read)
    return path


def test_an_archive_that_lies_there_is_unpacked(tmp_path: Path, no_network: None, archive: Path) -> None:
    expected = load("cifar100", tmp_path / "made", download=False)
    assert same(load("cifar100", archive.parent, download=False), expected)
    found = {str(path.relative_to(archive.parent)) for path in archive.parent.rglob("*") if path.is_file()}
    assert found == {archive.name, "cifar-100-python/train", "cifar-100-python/test"}


def test_a_damaged_archive_is_named(no_network: None, archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz has md5 [0-9a-f]{32}; expected [0-9a-f]{32}"):
        load("cifar100", archive.parent, download=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar10", "cifar-10-batches-py or cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python or cifar-100-python"),
    ],
)
def test_who_has_no_files_hears_that_the_python_ones_would_do(
    tmp_path: Path, no_network: None, name: str, said: str
) -> None:
    with pytest.raises(DataError, match=f"or {said}"):
        load(name, tmp_path, download=False)


# --- Hostile and damaged files ---------------------------------------------------------------------------------------

COUNT = 20
PIXELS = np.zeros((COUNT, 3072), np.uint8)
LABELS = [0] * COUNT


class Calls:
    """What a pickle calls when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class State:
    """An array's pickle with a state of one's own choice."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


def touched(path: Path) -> dict[str, bytes]:
    """Pickles that would make a file at `path`, were they trusted."""
    command = f"touch {path}"
    in_words = f"__import__('os').system({command!r})"
    dumps = pickle.dumps
    return {
        "os.system": dumps({"data": Calls(os.system, command), "labels": LABELS}),
        "eval": dumps(Calls(eval, in_words)),
        "exec, old protocol": dumps(Calls(exec, in_words), protocol=0),
        "in a key": dumps({Calls(os.system, command): 1}),
        "in the labels": dumps({"data": PIXELS, "labels": [Calls(os.system, command)]}),
        "in an array's state": dumps({"data": State(1, (COUNT, 3072), Calls(os.system, command), False, b"")}),
        "a dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93\x8c\x01/\x85R.",
        "a dotted name of numpy's": b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__subclasses__\x93)R.".replace(
            b"\x13", b"\x16"
        ),
        "INST": f"(S'{command}'\nios\nsystem\n.".encode(),
        "OBJ": b"(cos\nsystem\n" + f"S'{command}'\n".encode() + b"o.",
        "numpy.load": dumps(Calls(np.load, str(path))),
        "numpy.save": b"cnumpy\nsave\n(" + f"S'{path}'\n".encode() + b"K\x01tR.",
        "numpy's exec": b"cnumpy.testing._private.utils\nrunstring\n(" + f"S'{in_words}'\n".encode() + b"}tR.",
        "numpy's f2py": b"cnumpy.f2py.diagnose\nrun_command\n(" + f"S'{command}'\n".encode() + b"tR.",
        "an ndarray that is called": dumps(Calls(np.ndarray, (10**12,))),
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent name": b"Pos.system\n.",
        "an object": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "a buffer out of band": b"\x80\x05\x97.",
        "a codec": dumps(b"\xff", protocol=2),
    }


@pytest.mark.parametrize("kind", touched(Path("x")))
def test_a_hostile_file_runs_nothing_and_is_one_line(tmp_path: Path, kind: str) -> None:
    path, made = tmp_path / "data_batch_1", tmp_path / "made"
    path.write_bytes(touched(made)[kind])
    with pytest.raises(DataError) as caught:
        cifar.read_pickled(path, COUNT, 3072, "labels", 10)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not made.exists()


def entries(**changes: Any) -> bytes:
    return pickle.dumps({"data": PIXELS, "labels": LABELS} | changes, protocol=4)


def with_state(*state: Any) -> bytes:
    return entries(data=State(*state))


BYTES = np.dtype(np.uint8)
DAMAGED = {
    "object array": (entries(data=np.array([[None] * 3072] * COUNT)), "dtype 'O8'|no pickle"),
    "float array": (entries(data=PIXELS.astype(np.float32)), "data of dtype 'f4'; expected uint8"),
    "signed": (entries(data=PIXELS.astype(np.int8)), "data of dtype 'i1'; expected uint8"),
    "structured": (entries(data=np.zeros(COUNT, [("a", "u1", 3072)])), "data of dtype 'V3072'"),
    "huge dtype": (with_state(1, (COUNT, 3072), np.dtype("V2147483647"), False, b""), "dtype 'V2147483647'"),
    "fewer images": (entries(data=PIXELS[:-1]), r"data of shape \(19, 3072\); expected \(20, 3072\)"),
    "larger images": (entries(data=np.zeros((COUNT, 3073), np.uint8)), r"data of shape \(20, 3073\)"),
    "flat": (entries(data=PIXELS.ravel()), r"data of shape \(61440,\)"),
    "shape of floats": (with_state(1, (20.0, 3072.5), BYTES, False, PIXELS.tobytes()), "no pickle|of shape"),
    "a shape that lies": (
        with_state(1, (COUNT, 3072), BYTES, False, b"\0" * 9),
        "has 9 bytes of pixels; expected 61440",
    ),
    "a shape without bytes": (with_state(1, (COUNT, 3072), BYTES, False, [0] * 61440), "has no bytes of pixels"),
    "a negative shape": (
        with_state(1, (-COUNT, -3072), BYTES, False, PIXELS.tobytes()),
        r"data of shape \(-20, -3072\)",
    ),
    "an order that is none": (
        with_state(1, (COUNT, 3072), BYTES, 1, PIXELS.tobytes()),
        "whose order is 1; expected True",
    ),
    "a dtype of two lines": (
        with_state(1, (COUNT, 3072), Calls(np.dtype, "u1\n", False, True), False, b""),
        r"'u1\\n'",
    ),
    "a state too short": (with_state(1, (COUNT, 3072)), "data that are no array"),
    "a dtype that is none": (with_state(1, (COUNT, 3072), 7, False, PIXELS.tobytes()), "data that are no array"),
    "a list for pixels": (entries(data=[[0] * 3072] * COUNT), "data that are no array"),
    "no pixels": (pickle.dumps({"labels": LABELS}), "no entry 'data'"),
    "no labels": (pickle.dumps({"data": PIXELS}, 4), "no entry 'labels'"),
    "fewer labels": (entries(labels=LABELS[:-1]), "has 19 labels; expected 20"),
    "no label at all": (entries(labels=[]), "has 0 labels; expected 20"),
    "label too large": (entries(labels=[*LABELS[:-1], 10]), "holds label 10; expected labels 0 to 9"),
    "label below zero": (entries(labels=[*LABELS[:-1], -1]), "holds label -1; expected labels 0 to 9"),
    "label beyond a byte": (entries(labels=[*LABELS[:-1], 2**70]), f"holds label {2**70}; expected labels 0 to 9"),
    "labels of words": (entries(labels=["cat"] * COUNT), "labels that are no list of whole numbers"),
    "labels of booleans": (entries(labels=[True] * COUNT), "labels that are no list of whole numbers"),
    "labels as an array": (entries(labels=np.array(LABELS)), "labels that are no list of whole numbers"),
    "a list": (pickle.dumps([PIXELS, LABELS], 4), "holds a list; expected a dict"),
    "a number": (pickle.dumps(7), "holds a int; expected a dict"),
    "empty": (b"", "no pickle of images and labels, or a damaged one"),
    "words": (b"<html>not found</html>", "no pickle"),
    "half": (entries()[:30_000], "no pickle"),
    "all but the last byte": (entries()[:-1], "no pickle"),
    "a memo that asks for memory": (b"\x80\x02}r\xff\xff\xff\x7f.", "no pickle.* it has an entry numbered 2147483647"),
    "an entry of a negative number": (b"}p-5\n.", "no pickle"),
    "bytes that are not there": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "no pickle"),
    "a key that is a list": (b"\x80\x02}]K\x01s.", "no pickle"),
    "nested deeply": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    path = tmp_path / "data_batch_2"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message) as caught:
        cifar.read_pickled(path, COUNT, 3072, "labels", 10)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_truncated_anywhere_is_one_line(tmp_path: Path) -> None:
    whole = python_2(PIXELS, "labels", LABELS)
    path = tmp_path / "data_batch_3"
    path.write_bytes(whole)
    pixels, labels = cifar.read_pickled(path, COUNT, 3072, "labels", 10)
    assert pixels.shape == (COUNT, 3072)
    assert labels.tolist() == LABELS
    for length in (*range(0, 260, 7), *range(len(whole) - 400, len(whole), 7)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="data_batch_3") as caught:
            cifar.read_pickled(path, COUNT, 3072, "labels", 10)
        assert "\n" not in str(caught.value)


def test_one_file_does_not_change_how_the_next_is_read(tmp_path: Path) -> None:
    """A pickle may set attributes of what it is handed; that must be nothing that others are handed as well."""
    hostile, whole = tmp_path / "hostile", tmp_path / "whole"
    change = b"}U\x0c__setstate__K\x01sb"
    hostile.write_bytes(
        b"\x80\x02cnumpy\ndtype\n" + change + b"0cnumpy.core.multiarray\n_reconstruct\n" + change + b"."
    )
    whole.write_bytes(entries())
    for _ in range(2):
        with pytest.raises(DataError):
            cifar.read_pickled(hostile, COUNT, 3072, "labels", 10)
        assert cifar.read_pickled(whole, COUNT, 3072, "labels", 10)[0].shape == (COUNT, 3072)


def test_the_published_files_use_no_other_instructions() -> None:
    """Those of `python_2` are those of the files that are to be had, which none of these tests may fetch."""
    used = {opcode.name for opcode, *_ in pickletools.genops(python_2(PIXELS, "labels", LABELS))}
    assert used <= cifar.OPCODES
    assert {"SHORT_BINSTRING", "BINSTRING", "GLOBAL", "REDUCE", "BUILD", "BINPUT"} <= used
