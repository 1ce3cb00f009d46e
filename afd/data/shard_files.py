"""Tar shards as files: local ones, copies of those at URLs, and the index of each, which is made once."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from afd.data import decoding, fetch
from afd.data.decoding import ENDINGS, BadImageError
from afd.data.sources import TOLD, named
from afd.errors import DataError, in_a_line
from afd.files import write_whole

LABELS = ("label", "cls", "class")
KEPT = 24  # shards from URLs that stay on the disk
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


def remote(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be read: {in_a_line(error)}") from error
    return system, path


def is_there(shard: str) -> bool:
    """Whether there is such a file.

    Raises:
        DataError: nobody can say.
    """
    if "://" not in shard:
        return Path(shard).expanduser().is_file()
    system, path = remote(shard)
    try:
        return bool(system.isfile(path))
    except Exception as error:  # whatever a store, or the way there, has against it
        raise DataError(f"{shard} cannot be read: {in_a_line(error)}") from error


def _cache() -> Path:
    folder = fetch.default_root() / "shards"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache folder {folder}, where indexes of shards are kept, cannot be made: {error.strerror}; "
            "XDG_CACHE_HOME names another place"
        ) from error
    return folder


def local(shard: str) -> Path:
    """The file of a shard; of one at a URL, a copy, which is fetched where it is not there.

    Several processes may ask: a copy appears whole, and one that another process is reading may be removed under it.
    """
    if "://" not in shard:
        return Path(shard).expanduser()
    folder = _cache()
    copy = folder / f"{hashlib.sha256(shard.encode()).hexdigest()[:32]}.tar"
    try:
        os.utime(copy)  # the newest, of those that are there
    except FileNotFoundError:
        system, path = remote(shard)
        part = folder / f"{copy.name}.{os.getpid()}.part"
        try:
            system.get_file(path, str(part))
            part.replace(copy)
        except Exception as error:  # whatever a store, or the way there, has against it
            part.unlink(missing_ok=True)
            raise BadImageError(f"its shard cannot be fetched: {in_a_line(error)}") from error
        _forget_oldest(folder)
    return copy


def _forget_oldest(folder: Path) -> None:
    aged = []
    for one in folder.glob("*.tar"):
        try:
            aged.append((one.stat().st_mtime, one))
        except FileNotFoundError:  # another process was quicker
            continue
    for _, one in sorted(aged)[:-KEPT]:
        one.unlink(missing_ok=True)


# --- The index of a shard ---------------------------------------------------------------------------------------------


def index_of(shard: str) -> dict[str, Any]:
    """Names, places, sizes and labels of a shard's images: made when it is first met, and kept in the cache folder."""
    try:
        state = _state(shard)
    except Exception as error:  # whatever a store, or the way there, has against it
        raise DataError(f"{shard} cannot be read: {in_a_line(error)}") from error
    file = _cache() / f"{hashlib.sha256(f'2 {state}'.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(file, allow_pickle=False) as kept:
            return dict(kept)
    except Exception:  # it is not there, or damaged, in whatever way numpy and zipfile stumble over
        found = _indexed(shard)
    content = io.BytesIO()
    np.savez(content, **found)
    write_whole(file, content.getbuffer())
    return found


def _state(shard: str) -> str:
    """What changes with the content of a shard: its length and time."""
    if "://" not in shard:
        known = Path(shard).expanduser().stat()
        return f"{Path(shard).expanduser().resolve()} {known.st_size} {known.st_mtime_ns}"
    system, path = remote(shard)
    told = system.info(path)
    return f"{shard} {told.get('size')} {told.get('ETag') or told.get('mtime') or told.get('created') or ''}"


def _indexed(shard: str) -> dict[str, Any]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    sizes, problems = dict[str, tuple[int, int]](), dict[str, str]()
    try:
        path = local(shard)
        length = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(6)
            packed = next((kind for start, kind in PACKED.items() if start == begin[: len(start)]), "")
        if packed:
            raise DataError(
                f"the shard {shard} is packed ({packed}); unpack it, so that images can be read at any place"
            )
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            for member in archive:
                key, ending = _key_of(member.name)
                if ending not in (*ENDINGS, ".cls", ".json") or member.isdir():
                    continue
                if not member.isfile():
                    raise DataError(f"{member.name} in the shard {shard} is a link; write files themselves into it")
                if member.offset_data + member.size > length:
                    raise DataError(f"the shard {shard} is cut short in {member.name}")
                file.seek(member.offset_data)
                content = file.read(member.size)
                if ending in (".cls", ".json"):
                    _note_label(labels, key, ending, content, f"{member.name} in the shard {shard}")
                    continue
                if key in images:
                    raise DataError(
                        f"the shard {shard} holds {images[key].name} and {member.name}, two images of one sample: all "
                        "that is called alike up to the first dot is one"
                    )
                images[key] = member
                try:
                    sizes[key] = decoding.size_of(io.BytesIO(content))
                except BadImageError as error:
                    sizes[key], problems[key] = (0, 0), str(error)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # by which an archive ends
                raise DataError(f"the shard {shard} is cut short behind {len(images)} images")
    except (OSError, tarfile.TarError, BadImageError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the shard {shard} cannot be read: {in_a_line(error)}") from error
    if not images:
        raise DataError(f"the shard {shard} holds no {TOLD} files (a sample's name has no dot but before its ending)")
    if lost := [key for key in images if key not in labels]:
        raise DataError(
            f"the shard {shard} has no class of {named(lost)}; it is read from a member of that name in .cls or .json"
        )
    keys = list(images)
    damaged = [place for place, key in enumerate(keys) if key in problems]
    return {
        "name": np.array([images[key].name for key in keys]),
        "offset": np.array([images[key].offset_data for key in keys], dtype=np.int64),
        "length": np.array([images[key].size for key in keys], dtype=np.int64),
        "size": np.array([sizes[key] for key in keys], dtype=np.int32).reshape(-1, 2),
        "label": np.array([labels[key] for key in keys]),
        "damaged": np.array(damaged, dtype=np.int64),
        "reason": np.array([problems[keys[place]] for place in damaged], dtype=np.str_),
    }


def _key_of(name: str) -> tuple[str, str]:
    """What a member is called up to its first dot, and the rest; of a hidden one, nothing is the rest."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{ending.lower()}" if stem else ""


def _note_label(labels: dict[str, str], key: str, ending: str, content: bytes, told: str) -> None:
    """Keeps the class that a member says; one in .cls goes before what a .json says of it, which may be nothing."""
    try:
        found: Any = content.decode().strip() if ending == ".cls" else json.loads(content)
    except ValueError as error:
        raise DataError(f"{told} cannot be read: {in_a_line(error)}") from error
    if isinstance(found, dict):
        found = next((found[one] for one in LABELS if one in found), None)
        if found is None:
            return
    if isinstance(found, bool) or not isinstance(found, (int, str)) or found == "":
        raise DataError(f"{told} names no class, but {found!r}; it must be a number or a name")
    if ending == ".cls" or key not in labels:
        labels[key] = str(found)
