"""What an evaluation has found so far, on disk: one file a unit of work, so that a killed run goes on where it was."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.errors import AfdError
from afd.files import write_whole

FINGERPRINT = "run.json"
UNIT = ".pt"


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


class DamagedUnitError(StateError):
    """The file of a unit cannot be read; what it held must be computed again."""


class Store:
    """The units of one evaluation in a folder.

    Args:
        folder: where they lie; made if need be.
        fingerprint: what makes this run this run, in plain JSON: subject, data, protocol, seed, batch size.

    Raises:
        StateError: the folder holds the state of a run with another fingerprint, or one that cannot be read.
        FileError, FolderError: it cannot be written to.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        if not self.check(folder, fingerprint):
            write_whole(folder / FINGERPRINT, json.dumps(fingerprint, indent=1, sort_keys=True))

    @staticmethod
    def check(folder: Path, fingerprint: dict[str, Any]) -> bool:
        """Whether the folder holds units of this evaluation, or may hold some one day.

        Raises:
            StateError: it holds those of another one, or nobody can say of which.
        """
        found = saved_fingerprint(folder)
        if found is None:
            return False
        differing = sorted(key for key in {*found, *fingerprint} if found.get(key) != fingerprint.get(key))
        if differing:
            raise StateError(
                f"{folder} holds an unfinished evaluation that differs in {', '.join(differing)}; "
                "run it with the same options, name another folder with --out, or discard it with --overwrite"
            )
        return True

    def load(self, key: str) -> Unit | None:
        """The unit of that key, or None if it has not been done.

        Raises:
            DamagedUnitError: its file is damaged.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return Unit(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # on damaged bytes the unpickler stumbles in any way it can
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DamagedUnitError(f"{path} is damaged ({reason}); delete it, and it is computed again") from error

    def load_or_forget(self, key: str) -> Unit | None:
        """As `load`, but for a damaged file it says so, and finds nothing."""
        try:
            return self.load(key)
        except DamagedUnitError:
            print(f"afd: warning: {self._path(key)} is damaged; what it held is computed again", file=sys.stderr)
            return None

    def save(self, key: str, unit: Unit) -> None:
        """Writes a unit's file: it is whole, or not there.

        Raises:
            FileError: it cannot be written, as on a full disk.
        """
        file = io.BytesIO()
        torch.save({name: _cpu(value) for name, value in vars(unit).items()}, file)
        write_whole(self._path(key), file.getbuffer())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{UNIT}"


def saved_fingerprint(folder: Path) -> dict[str, Any] | None:
    """What evaluation the state in a folder is of; None where there is no state.

    Raises:
        StateError: there are units, but what they are of is missing or damaged.
    """
    path = folder / FINGERPRINT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = "is missing"
    except (json.JSONDecodeError, UnicodeDecodeError):
        reason = "is damaged"
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    else:
        if isinstance(found, dict):
            return found
        reason = "is damaged"
    units = len(list(folder.glob(f"*{UNIT}")))
    if units:
        raise StateError(
            f"{path} {reason}, so that nobody can say which evaluation the {units} results beside it are of; name "
            "another folder with --out, or discard them with --overwrite"
        )
    return None


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
