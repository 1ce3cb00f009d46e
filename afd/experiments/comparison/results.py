"""`afd compare --results FOLDER...`: what was measured before, side by side, in tables, a picture and a page.

Folders are either all of finished evaluations (of `afd evaluate`), which come beside the published figures, or all of
finished comparisons (of `afd compare`) of the same settings.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from afd.attacks.ball import NORMS
from afd.errors import InputError
from afd.evaluation.outcome import RESULTS, read_results
from afd.evaluation.plots import plot_sweeps
from afd.evaluation.report import Results, Table, comparison, table_1, table_2, union_table
from afd.evaluation.store import REPORT, check_folder, contents, discard, lock, numbered
from afd.evaluation.terminal import present_table
from afd.experiments.comparison.record import PARENT, RECORD, read_finished
from afd.experiments.comparison.report import FIGURES_CSV, MARKDOWN, PICTURE, present, told, write_all
from afd.experiments.comparison.rows import MADE, Content, Difference, ball_of
from afd.files import FolderError, check_path, check_source, point_to, write_whole
from afd.installation import needed_by
from afd.metrics import paired_interval, unpacked

with needed_by("afd compare"):
    from rich.console import Console

TABLES = "tables.md"
# what lies in a comparison's folder at last, of evaluations or of methods, and in that of one that was killed
FINISHED, UNFINISHED = (TABLES, MARKDOWN), {"curves.png", PICTURE, FIGURES_CSV, REPORT}


def compare_results(folders: Sequence[Path], out: Path | None, overwrite: bool, console: Console | None = None) -> Path:
    """Puts finished evaluations, or finished comparisons of methods, side by side; returns the report's folder.

    Of evaluations: the paper's tables, curves, and, where results hold which images withstood, differences from the
    first, image by image. Of comparisons: their entries as of one, the reference being the first's.

    Args:
        folders: of finished evaluations (or their results.json), or of finished comparisons; not of both kinds.
        out: folder to write to; None for the next of runs/compare.
        overwrite: replace a report in `out`.
        console: where to print; by default the terminal.

    Raises:
        InputError: there are no folders, or they are of both kinds, or of other data, images, ball, network or budget.
        ResultsError: one holds no finished results that can be read.
        FolderError: `out` holds something else, and `overwrite` is not set.
    """
    console = console or Console()
    if not folders:
        raise InputError("results is missing; name folders that afd evaluate or afd compare has finished")
    if out is not None:
        check_path("out", out)
        if (out / RECORD).exists():
            raise InputError(f"out is {out}, which holds the runs of a comparison; name another folder")
        if out.resolve() in {folder.resolve() for folder in folders}:
            raise InputError(f"out is {out}, which is one of the results; name another folder")
    homes = [(folder.parent if folder.suffix == ".json" else folder).resolve() for folder in folders]
    if twice := next((one for number, one in enumerate(homes) if one in homes[:number]), None):
        raise InputError(f"results names {folders[homes.index(twice)]} twice; name each folder once")
    kinds = [_is_comparison(folder) for folder in folders]
    if any(kinds) and not all(kinds):
        one, other = folders[kinds.index(True)], folders[kinds.index(False)]
        raise InputError(f"results names a comparison, {one}, and an evaluation, {other}; all must be of one kind")
    written = (_comparisons if all(kinds) else _evaluations)(list(folders), out, overwrite, console)
    console.print(f"{written}/{REPORT} written", soft_wrap=True, markup=False, highlight=False)
    return written


@contextmanager
def comparison_folder(out: Path | None, *, overwrite: bool) -> Iterator[Path]:
    """The folder of a comparison, `out` or the next in `PARENT`; its tables are written last.

    Raises:
        FolderError: it holds something else, and `overwrite` is not set; or another process uses it.
    """
    with ExitStack() as stack:
        if out is None:
            folder = numbered(PARENT, stack)
            yield folder
            point_to(folder)
            return
        check_folder(out)
        lock(out, stack)
        if contents(out) - UNFINISHED and not overwrite:
            known = {RESULTS: "a finished evaluation", **dict.fromkeys(FINISHED, "a table of results")}
            held = next((told for name, told in known.items() if name in contents(out)), "something else")
            raise FolderError(f"out is {out}, which holds {held}; name another folder, or pass --overwrite")
        for name in (*FINISHED, *UNFINISHED):
            (out / name).unlink(missing_ok=True)
        discard(out)
        yield out


def _is_comparison(folder: Path) -> bool:
    check_source("results", folder)
    return (folder if folder.name == RECORD else folder / RECORD).is_file()


def _refuse_other(what: str, folders: Sequence[Path], settings: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError, naming folder, setting and both values, where settings are not those of the first folder."""
    for folder, found in zip(folders[1:], settings[1:], strict=True):
        for name, value in settings[0].items():
            if found[name] != value and None not in (found[name], value):
                raise InputError(
                    f"results names {what} of other settings: {name} is {told(found[name]) or 'nothing'} in {folder}, "
                    f"and {told(value) or 'nothing'} in {folders[0]}"
                )


