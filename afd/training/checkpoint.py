"""Checkpoints: one file of plain tensors and JSON metadata, written so that a failure never costs the previous one.

The file is what torch.save writes, with a digest of all of it as the archive's comment: torch and zip tools open it,
and here one changed byte, wherever it is, is one too many.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd._version import __version__
from afd.errors import AfdError
from afd.files import FileError, FolderError, write_whole

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
