"""The report of a comparison of methods, from compare.json alone: terminal, Markdown, CSV, picture and page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from afd.evaluation.report import TEMPLATES, Table, data_url
from afd.evaluation.store import REPORT
from afd.experiments.comparison.picture import plot
from afd.experiments.comparison.rows import (
    ENDED,
    FIGURES,
    MADE,
    PAIRED,
    PGD,
    Content,
    Difference,
    Figure,
    Row,
    amount,
    ball_of,
    checkpoints_of,
    ended,
    points_of,
    rows_of,
)
from afd.experiments.display import duration
from afd.files import write_whole
from afd.installation import needed_by

with needed_by("the report of a comparison"):
    from jinja2 import ChoiceLoader, PackageLoader
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid
    from rich.text import Text

MARKDOWN, FIGURES_CSV, PICTURE = "table.md", "table.csv", "compare.png"
WRITTEN = (MARKDOWN, FIGURES_CSV, PICTURE, REPORT)  # whenever something is finished
FAILED = "† Checks for self-deception failed: the figures of this row are not evidence of robustness."
CHECKPOINTS = ("best", "last", "EMA")


def write_all(folder: Path, content: Content) -> None:
    """Writes table.md, table.csv, compare.png and report.html, each whole or not at all, of as much as is done.

    Args:
        folder: of the comparison, which pictures and reports of runs are linked from.
        content: of its compare.json.

    Raises:
        FileError: one cannot be written.
    """
    plot(folder / PICTURE, content)
    write_whole(folder / FIGURES_CSV, as_csv(content))
    write_whole(folder / REPORT, as_page(content, folder))
    write_whole(folder / MARKDOWN, as_markdown(content))


# --- Words ------------------------------------------------------------------------------------------------------------


def title_of(content: Content) -> str:
    """What is compared, in a few words."""
    count = len(content["entries"])
    return f"{count} method{'s' * (count != 1)} on {content['data']['name']}, {ball_of(content)}"


def unfinished(content: Content) -> str:
    """How far a comparison is that is not finished, in words; "" for one that is."""
    if ended(content):
        return ""
    runs = [run["state"] for entry in content["entries"].values() for run in entry["runs"].values()]
    return f"{sum(state in ENDED for state in runs)} of {len(runs)} runs are done or have failed"


def facts_of(content: Content) -> dict[str, str]:
    """How the figures came about."""
    data, budget = content["data"], content["budget"]
    passes, speed = budget.get("passes"), budget.get("at_images_per_second")
    measured = "" if speed is None else f" of `at` at {speed:,.0f} images a second"
    each = "" if passes is None else f": {amount(passes)} passes of an image, for every entry"
    facts = {
        "data": f"{data['name']}, {data['classes']} classes",
        "images": f"{data['train']:,} to train on, {data['validation']:,} to choose by, "
        f"the first {data['images']:,} of the test images to attack",
        "network": told(content["network"]),
        "ball": ball_of(content),
        "budget": f"{budget.get('asked')}{measured}{each}",
        "reference": content["reference"],
        "seeds": ", ".join(map(str, content["seeds"])),
        "options for all": f"`{content['train']}`" if content.get("train") else "",
        **{name: told(content.get(name)) for name in MADE},
        "made otherwise": "; ".join(made_otherwise(content)),
        "again": content.get("again", "`afd compare --config table.toml`"),
    }
    return {name: fact for name, fact in facts.items() if fact}


def made_otherwise(content: Content) -> list[str]:
    """The runs that another machine, version or commit has made than the comparison's, and what is other of it."""
    found: dict[str, list[str]] = {}
    for name, entry in content["entries"].items():
        for seed, run in entry["runs"].items():
            made = run.get("made") or {}  # which records of before do not have
            other = [_other(kind, made[kind], content.get(kind)) for kind in MADE if made.get(kind)]
            if text := ", ".join(filter(None, other)):
                found.setdefault(text, []).append(f"{name} (seed {seed})")
    return [f"{', '.join(runs)}: {text}" for text, runs in found.items()]


