"""Checkpoints: the file format, and the manager of a run's folder of them.

One file of plain tensors and JSON metadata, written so that a failure never costs the previous one: what torch.save
writes, with a digest of all of it as the archive's comment. torch and zip tools open it, and here one changed byte,
wherever it is, is one too many.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from afd._version import __version__
from afd.errors import AfdError
from afd.files import FileError, FolderError, FolderLock, write_whole

FORMAT = "afd-checkpoint"
VERSION = 2
DIGEST_SIZE = hashlib.sha256().digest_size


class CheckpointError(AfdError):
    """A checkpoint that cannot be written or read; the message names the file and the reason."""


class OtherFileError(CheckpointError):
    """A file that torch reads, but no checkpoint of ours: weights alone, perhaps."""


def save_checkpoint(
    path: Path | str, state: dict[str, Any], metadata: dict[str, Any], previous: Path | None = None
) -> None:
    """Writes beside the target, flushes to disk, then renames: the file at `path` is always a whole one.

    Args:
        path: file to write; its folder is made.
        state: state_dicts by name, of tensors and plain containers only; NumPy numbers become Python's.
        metadata: anything JSON can hold, and NumPy numbers.
        previous: where to keep what was at `path`; None to let it go.

    Raises:
        CheckpointError: there is something in it that `load_checkpoint` could not read, and which the message names; or
            the file cannot be written (a full disk, say), and what was at `path` is still there.
    """
    content = packed(state, metadata)
    try:
        write_whole(path, content, previous)
    except (FileError, FolderError) as error:
        kept = "; the previous checkpoint is untouched" if Path(path).exists() else ""
        reason = str(error).removeprefix(f"cannot write {path}: ")
        raise CheckpointError(f"cannot write checkpoint {path}: {reason}{kept}") from error


def packed(state: dict[str, Any], metadata: dict[str, Any]) -> memoryview:
    """The bytes of a checkpoint file.

    Raises:
        CheckpointError: `load_checkpoint` could not read them; the message names the entry.
    """
    try:
        described = {"afd": __version__, "torch": torch.__version__, **_jsonable(metadata, "")}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "state": _readable(state, ""),
            "metadata": json.dumps(described),
        }
    except RecursionError as error:
        raise CheckpointError("a dict or list holds itself, or too many in each other, for a checkpoint") from error
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _add_digest(buffer)
    return buffer.getbuffer()


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads (state, metadata); needs no code from the file (``weights_only=True``).

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is no checkpoint of this version.
    """
    path = Path(path)
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    sound = hashlib.sha256(whole[:-DIGEST_SIZE]).digest() == whole[-DIGEST_SIZE:]
    try:
        content = torch.load(io.BytesIO(whole), map_location=device, weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler stumbles in any way it can
        told = isinstance(error, RuntimeError | pickle.UnpicklingError | zipfile.BadZipFile)
        reason = str(error).splitlines()[0] if told and str(error) else "torch.save has not written what it holds"
        if "weights_only" in reason:  # torch's advice to load it without is none for a file of which nothing is known
            reason = "it holds something else than tensors and plain types, which is not loaded, as that may run code"
        raise CheckpointError(f"checkpoint {path} is damaged or of another kind: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise OtherFileError(f"{path} is not an afd checkpoint")
    if content["version"] != VERSION:
        raise CheckpointError(f"checkpoint {path} has format version {content['version']}; this afd reads {VERSION}")
    if not sound:
        raise CheckpointError(f"checkpoint {path} is damaged: its checksum does not match its content")
    return content["state"], json.loads(content["metadata"])


def _add_digest(archive: io.BytesIO) -> None:
    """Appends SHA-256 of the archive as its comment, whose length stands in the last two bytes of a zip file."""
    archive.seek(-2, io.SEEK_END)
    archive.write(struct.pack("<H", DIGEST_SIZE))
    archive.write(hashlib.sha256(archive.getbuffer()).digest())


def _readable(value: Any, name: str) -> Any:
    """`value` as it can be read again without running code from the file; the same object where it is so already."""
    kind = type(value)
    if isinstance(value, np.generic):
        value = _number(value, name)
    elif kind in (dict, OrderedDict):
        items = {
            _readable(key, f"{name}, key {key!r}"): _readable(one, _inside(name, key)) for key, one in value.items()
        }
        if any(
            a is not b for pair in zip(items.items(), value.items(), strict=True) for a, b in zip(*pair, strict=True)
        ):
            copy = kind(items)
            getattr(copy, "__dict__", {}).update(getattr(value, "__dict__", {}))  # a state_dict's _metadata
            value = copy
    elif kind in (list, tuple):
        parts = [_readable(one, _inside(name, number)) for number, one in enumerate(value)]
        if any(a is not b for a, b in zip(parts, value, strict=True)):
            value = kind(parts)
    elif kind in (Tensor, torch.nn.Parameter) and not vars(value):  # without attributes, which would be saved, too
        pass
    elif kind not in (str, int, float, bool, type(None)) and not _survives(value):
        raise CheckpointError(
            f"{name} is {_told(value)}, which a checkpoint cannot hold; it takes tensors, numbers, strings, and dicts "
            "and lists of them"
        )
    return value


def _survives(value: Any) -> bool:
    """Whether something that is no plain container comes back when a checkpoint is read."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception:  # whatever its own way of being saved raises
        return False
    return True


def _jsonable(value: Any, name: str) -> Any:
    """`value` in JSON's terms."""
    if isinstance(value, np.generic):
        value = _number(value, name)
    if isinstance(value, Mapping):
        return {_json_key(key, name): _jsonable(one, _inside(name, key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one, _inside(name, number)) for number, one in enumerate(value)]
    if not isinstance(value, str | int | float | bool | None):
        raise CheckpointError(
            f"{name} is {_told(value)}, which a checkpoint cannot hold; what describes a run is numbers, strings, and "
            "dicts and lists of them"
        )
    return value


def _json_key(key: Any, name: str) -> Any:
    """A dict's key, of which JSON will make a string."""
    if not isinstance(key, str | int | float | np.generic | None):
        raise CheckpointError(f"{name or 'metadata'} has the key {key!r}, which is {_told(key)}; it must be a string")
    return _number(key, name) if isinstance(key, np.generic) else key


def _number(value: np.generic, name: str) -> Any:
    """Python's number for one of NumPy's."""
    plain = value.item()
    if not isinstance(plain, str | bytes | int | float | bool | complex):
        raise CheckpointError(f"{name} is {_told(value)}, which a checkpoint cannot hold")
    return plain


def _inside(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def _told(value: Any) -> str:
    module = type(value).__module__
    kind = type(value).__qualname__
    return f"a {kind if module == 'builtins' else f'{module}.{kind}'}"


# --- A run's folder of checkpoints ----------------------------------------------------------------------------------


Content = tuple[dict[str, Any], dict[str, Any]]  # state and metadata


class Ranked(Protocol):
    """The report of an epoch, as far as the best one is found by it."""

    @property
    def epoch(self) -> int:
        """Its number."""

    @property
    def rank(self) -> tuple[float, int]:
        """What epochs are compared by."""


R = TypeVar("R", bound=Ranked)


class CheckpointManager:
    """Writes and finds the checkpoints of one run.

    ``last.pt`` is written first. Where it ends an epoch that is the best so far, it is written as ``best.pt``, too; a
    run that is killed between the two makes that up when it is resumed (`settle_best`).

    Args:
        folder: holds ``last.pt``, ``previous.pt`` (what ``last.pt`` was before), ``best.pt`` and, of runs that may go
            back, ``good.pt``.
        warn: told of a checkpoint that is passed over because it is damaged.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.warn, self.lock = folder, warn, FolderLock(folder)
        self.last, self.previous = folder / "last.pt", folder / "previous.pt"
        self.best, self.good = folder / "best.pt", folder / "good.pt"
        self.newest: Path | None = None  # of this process: what was written or read last
        self._written: tuple[int, int] | None = None  # which file ``last.pt`` was then

    @property
    def present(self) -> list[Path]:
        """The checkpoints that there are."""
        return [path for path in (self.last, self.previous, self.best, self.good) if path.exists()]

    def check_free(self, resume: Path | str | None, overwrite: bool) -> None:
        """Finds the folder free for a run that begins.

        Args:
            resume: what it goes on from: a checkpoint, "auto" for the newest in the folder, or None.
            overwrite: whether it may discard the checkpoints of another run.

        Raises:
            FolderError: it may not, and the folder holds checkpoints whose newest is not the one that is gone on from.
        """
        if overwrite or resume == "auto" or not self.present:
            return
        if resume is None or Path(resume).resolve() != self.present[0].resolve():
            raise FolderError(
                f"folder is {self.folder}, which holds the checkpoints of a run; go on with it by resume='auto', name "
                "another folder, or discard it with overwrite=True"
            )

    def check_untouched(self) -> None:
        """Raises FolderError if another run has written to the folder since this one did."""
        if self._written is not None and self._written != _identity(self.last):
            raise FolderError(f"another run has written to {self.folder} since this one did; name another folder")

    def discard(self) -> None:
        """Removes the checkpoints that there are."""
        for path in reversed(self.present):
            path.unlink()

    def save(self, state: dict[str, Any], metadata: dict[str, Any], *, best: bool) -> None:
        """Writes ``last.pt`` and, if it is the best so far, ``best.pt``.

        Raises:
            CheckpointError: a file cannot be written.
            FolderError: the folder has been removed, or is another run's now.
        """
        self.lock.check()
        save_checkpoint(self.last, state, metadata, self.previous)
        self.newest, self._written = self.last, _identity(self.last)
        if best:
            save_checkpoint(self.best, state, metadata)

    def keep_good(self) -> None:
        """Keeps ``last.pt`` as ``good.pt``, for a run to go back to; raises CheckpointError if it cannot be written."""
        save_checkpoint(self.good, *load_checkpoint(self.last))

    def load_good(self) -> Content | None:
        """What ``good.pt`` holds, if it is there and whole."""
        if not self.good.exists():
            return None
        try:
            return load_checkpoint(self.good)
        except CheckpointError as error:
            self.warn(f"{error}; it is passed over")
            return None

    def load_named(self, resume: Path | str, device: torch.device) -> Content | None:
        """What a run goes on from: the checkpoint at a path or, with "auto", `load_newest`."""
        return self.load_newest(device) if resume == "auto" else self.load(Path(resume), device)

    def load(self, path: Path, device: torch.device) -> Content:
        """What a checkpoint holds.

        Raises:
            CheckpointError: it cannot be read.
        """
        content = load_checkpoint(path, device)
        self.newest = path
        return content

    def load_newest(self, device: torch.device) -> Content | None:
        """The newest whole checkpoint, or None where there has been none.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        present = [path for path in (self.last, self.previous) if path.exists()]
        for path in present:
            try:
                return self.load(path, device)
            except CheckpointError as error:
                failure = error
                self.warn(f"{error}; trying the one before")
        if present:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; the last failure: {failure}")
        if self.best.exists():
            raise CheckpointError(f"there is no checkpoint to go on from in {self.folder}, which holds best.pt only")
        return None

    def settle_best(self, history: Sequence[R], read: Callable[[dict[str, Any]], R]) -> R | None:
        """Makes ``best.pt`` hold the best epoch of a run that is gone on with, and returns that epoch's report.

        Its weights are those of the file itself, of the checkpoint that is gone on from or the one before it, if that
        epoch was its last, or of the best one beside these (of a run that goes on in another folder).

        Args:
            history: of the run until the checkpoint that was read.
            read: a report out of a checkpoint's metadata.

        Returns:
            None where there are no weights of a whole epoch.
        """
        resumed = self.newest
        if not history or resumed is None:
            return None
        wanted = max(history, key=lambda report: report.rank)
        found: dict[Path, R] = {}
        for path in dict.fromkeys((self.best, resumed, self.previous, resumed.with_name(self.best.name))):
            entry = self._epoch_at_its_end(path)
            report = None if entry is None else read(entry)
            # best.pt may be ahead: of an epoch after the checkpoint, which is going to be trained once more
            if report is not None and (path == self.best or report in history):
                found[path] = report
                if report.rank >= wanted.rank:
                    break
        if not found:
            self.warn(f"the weights of epoch {wanted.epoch}, the best until now, are in none of the checkpoints")
            return None
        path = max(found, key=lambda path: found[path].rank)
        if path != self.best:
            save_checkpoint(self.best, *load_checkpoint(path))
        if found[path].rank < wanted.rank:
            self.warn(
                f"the weights of epoch {wanted.epoch}, the best until now, are in none of the checkpoints; the best of "
                f"which there are is epoch {found[path].epoch}"
            )
        return found[path]

    def _epoch_at_its_end(self, path: Path) -> dict[str, Any] | None:
        """The report of the epoch whose end a checkpoint is; None where it is none's."""
        if not path.exists():
            return None
        try:
            _, metadata = load_checkpoint(path)
        except CheckpointError as error:
            self.warn(f"{error}; it is passed over")
            return None
        ends = metadata["history"] and metadata["position"]["batch"] == 0
        return dict(metadata["history"][-1]) if ends else None


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one that has taken its place."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
