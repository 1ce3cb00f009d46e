"""What an evaluation has found so far, on disk: one file a unit of work, so that a killed run goes on where it was."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.errors import AfdError
from afd.files import make_folder, write_whole

FINGERPRINT = "run.json"


class StateError(AfdError):
    """The state of an evaluation cannot be read, or belongs to another one."""


@dataclass(frozen=True)
class Unit:
    """What one run of one attack on one batch found.

    Attributes:
        rows: positions in the batch of the images that were broken, int64 [M].
        images: their adversarial images [M, ...], float32, exactly as the model was shown them.
        lengths: distance of each from its original, float64 [M].
        attacked: how many images were attacked.
        illegal: how many came back outside of the ball or of [0, 1], or not finite; none of these counts as broken.
        counts: whatever else was counted, by name.
        seconds: how long it took.
    """

    rows: Tensor
    images: Tensor
    lengths: Tensor
    attacked: int
    illegal: int
    counts: dict[str, int]
    seconds: float


class Store:
    """The units of one evaluation in a folder.

    Args:
        folder: where they lie; made if need be.
        fingerprint: what makes this run this run: subject, data, protocol, seed, batch size.

    Raises:
        StateError: the folder holds the state of a run with another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        make_folder(folder)
        wanted = json.dumps(fingerprint, indent=1, sort_keys=True)
        path = folder / FINGERPRINT
        if not path.exists():
            write_whole(path, wanted)
        elif (found := json.loads(path.read_text())) != json.loads(wanted):
            differing = sorted(key for key in {*found, *fingerprint} if found.get(key) != json.loads(wanted).get(key))
            raise StateError(
                f"{folder} holds an unfinished evaluation that differs in {', '.join(differing)}; "
                "run it with the same options, name another folder with --out, or discard it with --overwrite"
            )

    def load(self, key: str) -> Unit | None:
        """The unit of that key, or None if it has not been done.

        Raises:
            StateError: its file is damaged.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return Unit(**torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise StateError(f"{path} is damaged ({error}); delete it, and what it held is computed again") from error

    def save(self, key: str, unit: Unit) -> None:
        """Writes a unit's file, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        content = io.BytesIO()
        torch.save({name: _cpu(value) for name, value in vars(unit).items()}, content)
        write_whole(self._path(key), content.getbuffer())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