def _other(kind: str, here: Any, there: Any) -> str:
    """What of a fact is other in a run than in the whole comparison."""
    if not (isinstance(here, Mapping) and isinstance(there, Mapping)):
        return "" if here == there else f"{kind} {told(here)}"
    return told({name: one for name, one in here.items() if one != there.get(name)})


def told(value: Any) -> str:
    """A fact in plain JSON as text."""
    if isinstance(value, Mapping):
        return ", ".join(str(one) if name == "name" else f"{name} {one}" for name, one in value.items())
    return "" if value is None else str(value)


def notes_of(content: Content, rows: list[Row]) -> list[str]:
    """How to read the table."""
    images, reference = content["data"]["images"], content["reference"]
    lines = [
        f"With figures, their 95% intervals over {images:,} images (Wilson); Δ: percentage points more than "
        f"{reference}, image by image (Bonett and Price), * where the interval excludes 0. Both tell of other images, "
        "not of other seeds."
    ]
    compared = sum(len(row.differences) for row in points_of(content))
    if compared > 1:
        lines.append(
            f"If there were no difference at all, about one in twenty of these {compared} (one for each entry and "
            "figure) would exclude 0."
        )
    if any(row.seed is None for row in rows):
        lines.append(
            "Means over seeds have the interval over images, and besides, as 'seeds', the least and the largest of the "
            "seeds and ± their standard deviation; Δ is of the mean of each image over the seeds that both have, and "
            "its 'seeds' are the differences of each of these."
        )
    if any(row.verdict == "fail" for row in rows):
        lines.append(FAILED)
    return lines


# --- Terminal ---------------------------------------------------------------------------------------------------------


def present(content: Content, console: Console) -> None:
    """Prints the tables: accuracies, differences with cost and checks, and the checkpoints; for 80 columns and more."""
    rows, progress = rows_of(content), unfinished(content)
    title = title_of(content) + (f" (not finished: {progress})" if progress else "")
    grid = _grid("accuracy (%)", *FIGURES.values(), title=title)
    for row in rows:
        if row.told:
            continue
        known = [row.figure(name) for name in FIGURES]
        grid.add_row(Text(row.name), *map(_lines, known), style="bold" if row.seed is None else "")
        if row.seed is None:
            grid.add_row("  seeds", *map(_seeds, known))
    console.print(grid)
    grid = _grid(f"from {content['reference']}", "Δ clean", "Δ AutoAttack", "passes", "time")
    grid.add_column("checks and alarms", overflow="fold")
    for row in rows:
        found = [row.differences.get(name) for name in PAIRED]
        said = "; ".join([row.told or row.checks, *row.alarms])
        grid.add_row(Text(row.name), *map(_lines, found), amount(row.passes), row.time, Text(said))
        if any(one is not None and one.seeds for one in found):
            grid.add_row("  seeds", *map(_seeds, found))
    console.print()
    console.print(grid)
    grid = _grid("checkpoint", "", "epoch", "clean", FIGURES[PGD])
    for name, checkpoint, epoch, clean, robust in checkpoints_of(content):
        grid.add_row(Text(name), checkpoint, str(epoch), *(_line(one) for one in (clean, robust)))
    if grid.rows:
        console.print()
        console.print(grid)
    console.print()
    for line in notes_of(content, rows):
        console.print(escape(line), highlight=False)


def _grid(first: str, *head: str, title: str | None = None) -> Grid:
    grid = Grid(
        title=title and escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold"
    )
    grid.add_column(escape(first), overflow="fold", max_width=22)
    for name in head:
        grid.add_column(escape(name), justify="right", no_wrap=True)
    return grid


def _lines(found: Figure | Difference | None) -> str:
    """A figure, and below it its interval over images."""
    return "-" if found is None else f"{found.text}\n{found.span(1).replace(' to ', '…')}"


def _seeds(found: Figure | Difference | None) -> str:
    """The deviation over seeds, and below it their range."""
    if found is None or not found.seeds:
        return "-"
    return f"±{100 * found.deviation:.2f}\n{found.range(1).replace(' to ', '…')}"


