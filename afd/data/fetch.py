"""Finding a dataset's files on disk, fetching them by checksum where they are missing, and reading their bytes."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from afd.errors import DataError
from afd.files import check_target
from afd.installation import needed_by


@dataclass(frozen=True)
class Source:
    """Where the files of a dataset are, on disk and on the network.

    Attributes:
        name: the dataset's name.
        files: what must be there; each may also be there gzip-packed, with .gz added to its name.
        folders: where inside the data root to look besides the root itself; fetched files go to the first.
        url: the address that the names in `md5` are added to.
        md5: what to fetch, with its checksum: the files with .gz added, or a .tar.gz of `folders[0]`.
        instead: what else in the data root would do, in words.
    """

    name: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    url: str
    md5: Mapping[str, str]
    instead: str = ""


def default_root() -> Path:
    """The user's cache folder of this library."""
    with needed_by("the cache folder of data sets (name a folder of yours with --data-root, or root= in Python)"):
        import pooch

    return Path(pooch.os_cache("afd"))


def which(sources: Sequence[Source], root: Path) -> Source:
    """Of several sources of one dataset, the first that `root` has the files of, else the archive; else the first."""
    whole = (one for one in sources if any(_present(one, folder) for folder in _places(one, root)))
    packed = (one for one in sources if all((root / name).is_file() for name in one.md5))
    return next(chain(whole, packed, sources))


def locate(source: Source, root: Path, *, download: bool) -> list[Path]:
    """Paths of a dataset's files, in the order of `source.files`, all from one folder.

    Looks in `root` and in the source's folders inside it. Where no folder has all files, the missing ones of the first
    of those folders are added to it: from the archive, if it lies in `root`, else from the network. What is there
    already is never replaced.

    Raises:
        DataError: files are missing and could not be fetched, or what was fetched has another checksum.
    """
    _check_root(root)
    home = root / source.folders[0]
    for folder in _places(source, root):
        if (found := _present(source, folder)) is not None:
            return found
    try:
        _obtain(source, root, home, download=download)
    # pooch's own errors: requests raises OSErrors, a wrong checksum is a ValueError.
    except (OSError, ValueError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(_advice(source, root, error)) from error
    found = _present(source, home)
    if found is None:
        raise DataError(_advice(source, root, "what was fetched does not hold all of them"))
    return found


def _check_root(root: Path) -> None:
    """Raises InputError or DataError unless a folder is, or can be, at a data root."""
    check_target("data-root", root)
    found = next((path for path in (root, *root.parents) if path.exists()), root)
    if found.exists() and not found.is_dir():
        told = "which is" if found == root else f"but {found} is"
        raise DataError(f"data-root is {root}, {told} a file; it must be a folder")


def _places(source: Source, root: Path) -> list[Path]:
    """The folders that files may lie in."""
    return [root, *(root / name for name in source.folders)]


def _present(source: Source, folder: Path) -> list[Path] | None:
    """The files in this folder, or None unless all are there."""
    found = [_either(folder, name) for name in source.files]
    paths = [path for path in found if path is not None]
    return paths if len(paths) == len(found) else None


def _either(folder: Path, name: str) -> Path | None:
    """The file as it is or gzip-packed, whichever is there."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _obtain(source: Source, root: Path, home: Path, *, download: bool) -> None:
    """Adds the missing files to `home`.

    Everything is fetched, checked and unpacked in a temporary folder on the same disk and moved only then, whole file
    by whole file: an interruption leaves nothing behind, a root that is not there is made for files only, and processes
    that fetch at the same time do not disturb each other.
    """
    local = [name for name in source.md5 if (root / name).is_file()]
    if not download and len(local) < len(source.md5):
        raise DataError("downloading is switched off")
    nearest = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    with TemporaryDirectory(prefix=".fetch-", dir=nearest) as temporary:
        fetched = Path(temporary)
        for name, md5 in source.md5.items():
            archive = _checked(root / name, md5) if name in local else _retrieve(source.url + name, md5, fetched)
            if name.endswith(".tar.gz"):
                with tarfile.open(archive) as tar:
                    tar.extractall(fetched, filter="data")  # refuses absolute paths, links outwards and devices
        unpacked = fetched / home.name
        for name in source.files:
            path = _either(unpacked, name) or _either(fetched, name)
            if path is not None and _either(home, name) is None:
                home.mkdir(parents=True, exist_ok=True)
                path.replace(home / path.name)


def _retrieve(url: str, md5: str, folder: Path) -> Path:
    with needed_by(f"fetching {url}"):
        import pooch

    name = url.rpartition("/")[2]
    return Path(pooch.retrieve(url, known_hash=f"md5:{md5}", fname=name, path=folder))


def _checked(path: Path, md5: str) -> Path:
    with needed_by(f"checking {path}"):
        import pooch

    found = pooch.file_hash(str(path), alg="md5")
    if found != md5:
        raise DataError(f"{path} has md5 {found}; expected {md5}")
    return path


def _advice(source: Source, root: Path, reason: object) -> str:
    """What is missing, where it was looked for, why it could not be fetched, and the two ways to get it."""
    places = ", ".join(map(str, _places(source, root)))
    reason = " ".join(str(reason).split())
    addresses = ", ".join(source.url + name for name in source.md5)
    home = f"{root / source.folders[0]}{f', or {source.instead} into {root}' if source.instead else ''}"
    return (
        f"the files of {source.name} ({', '.join(source.files)}) are not all in one of {places}, "
        f"and they could not be fetched: {reason}. Either allow the network, so that they come from {addresses}, "
        f"or put the files into {home} "
        f"(for files that lie elsewhere, name their folder with --data-root, or root= in Python)"
    )


def read_bytes(path: Path) -> bytes:
    """All bytes of a file; a name that ends in .gz is unpacked.

    Raises:
        DataError: the file cannot be read, or is not the whole of a gzip file.
    """
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as stream:
            return stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); replace it by a fresh copy") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def check_labels(path: Path, label: int, num_classes: int) -> None:
    """Raises DataError if a file's label, its largest or its least, is not in [0, num_classes)."""
    if not 0 <= label < num_classes:
        raise DataError(f"{path} holds label {label}; expected labels 0 to {num_classes - 1}")
