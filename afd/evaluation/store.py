"""The folder of an evaluation: its state, from which a killed run goes on, and the lock that makes it one process's."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from afd.errors import AfdError
from afd.evaluation.outcome import RESULTS, ItemResult, read_results
from afd.files import (
    LOCK,
    PART,
    FolderError,
    FolderLock,
    check_target,
    missing,
    new_folder,
    point_to,
    remove_empty,
    write_whole,
)
from afd.runtime import Group

FINGERPRINT = "run.json"
SUFFIX = ".pt"


class StateError(AfdError):
    """The state of an evaluation cannot be read, or belongs to another one."""


class DamagedItemError(StateError):
    """The file of a work item cannot be read; what it held must be computed again."""


class Store:
    """What the work items of one evaluation found, a file each, in a folder.

    Args:
        folder: where they lie; made if need be.
        fingerprint: what makes this run this run, in plain JSON: model, data, protocol, seed, batch size.

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
        """Whether the folder holds results of this evaluation, or may hold some one day.

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

    def load(self, key: str) -> ItemResult | None:
        """What the work item of that key found, or None if it has not been done.

        Raises:
            DamagedItemError: its file is damaged.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return ItemResult(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # on damaged bytes the unpickler stumbles in any way it can
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DamagedItemError(f"{path} is damaged ({reason}); delete it, and it is computed again") from error

    @property
    def kept(self) -> str:
        """What becomes of it where an evaluation ends early, to end a sentence with."""
        return f"; what was computed before is kept in {self.folder}, and the same command goes on from there"

    def load_or_forget(self, key: str) -> ItemResult | None:
        """As `load`, but for a damaged file it says so, and finds nothing."""
        try:
            return self.load(key)
        except DamagedItemError:
            print(f"afd: warning: {self._path(key)} is damaged; what it held is computed again", file=sys.stderr)
            return None

    def save(self, key: str, result: ItemResult) -> None:
        """Writes a work item's file: it is whole, or not there.

        Raises:
            FileError: it cannot be written, as on a full disk.
        """
        file = io.BytesIO()
        torch.save({name: _cpu(value) for name, value in vars(result).items()}, file)
        write_whole(self._path(key), file.getbuffer())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


class MemoryStore(Store):
    """The same in memory, for an evaluation that leaves no folder."""

    kept = ""

    def __init__(self) -> None:
        self._results: dict[str, ItemResult] = {}

    def load(self, key: str) -> ItemResult | None:
        """See `Store`."""
        return self._results.get(key)

    def save(self, key: str, result: ItemResult) -> None:
        """See `Store`."""
        self._results[key] = result


def saved_fingerprint(folder: Path) -> dict[str, Any] | None:
    """What evaluation the state in a folder is of; None where there is no state.

    Raises:
        StateError: there are results, but what they are of is missing or damaged.
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
    results = len(list(folder.glob(f"*{SUFFIX}")))
    if results:
        raise StateError(
            f"{path} {reason}, so that nobody can say which evaluation the {results} results beside it are of; name "
            "another folder with --out, or discard them with --overwrite"
        )
    return None


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


PARENT = Path("runs/evaluations")
STATE = "state"
REPORT = "report.html"
WRITTEN = (RESULTS, "curves.png", "divergence.png", "examples.png", REPORT)  # the first says that all are there

_T = TypeVar("_T")


@dataclass
class Output:
    """Where the report of an evaluation goes, and whether it is there yet.

    Attributes:
        out: the folder that was asked for. None: a new numbered one in `parent`, or, where an evaluation of the same
            kind was stopped there, that one's.
        overwrite: replace what `out` holds, unless it is this evaluation, unfinished.
        parent: of the numbered folders.
        folder: what is used; None before it is chosen.
        finished: whether all is written.
    """

    out: Path | None = None
    overwrite: bool = False
    parent: Path = PARENT
    folder: Path | None = None
    finished: bool = False

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raises FolderError or StateError, before anything is computed, if `held` would; writes nothing."""
        if self.out is not None:
            check_folder(self.out)
            if not self.overwrite:
                _check_free(self.out, fingerprint)

    @contextmanager
    def held(self, fingerprint: dict[str, Any], group: Group) -> Iterator[Store]:
        """The folder's state, while the folder is this evaluation's alone; all processes must ask.

        Folders that were made for it are removed where nothing has come into them.

        Args:
            fingerprint: what makes this evaluation this one.
            group: of this process.

        Raises:
            FolderError: it cannot be used, or another process uses it.
            StateError: it holds an unfinished evaluation of another kind.
        """
        with ExitStack() as stack:
            self.folder = Path(agreed(group, lambda: str(self._claim(fingerprint, stack))))
            yield Store(self.folder / STATE, fingerprint)

    def close(self, *, keep_state: bool) -> None:
        """Ends an evaluation whose results are written: removes the state, what it is known by last."""
        assert self.folder is not None
        if not keep_state:
            _remove_state(self.folder / STATE)
        self.finished = True

    @property
    def written(self) -> bool:
        """Whether the results of this very evaluation lie in its folder, so that only the state is to be removed."""
        return self.folder is not None and _only_state_left(self.folder)

    def status(self) -> str:
        """How far the evaluation has come and what to do when it is stopped now, in words."""
        if self.finished:
            return f"the report is written: {self.folder}/{REPORT}"
        if self.folder is None or not (self.folder / STATE / FINGERPRINT).exists():
            return "stopped before anything was computed; the same command starts it"
        return f"stopped; what was computed is kept in {self.folder}, and the same command goes on from there"

    def _claim(self, fingerprint: dict[str, Any], stack: ExitStack) -> Path:
        folder = self._numbered(fingerprint, stack) if self.out is None else self._given(self.out, fingerprint, stack)
        Store(folder / STATE, fingerprint)  # by which the same command will know it
        if self.out is None:
            point_to(folder)
        return folder

    def _given(self, out: Path, fingerprint: dict[str, Any], stack: ExitStack) -> Path:
        check_folder(out)
        lock(out, stack)
        try:
            _check_free(out, fingerprint)
        except (FolderError, StateError):
            if not self.overwrite:
                raise
            discard(out)
        return out

    def _numbered(self, fingerprint: dict[str, Any], stack: ExitStack) -> Path:
        for folder in _unfinished(self.parent, fingerprint):
            with ExitStack() as attempt:
                try:
                    lock(folder, attempt)
                    _check_free(folder, fingerprint)
                except (FolderError, StateError):  # another process goes on with it, or has finished it
                    continue
                stack.push(attempt.pop_all())
                return folder
        return numbered(self.parent, stack)


def check_folder(out: Path) -> None:
    """Raises FolderError or InputError if a file is in the way, or no folder can be at that path."""
    check_target("out", out)
    if out.exists() and not out.is_dir():
        raise FolderError(f"out is {out}, which is a file; it must be a folder")


def numbered(parent: Path, stack: ExitStack) -> Path:
    """A new numbered folder, locked until the stack is left."""
    stack.callback(remove_empty, missing(parent / "0001")[1:])
    folder = new_folder(parent)
    stack.callback(remove_empty, [folder / STATE, folder])
    stack.enter_context(FolderLock(folder).held())
    return folder


def lock(out: Path, stack: ExitStack) -> None:
    """Makes a folder this process's own until the stack is left; removed then if it was made, and nothing is in it."""
    stack.callback(remove_empty, [out / STATE, *missing(out)] if missing(out) else [])
    stack.enter_context(FolderLock(out).held())


def contents(folder: Path) -> set[str]:
    """Names of what lies in a folder, but for what a process leaves there that uses it, or was killed."""
    if not folder.is_dir():
        return set()
    return {path.name for path in folder.iterdir() if path.name != LOCK and not PART.fullmatch(path.name)}


def discard(out: Path) -> None:
    """Removes an evaluation, in an order that never leaves results beside the state of another evaluation."""
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    _remove_state(out / STATE)


def agreed(group: Group, decide: Callable[[], _T]) -> _T:
    """What the leading process decides, in every process; what it refuses ends them all."""
    if group.size == 1:
        return decide()
    answer: list[Any] = [None]
    if group.leads:
        try:
            answer = [decide()]
        except AfdError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], AfdError):
        raise answer[0]
    found: _T = answer[0]
    return found