def _distinct(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Names, with their folders behind those that occur more than once: the last part, or where that is shared, all."""
    often = Counter(names)
    homes = [folder.parent if folder.suffix == ".json" else folder for folder in folders]
    lasts = Counter((name, home.name) for name, home in zip(names, homes, strict=True))
    return [
        name if often[name] == 1 else f"{name} ({home.name if lasts[name, home.name] == 1 and home.name else home})"
        for name, home in zip(names, homes, strict=True)
    ]


# --- Evaluations ------------------------------------------------------------------------------------------------------


def _evaluations(folders: list[Path], out: Path | None, overwrite: bool, console: Console) -> Path:
    found = [read_results(folder) for folder in folders]
    data = (one["data"] for one in found)
    settings = [{"data": one["name"], "split": one["split"], "images": one["count"]} for one in data]
    _refuse_other("evaluations", folders, settings)
    _name_apart(found, folders)
    tables = [table for table in (table_1(found), table_2(found), union_table(found), paired_table(found)) if table]
    with comparison_folder(out, overwrite=overwrite) as folder:
        plot_sweeps(folder / "curves.png", found)
        write_whole(folder / REPORT, comparison(found, folder, tables))
        write_whole(folder / TABLES, "\n".join(f"{table.title}\n\n{table.markdown()}\n" for table in tables))
    for table in tables:
        present_table(table, console)
    return folder


def _name_apart(found: Sequence[Results], folders: Sequence[Path]) -> None:
    """Gives models of one name their folders behind it, and the ball, where evaluations were judged in several."""
    names = _distinct([one["subject"]["name"] for one in found], folders)
    balls = [f"{NORMS[one['protocol']['norm']].sign} ε = {one['protocol']['reference']['text']}" for one in found]
    for one, name, ball in zip(found, names, balls, strict=True):
        one["subject"]["name"] = name if len(set(balls)) == 1 else f"{name}, {ball}"


def paired_table(results: Sequence[Results]) -> Table | None:
    """Differences from the first evaluation over the same images; None where none holds which images withstood.

    Args:
        results: of the same images, in the form of results.json; figures that two do not share are left out.
    """
    first, rows = results[0], []
    for one in results[1:]:
        mine, theirs = _withstood(one), _withstood(first)
        for figure in (name for name in theirs if name in mine):
            count = first["data"]["count"]
            a, b = unpacked(mine[figure], count).double(), unpacked(theirs[figure], count).double()
            apart = Difference(float((a - b).mean()), *paired_interval(a, b))
            rows.append((one["subject"]["name"], figure, apart.text, apart.span()))
    if not rows:
        return None
    title = f"Percentage points more than {first['subject']['name']}, on the same {first['data']['count']} images"
    note = "95% intervals of Bonett and Price; * where they exclude 0. They tell of other images, not of other seeds."
    return Table(title, ("method", "figure", "difference", "95%"), tuple(rows), len(rows), note)


def _withstood(results: Results) -> dict[str, str]:
    """The bits of an evaluation's images, by the figure that they are of: clean, each attack, worst case."""
    bits = results.get("withstood")
    if not bits:  # of an earlier version
        return {}
    whole = {attack["name"] for attack in results["attacks"] if attack["first"] is None and attack["role"] != "probe"}
    alone = {
        f"{stage}, ε = {eps}": text
        for stage, by_eps in bits["stages"].items()
        if stage in whole
        for eps, text in by_eps.items()
    }
    worst = {
        f"worst case, {NORMS[norm].sign} ε = {eps}": text
        for norm, by_eps in bits["worst_case"].items()
        for eps, text in by_eps.items()
    }
    protocol = results["protocol"]["name"]  # the worst cases of two protocols are not the same thing
    return {"clean": bits["clean"], **alone, **{f"{name} ({protocol})": text for name, text in worst.items()}}


# --- Comparisons ------------------------------------------------------------------------------------------------------


def _comparisons(folders: list[Path], out: Path | None, overwrite: bool, console: Console) -> Path:
    found = [read_finished(folder) for folder in folders]
    _refuse_other("comparisons", folders, [_settings(one) for one in found])
    with comparison_folder(out, overwrite=overwrite) as written:
        content = merged(found, folders, written)
        write_all(written, content)
    present(content, console)
    return written


def _settings(content: Content) -> dict[str, Any]:
    """What comparisons must share to stand in one table."""
    data, budget = content["data"], content["budget"]
    passes = budget.get("passes")
    return {
        "data": data["name"],
        "images": data["images"],
        "training images": data["train"],
        "validation images": data["validation"],
        "ball": ball_of(content),
        "network": content["network"],
        "budget": budget["asked"] if passes is None else f"{passes:g} passes",
        "options for all": content.get("train"),  # of all entries, where that was written down
    }


def merged(found: Sequence[Content], folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Comparisons of the same settings as one, in the form of compare.json, with paths from `out`."""
    homes = [folder.parent if folder.name == RECORD else folder for folder in folders]
    places = [(number, name) for number, one in enumerate(found) for name in one["entries"]]
    names = _distinct([name for _, name in places], [homes[number] for number, _ in places])
    known = dict(zip(places, names, strict=True))
    entries = {}
    for (number, name), new in known.items():
        entry, home = found[number]["entries"][name], homes[number]
        made = {name: found[number].get(name) for name in MADE}
        runs = {
            seed: {**_moved(run, home, out), "made": run.get("made") or made} for seed, run in entry["runs"].items()
        }
        entries[new] = {**entry, "runs": runs, "folder": os.path.relpath(home / entry.get("folder", name), out)}
    return {
        **found[0],
        "entries": entries,
        "reference": known.get((0, found[0]["reference"]), found[0]["reference"]),
        "seeds": list(dict.fromkeys(seed for one in found for seed in one["seeds"])),
        "again": f"`afd compare --results {' '.join(map(str, folders))}`",
    }


def _moved(run: Mapping[str, Any], home: Path, out: Path) -> dict[str, Any]:
    evaluation = run.get("evaluation")
    if evaluation is None:
        return dict(run)
    return {**run, "evaluation": {**evaluation, "folder": os.path.relpath(home / evaluation["folder"], out)}}
