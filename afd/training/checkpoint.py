"""Checkpoints: one file of plain tensors and JSON metadata, written so that a failure never costs the previous one.

The file is what torch.save writes, with a digest of all of it as the archive's comment: torch and zip tools open it,
and here one changed byte, wherever it is, is one too many.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

from afd._version import __version__
from afd.errors import AfdError

FORMAT = "afd-checkpoint"
VERSION = 2
DIGEST_SIZE = hashlib.sha256().digest_size


class CheckpointError(AfdError):
    """A checkpoint that cannot be written or read; the message names the file and the reason."""


class OtherFileError(CheckpointError):
    """A file that torch reads, but no checkpoint of ours: weights alone, perhaps."""


def save_checkpoint(path: Path, state: dict[str, Any], metadata: dict[str, Any], previous: Path | None = None) -> None:
    """Writes beside the target, flushes to disk, then renames: the file at `path` is always a whole one.

    Args:
        path: file to write; its folder is made.
        state: state_dicts by name, of tensors and plain containers only.
        metadata: anything JSON can hold.
        previous: where to keep what was at `path`; None to let it go.

    Raises:
        CheckpointError: the file cannot be written (a full disk, say); what was at `path` is still there.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "state": state,
        "metadata": json.dumps({"afd": __version__, "torch": torch.__version__, **metadata}),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _add_digest(buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_whole(path, buffer.getbuffer(), previous)
    except OSError as error:
        kept = "; the previous checkpoint is untouched" if path.exists() else ""
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror or error}{kept}") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads (state, metadata); needs no code from the file (``weights_only=True``).

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is no checkpoint of this version.
    """
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
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


def _replace_whole(path: Path, content: memoryview, previous: Path | None) -> None:
    """Puts `content` at `path` in one step, or leaves everything as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
