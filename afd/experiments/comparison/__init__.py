"""What `afd compare` does: several methods trained at one cost on one split, measured alike, and put into one table.

It is resumable at every point: a run is an ordinary one of `afd train`, its evaluation one of `afd evaluate`, and
compare.json says after each of them what there is.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from afd.config import TrainConfig
from afd.data import Splits
from afd.errors import AfdError, InputError, in_a_line
from afd.evaluation.command import EvaluationStoppedError
from afd.evaluation.store import check_folder, contents, lock, numbered
from afd.experiments.assembly import splits_for
from afd.experiments.comparison import budget
from afd.experiments.comparison.budget import BudgetError, seconds_in, within
from afd.experiments.comparison.record import PARENT, RECORD, TABLE, Comparison, Record
from afd.experiments.comparison.report import WRITTEN, present
from afd.experiments.comparison.runs import GO_ON, Runs, check_protocol, say
from afd.experiments.costs import StepCosts, cost_of, images_per_second
from afd.files import FolderError, point_to, write_whole
from afd.installation import needed_by
from afd.passes import UncountableError
from afd.processes import launched
from afd.runtime import device_named
from afd.training.signals import on_signals

with needed_by("afd compare"):
    from rich.console import Console


class FailedError(AfdError):
    """Entries of a comparison have failed; the others are finished."""

    status = 1


class _Halt(KeyboardInterrupt):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def compare(
    asked: Comparison, out: Path | None = None, *, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Trains and measures all entries, as far as that is not done yet; returns the content of compare.json.

    Args:
        asked: what to compare.
        out: folder of it all. None: that of this very comparison in ``runs/compare``, unfinished, or a new one there.
        overwrite: discard what `out` holds, if it is another comparison; this very one is gone on with.
        console: where to print; by default the terminal.

    Raises:
        InputError: a setting that cannot be, a method that cannot be trained so, a budget of less than an epoch.
        FolderError: `out` holds a comparison of other settings, or something else; or another process uses it.
        FailedError: entries have failed, and are noted; all others are finished.
        StoppedError: SIGTERM or SIGINT came; the same command goes on.
    """
    if launched():
        raise InputError("afd compare runs in one process; start it without torchrun")
    console = console or Console(emoji=False)
    try:
        with on_signals(_halt), ExitStack() as stack:
            return _compare(asked, out, overwrite, console, stack)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        raise EvaluationStoppedError(number, f"stopped; what is finished is kept, and {GO_ON}") from None


def _halt(number: int) -> None:
    raise _Halt(number)


def _compare(
    asked: Comparison, out: Path | None, overwrite: bool, console: Console, stack: ExitStack
) -> dict[str, Any]:
    device = device_named(asked.timed.device)
    splits = splits_for(asked.timed)
    place = _place(asked, len(splits.test), out, overwrite, stack)
    asked = asked.completed(None if place.record is None else place.record.content, len(splits.test))
    assert asked.images is not None
    splits = dataclasses.replace(splits, test=splits.test.some(asked.images))
    check_protocol(asked.timed, splits.test)
    record, folder = _planned(asked, place, splits, device, console), place.folder
    if out is None:
        point_to(folder)
    work = Runs(asked, record, splits, device, console)
    work.run()
    present(record.content, console)
    console.print(f"{folder}/{RECORD} written", soft_wrap=True, markup=False, highlight=False)
    left = {
        (name, seed): run
        for name, entry in record.entries.items()
        for seed, run in entry["runs"].items()
        if run["state"] != "done"
    }
    others = [f"{name} (seed {seed})" for name, seed in left if name not in asked.entries]
    if others:
        say(console, f"not asked for this time, and not finished: {', '.join(others)}")
    failed = [
        f"{name} (seed {seed}): {run['error']}"
        for (name, seed), run in left.items()
        if name in asked.entries and run["state"] == "failed"
    ]
    if failed:
        raise FailedError(f"failed: {'; '.join(failed)}; the same command tries them again")
    return record.content


# --- The folder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a comparison goes: a folder of this process alone, what is there of it, and what is to be discarded."""

    folder: Path
    record: Record | None = None
    discarded: Record | None = None


def _place(asked: Comparison, test: int, out: Path | None, overwrite: bool, stack: ExitStack) -> Place:
    """Finds the place of a comparison; discards nothing yet.

    Raises:
        FolderError: something else is there.
    """
    if out is None:
        found = next(_unfinished(asked, test, stack), None)
        return Place(numbered(PARENT, stack)) if found is None else Place(found.folder, found)
    check_folder(out)
    lock(out, stack)
    record = Record.read(out)
    try:
        _check_same(out, record, asked, test)
    except FolderError:
        if record is None or not overwrite:
            raise
        return Place(out, discarded=record)
    return Place(out, record)


