"""Fetching: through the real downloader, from a server on this machine, or from nowhere at all."""

from __future__ import annotations

import functools
import hashlib
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from afd.data import DataError, cifar, datasets, fetch, load
from afd.errors import InputError

Write = Callable[..., Path]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address on this machine where its files can be fetched."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def small_mnist(served: tuple[Path, str], write_mnist: Write, monkeypatch: pytest.MonkeyPatch) -> fetch.Source:
    """A small MNIST on the server, where `load` fetches it."""
    folder, url = served
    write_mnist(folder, ".gz")
    source = replace(datasets.MNIST, url=url, md5={name: md5(folder / name) for name in datasets.MNIST.md5})
    monkeypatch.setattr(datasets, "MNIST", source)
    return source


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, arcname=folder.name)
    return archive


@pytest.fixture
def small_archive(
    served: tuple[Path, str], write_cifar: Write, small_cifar: dict[str, cifar.Layout], monkeypatch: pytest.MonkeyPatch
) -> cifar.Layout:
    """A small CIFAR-100 archive on the server, where `load` fetches it."""
    folder, url = served
    archive = pack(write_cifar(folder / "cifar-100-binary", "cifar100"), folder / "cifar-100-binary.tar.gz")
    source = replace(cifar.CIFAR100.source, url=url, md5={archive.name: md5(archive)})
    layout = replace(small_cifar["cifar100"], source=source)
    monkeypatch.setitem(datasets.READERS, "cifar100", layout.read)
    return layout


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("download", [True, False])
def test_without_a_network(tmp_path: Path, no_network: None, name: str, download: bool) -> None:
    with pytest.raises(DataError) as caught:
        load(name, tmp_path, download=download)
    message = str(caught.value)
    source = {"mnist": datasets.MNIST, "cifar10": cifar.CIFAR10.source, "cifar100": cifar.CIFAR100.source}[name]
    for file in source.files:
        assert file in message
    assert str(tmp_path) in message
    assert f"put the files into {tmp_path / source.folders[0]}" in message
    assert "--data-root" in message
    assert "allow the network" in message
    assert source.url in message
    if not download:
        assert "downloading is switched off" in message
    assert contents(tmp_path) == set()


def test_a_root_that_cannot_be_written(tmp_path: Path, no_network: None) -> None:
    root = tmp_path / "file"
    root.write_text("not a folder")
    with pytest.raises(DataError, match=r"^data-root is .*file, which is a file; it must be a folder$"):
        load("mnist", root)