def _line(found: Figure | Difference | None) -> str:
    """A figure with its interval over images, and its seeds, where it is of several."""
    if found is None:
        return "-"
    seeds = f"; seeds {found.range()}, ± {100 * found.deviation:.2f}" if found.seeds else ""
    return f"{found.text} ({found.span()}{seeds})"


# --- Files ------------------------------------------------------------------------------------------------------------


def as_markdown(content: Content) -> str:
    """The tables as README would hold them, how they came about, and the picture."""
    rows, progress = rows_of(content), unfinished(content)
    lines = [f"# {title_of(content)}", *([f"**Not finished: {progress}.**"] if progress else [])]
    lines += [f"![clean accuracy against accuracy under AutoAttack]({PICTURE})", table_of(content, rows).markdown()]
    lines += [
        "Checkpoints: best on validation data, last, average of the weights",
        checkpoint_table(content).markdown(),
    ]
    lines += ["\n".join(f"- {name}: {fact}" for name, fact in facts_of(content).items())]
    return "\n\n".join(lines) + "\n"


def table_of(content: Content, rows: list[Row]) -> Table:
    """Accuracies, differences, cost and checks in one table, for Markdown."""
    head = ("entry", *FIGURES.values(), "Δ clean", "Δ AutoAttack", "passes", "time", "checks", "alarms")
    body = []
    for row in rows:
        figures = (_line(row.figure(name)) for name in FIGURES)
        apart = (_marked(row.differences.get(name)) for name in PAIRED)
        said = (_plain(row.told or row.checks), _plain(", ".join(row.alarms) or "-"))
        body.append((_plain(row.name), *figures, *apart, amount(row.passes), row.time, *said))
    note = "\n".join(map(_plain, notes_of(content, rows)))
    return Table("accuracy (%)", head, tuple(body), len(body), note)


def brief_table(content: Content) -> Table:
    """A row for each entry, its mean where it has several seeds, of what matters most: for a page among others."""
    rows = points_of(content)
    shown = {name: text for name, text in FIGURES.items() if name != "worst"}
    head = ("entry", *shown.values(), f"Δ AutoAttack from {content['reference']}", "checks")
    body = []
    for row in rows:
        figures = (_line(row.figure(name)) for name in shown)
        body.append((_plain(row.name), *figures, _marked(row.differences.get("autoattack")), _plain(row.checks)))
    title = f"{title_of(content)}, accuracy (%) on {content['data']['images']:,} test images"
    return Table(title, head, tuple(body), len(body), "\n".join(map(_plain, notes_of(content, rows))))


def checkpoint_table(content: Content) -> Table:
    """Best, last and averaged weights of each run, for Markdown."""
    body = [
        (_plain(name), checkpoint, str(epoch), _line(clean), _line(robust))
        for name, checkpoint, epoch, clean, robust in checkpoints_of(content)
    ]
    return Table("checkpoints", ("entry", "checkpoint", "epoch", "clean", FIGURES[PGD]), tuple(body), len(body))