def _check_same(out: Path, record: Record | None, asked: Comparison, test: int) -> None:
    """Raises FolderError if a folder holds another comparison, or something else."""
    if record is None:
        if contents(out) - {TABLE}:
            raise FolderError(f"out is {out}, which exists and holds no comparison; name another folder")
        return
    other = asked.completed(record.content, test).differences(record.content)
    if other:
        raise FolderError(
            f"out is {out}, which holds a comparison of other settings: {'; '.join(other)}; name another folder, or "
            "discard it by --overwrite"
        )


def _unfinished(asked: Comparison, test: int, stack: ExitStack) -> Iterator[Record]:
    """This very comparison in a numbered folder where it was stopped, the newest first; the folder is locked."""
    folders = [path for path in PARENT.iterdir() if path.name.isdecimal()] if PARENT.is_dir() else []
    for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
        with ExitStack() as attempt:
            try:
                lock(folder, attempt)
                record = Record.read(folder)
                if record is None or record.entries.keys() != asked.entries.keys():
                    continue
                if all(run["state"] == "done" for run in record.runs()):
                    continue
                _check_same(folder, record, asked, test)
            except AfdError:  # another one, or another process goes on with it
                continue
            stack.push(attempt.pop_all())
            yield record


def _discard(record: Record) -> None:
    """Removes a comparison; its record goes last."""
    for name in record.entries:
        shutil.rmtree(record.folder / name, ignore_errors=True)
    for name in (*WRITTEN, TABLE, RECORD):
        (record.folder / name).unlink(missing_ok=True)


# --- The plan ---------------------------------------------------------------------------------------------------------


def _planned(asked: Comparison, place: Place, splits: Splits[Any], device: torch.device, console: Console) -> Record:
    """The record with all that is asked for in it, written; nothing is trained yet.

    Raises:
        InputError: an entry cannot be trained on the data, or the budget is less than an epoch of it.
    """
    record, speed = place.record, None  # which is timed where no file or record says the passes
    known = () if record is None else record.entries
    new = {name: entry for name, entry in asked.entries.items() if name not in known}
    steps = {name: _steps(name, entry.config, splits, device) for name, entry in new.items()}
    if asked.epochs is None and asked.passes is None:
        at = _countable("at", asked, _steps("at", asked.timed, splits, device))
        cost = cost_of(asked.timed, splits.train, at).per_image
        assert cost is not None
        seconds = seconds_in(str(asked.budget))
        speed = images_per_second(asked.timed, splits.train, device, seconds)
        asked = dataclasses.replace(asked, passes=seconds * speed * cost)
        say(console, f"{asked.budget} of at are {asked.passes:.4g} passes here, at {speed:,.0f} images/s")
    costs, short = {}, dict[str, BudgetError]()
    for name, entry in new.items():
        if asked.passes is None:
            costs[name] = cost_of(entry.config, splits.train, steps[name])
            continue
        try:
            costs[name] = within(_countable(name, asked, steps[name]), asked.passes)
        except BudgetError as error:
            short[name] = error
    if asked.passes is not None and short:
        longest = max(short, key=lambda name: short[name].needed)
        measured = None if speed is None else seconds_in(str(asked.budget))
        raise budget.too_small(longest, short[longest], asked.passes, measured) from short[longest]
    if place.discarded is not None:
        _discard(place.discarded)
    if record is None:
        record = Record.begun(place.folder, asked, splits, speed, device)
    record.without_unbegun(asked.entries)
    for name, entry in new.items():
        record.add(name, entry, costs[name])
    if left_out := asked.told_left_out(new):
        say(console, f"left out where a method has no such option (or an attack of one step by design): {left_out}")
    record.has_seeds(asked.seeds)
    write_whole(place.folder / TABLE, asked.as_toml(record.content))
    record.write()
    return record


def _countable(name: str, asked: Comparison, steps: StepCosts | None) -> StepCosts:
    """The same steps, of an entry that a budget can be given to.

    Raises:
        InputError: nobody can count what they cost.
    """
    if steps is None:
        raise InputError(
            f"budget is {asked.budget}, but passes of {name} with the network {asked.timed.model.name} cannot be "
            "counted; name the length of all runs with --epochs instead"
        )
    return steps


def _steps(name: str, config: TrainConfig, splits: Splits[Any], device: torch.device) -> StepCosts | None:
    """What an entry's steps cost; None where that cannot be counted.

    Raises:
        InputError: it cannot be trained on the data.
    """
    try:
        return StepCosts(config, splits.train, device)
    except UncountableError:
        return None
    except AfdError as error:
        raise InputError(f"entry {name!r} cannot be trained on {config.data.name}: {error}") from error
    except Exception as error:  # of somebody's own method
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        told = f"{type(error).__name__} in {place}: {in_a_line(error)}"
        raise InputError(f"entry {name!r} cannot be trained on {config.data.name}: {told}") from error
