"""Checkpoints: one file of plain tensors and JSON metadata, written so that a failure never costs the previous one."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from afd._version import __version__
from afd.errors import AfdError

FORMAT = "afd-checkpoint"
VERSION = 1


class CheckpointError(AfdError):
    """A checkpoint that cannot be written or read; the message names the file and the reason."""


def save_checkpoint(path: Path, state: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes beside the target, flushes to disk, then renames: the file at `path` is always a whole one.

    Args:
        path: file to write; its folder is made.
        state: state_dicts by name, of tensors and plain containers only.
        metadata: anything JSON can hold.

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_whole(path, buffer.getbuffer())
    except OSError as error:
        kept = "; the previous checkpoint is untouched" if path.exists() else ""
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror or error}{kept}") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads (state, metadata); needs no code from the file (``weights_only=True``).

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is no checkpoint of this version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not look at the checksums
                raise zipfile.BadZipFile(f"checksum mismatch in {damaged}")
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged or of another kind: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an afd checkpoint")
    if content["version"] != VERSION:
        raise CheckpointError(f"checkpoint {path} has format version {content['version']}; this afd reads {VERSION}")
    return content["state"], json.loads(content["metadata"])


def _replace_whole(path: Path, content: memoryview) -> None:
    """Puts `content` at `path` in one step, or leaves everything as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
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