def _marked(found: Difference | None) -> str:
    if found is None:
        return "-"
    text = _line(found).replace("*", "\\*")
    return f"**{text}**" if found.clear else text


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else, within a cell."""
    for sign in "\\`*_<|[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def as_csv(content: Content) -> str:
    """A line for each entry and seed, and for the mean of several; shares in [0, 1], empty where nothing was measured.

    `low` and `high` are the interval over images, `least` and `largest` the range over seeds, which only a mean has.
    """
    out, lines = io.StringIO(), []
    for row in rows_of(content):
        entry = content["entries"][row.entry]
        run = {} if row.seed is None else entry["runs"][row.seed]
        made = {name: content.get(name) for name in MADE} if row.seed is not None else {}
        made |= run.get("made") or {}
        versions = made.get("versions")
        line: dict[str, Any] = {
            "entry": row.entry, "seed": row.seed or "mean", "state": row.state, "error": run.get("error"),
            "method": entry["method"], "words": entry["words"], "words_for_all": content.get("train"),
            "machine": told(made.get("machine")), "commit": made.get("commit"),
            "torch": versions.get("torch") if isinstance(versions, Mapping) else versions,
        }  # fmt: skip
        for name in FIGURES:
            line |= _columns(name.replace("-", "_"), row.figure(name))
        for name in PAIRED:
            line |= _columns(f"{name}_difference", row.differences.get(name))
        line |= {name: entry.get(name) for name in ("passes", "passes_per_image", "epochs", "epoch_images")}
        line |= {"seconds": row.seconds, "at_chance": row.at_chance, "verdict": row.verdict}
        line |= {"failed_checks": "; ".join(row.failed)}
        line |= {"warned_checks": "; ".join(row.warned), "alarms": "; ".join(row.alarms)}
        for name in CHECKPOINTS:
            one = (run.get("measured") or {}).get(name) or {}
            line |= {f"{name.lower()}_{key}": one.get(key) for key in ("epoch", "natural", "robust")}
        lines.append(line)
    writer = csv.DictWriter(out, lines[0] if lines else ["entry", "seed", "state"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _columns(name: str, found: Figure | Difference | None) -> dict[str, float | None]:
    least, largest = (min(found.seeds), max(found.seeds)) if found is not None and found.seeds else (None, None)
    values = (None, None, None) if found is None else (found.value, found.low, found.high)
    columns = (name, *(f"{name}_{end}" for end in ("low", "high", "least", "largest")))
    return dict(zip(columns, (*values, least, largest), strict=True))


# --- The page ---------------------------------------------------------------------------------------------------------

PAGES = TEMPLATES.overlay(
    loader=ChoiceLoader([PackageLoader("afd.experiments.comparison"), PackageLoader("afd.evaluation")])
)
PAGES.filters = {**TEMPLATES.filters, "amount": amount, "duration": duration}


def as_page(content: Content, folder: Path) -> str:
    """The page as HTML, which holds the folder's compare.png and leads to what the runs have left there."""
    rows = rows_of(content)
    facts = facts_of(content)
    checkpoints: dict[str, dict[str, tuple[int, Figure | None, Figure | None]]] = {}
    for name, checkpoint, epoch, clean, robust in checkpoints_of(content):
        checkpoints.setdefault(name, {})[checkpoint] = epoch, clean, robust
    kept = [name for name in CHECKPOINTS if any(name in found for found in checkpoints.values())]
    return PAGES.get_template("methods.html").render(
        content=content, title=title_of(content), unfinished=unfinished(content), rows=rows, facts=facts,
        subtitle=f"{facts['images']}. Network: {facts['network']}. Budget: {facts['budget'].replace('`', '')}.",
        checkpoints=checkpoints, kept=kept, notes=notes_of(content, rows), cost=cost_of,
        numbers={name: number for number, name in enumerate(content["entries"])},
        links=lambda name, seed: links(content, name, seed, folder), png=lambda name: data_url(folder / name),
        FIGURES=FIGURES, PAIRED=PAIRED, PGD=PGD,
    )  # fmt: skip


def cost_of(entry: Mapping[str, Any]) -> str:
    """What an entry's training passes through the network, in words."""
    each, epochs, images, passes = (
        entry.get(name) for name in ("passes_per_image", "epochs", "epoch_images", "passes")
    )
    parts = [
        "" if each is None else f"{each:g} passes for each image",
        "" if epochs is None else f"{epochs} epochs",
        "" if images is None else f"of {images:,} images",
        "" if passes is None else f"{amount(passes)} passes in all",
    ]
    return ", ".join(filter(None, parts)) or "not known yet"


def links(content: Content, name: str, seed: str, folder: Path) -> list[tuple[str, str]]:
    """(text, relative path) of what a run has left in the folder of the comparison, as far as it is there."""
    entry = content["entries"][name]
    run = PurePosixPath(entry.get("folder", name)) / f"seed-{seed}"
    evaluation = entry["runs"][seed].get("evaluation")
    wanted = {"learning curves": run / "curves.png"}
    if evaluation:
        wanted["evaluation"] = PurePosixPath(evaluation["folder"]) / REPORT
    return [(text, str(path)) for text, path in wanted.items() if (folder / path).is_file()]