def test_a_mistaken_root_is_not_made(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(DataError, match="could not be fetched"):
        load("mnist", tmp_path / "mistaken" / "root")
    assert list(tmp_path.iterdir()) == []


def test_a_root_below_a_file_or_too_long_is_said_so(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"below, but .*file is a file; it must be a folder$"):
        load("cifar10", tmp_path / "file" / "below")
    for name in ("mnist", "cifar10"):
        with pytest.raises(InputError, match="File name too long"):
            load(name, tmp_path / ("x" * 300))


def test_checksums_are_of_the_published_files() -> None:
    for source in (datasets.MNIST, cifar.CIFAR10.source, cifar.CIFAR100.source):
        assert source.url.startswith("https://")
        assert source.url.endswith("/")
        assert all(len(value) == 32 for value in source.md5.values())


def test_default_root_is_the_cache(tmp_path: Path, write_mnist: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "default_root", lambda: tmp_path)
    write_mnist(tmp_path / "mnist")
    assert len(load("mnist", download=False).test) == 20


def test_fetches_mnist_once(tmp_path: Path, small_mnist: fetch.Source, request: pytest.FixtureRequest) -> None:
    root = tmp_path / "new" / "root"
    assert len(load("mnist", root).test) == 20
    assert contents(root) == {"mnist", *(f"mnist/{name}" for name in small_mnist.md5)}
    request.getfixturevalue("no_network")
    assert len(load("mnist", root).test) == 20


def test_fetches_only_what_is_missing(tmp_path: Path, small_mnist: fetch.Source, write_mnist: Write) -> None:
    home = write_mnist(tmp_path / "root" / "mnist")
    (home / "t10k-images-idx3-ubyte").unlink()
    kept = home / "train-images-idx3-ubyte"
    before = kept.stat().st_mtime_ns
    assert len(load("mnist", tmp_path / "root").test) == 20
    assert kept.stat().st_mtime_ns == before
    assert contents(home) == {*datasets.MNIST.files, "t10k-images-idx3-ubyte.gz"} - {"t10k-images-idx3-ubyte"}


def test_wrong_checksum_is_refused(tmp_path: Path, served: tuple[Path, str], small_mnist: fetch.Source) -> None:
    path = served[0] / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    root = tmp_path / "root"
    with pytest.raises(
        DataError, match=r"(?s)could not be fetched: .*t10k-labels-idx1-ubyte\.gz.*does not match"
    ) as caught:
        load("mnist", root)
    assert "put the files into" in str(caught.value)
    assert contents(root) == set()


def test_failed_download_leaves_nothing(tmp_path: Path, served: tuple[Path, str], small_mnist: fetch.Source) -> None:
    (served[0] / "t10k-labels-idx1-ubyte.gz").unlink()
    root = tmp_path / "root"
    with pytest.raises(DataError, match="404"):
        load("mnist", root)
    assert contents(root) == set()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_interruption_leaves_nothing(
    tmp_path: Path, small_archive: cifar.Layout, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise interruption

    monkeypatch.setattr(tarfile.TarFile, "extractall", interrupt)
    root = tmp_path / "root"
    with pytest.raises(interruption):
        load("cifar100", root)
    assert contents(root) == set()


def test_connection_that_breaks_off(tmp_path: Path, small_mnist: fetch.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(handler: Quiet) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"\x1f\x8b")

    monkeypatch.setattr(Quiet, "do_GET", half)
    root = tmp_path / "root"
    with pytest.raises(DataError, match="could not be fetched"):
        load("mnist", root)
    assert contents(root) == set()


def test_fetches_and_unpacks_an_archive(tmp_path: Path, small_archive: cifar.Layout) -> None:
    root = tmp_path / "root"
    splits = load("cifar100", root)
    assert len(splits.test) == 200
    assert contents(root) == {"cifar-100-binary", "cifar-100-binary/train.bin", "cifar-100-binary/test.bin"}


def test_unpacks_an_archive_that_is_there(
    tmp_path: Path, served: tuple[Path, str], small_archive: cifar.Layout, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("no_network")
    root = tmp_path / "root"
    root.mkdir()
    (root / "cifar-100-binary.tar.gz").write_bytes((served[0] / "cifar-100-binary.tar.gz").read_bytes())
    assert len(load("cifar100", root, download=False).test) == 200
    assert (root / "cifar-100-binary.tar.gz").is_file()


def test_a_damaged_archive_that_is_there(tmp_path: Path, small_archive: cifar.Layout) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "cifar-100-binary.tar.gz").write_bytes(b"half an archive")
    with pytest.raises(DataError, match=r"cifar-100-binary\.tar\.gz has md5 [0-9a-f]{32}; expected [0-9a-f]{32}"):
        load("cifar100", root)
    assert contents(root) == {"cifar-100-binary.tar.gz"}


def serve(archive: Path, layout: cifar.Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    source = replace(layout.source, md5={archive.name: md5(archive)})
    monkeypatch.setitem(datasets.READERS, "cifar100", replace(layout, source=source).read)


def test_an_archive_cannot_write_elsewhere(
    tmp_path: Path, served: tuple[Path, str], small_archive: cifar.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = served[0] / "cifar-100-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("../../escaped.bin")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    serve(archive, small_archive, monkeypatch)
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"could not be fetched: .*escaped\.bin"):
        load("cifar100", root)
    assert contents(root) == set()
    assert not list(tmp_path.rglob("escaped.bin"))


def test_an_archive_without_the_files(
    tmp_path: Path, served: tuple[Path, str], small_archive: cifar.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    (served[0] / "cifar-100-binary" / "test.bin").unlink()
    serve(pack(served[0] / "cifar-100-binary", served[0] / "cifar-100-binary.tar.gz"), small_archive, monkeypatch)
    with pytest.raises(DataError, match="does not hold all of them"):
        load("cifar100", tmp_path / "root")


def test_reading_needs_no_downloader() -> None:
    """pooch is imported where something is fetched, not by those who only read."""
    code = "import sys, afd.data; afd.data.load('digits'); sys.exit('pooch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