def _check_free(out: Path, fingerprint: dict[str, Any]) -> None:
    """Raises unless a new evaluation can begin in a folder, or this one goes on or is tidied up there."""
    there = contents(out)
    if RESULTS in there and not (_only_state_left(out) and saved_fingerprint(out / STATE) == fingerprint):
        raise FolderError(f"out is {out}, which holds a finished evaluation; name another folder, or pass --overwrite")
    if STATE in there:
        Store.check(out / STATE, fingerprint)
    elif there:
        raise FolderError(f"out is {out}, which exists and holds no evaluation; name another folder")


def _only_state_left(out: Path) -> bool:
    """Whether an evaluation was killed when its results were written, and its state not removed yet."""
    if not ((out / RESULTS).exists() and (out / STATE / FINGERPRINT).exists()):
        return False
    try:
        return not read_results(out)["settings"]["kept_images"]
    except (AfdError, KeyError, TypeError):
        return False  # somebody else's results.json


def _unfinished(parent: Path, fingerprint: dict[str, Any]) -> Iterator[Path]:
    """Numbered folders in which an evaluation of this kind was stopped, the newest first."""
    if not parent.is_dir():
        return
    for folder in sorted((path for path in parent.iterdir() if path.name.isdecimal()), key=_number, reverse=True):
        try:
            if saved_fingerprint(folder / STATE) == fingerprint:
                yield folder
        except StateError:  # damaged: nobody can say what it was, and nothing needs it
            continue


def _number(folder: Path) -> int:
    return int(folder.name)


def _remove_state(state: Path) -> None:
    """Removes results first and the fingerprint last: until then, the same command knows its state."""
    if not state.is_dir():
        return
    for path in state.iterdir():
        if path.name != FINGERPRINT:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    (state / FINGERPRINT).unlink(missing_ok=True)
    state.rmdir()
