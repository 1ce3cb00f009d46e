"""The report of a comparison of methods, from compare.json alone: terminal, Markdown, CSV, picture and page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from afd.attacks.ball import NORMS
from afd.evaluation.report import TEMPLATES, Table, data_url
from afd.evaluation.store import REPORT
from afd.experiments.comparison.picture import plot
from afd.experiments.comparison.rows import (
    ENDED,
    FIGURES,
    PAIRED,
    Content,
    Difference,
    Figure,
    Row,
    amount,
    checkpoints_of,
    duration,
    points_of,
    rows_of,
)
from afd.files import write_whole
from afd.installation import needed_by

with needed_by("the report of a comparison"):
    from jinja2 import ChoiceLoader, PackageLoader
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid
    from rich.text import Text

MARKDOWN, FIGURES_CSV, PICTURE = "table.md", "table.csv", "compare.png"
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
    if content["finished"]:
        return ""
    runs = [run["state"] for entry in content["entries"].values() for run in entry["runs"].values()]
    return f"{sum(state in ENDED for state in runs)} of {len(runs)} runs are done or have failed"


def ball_of(content: Content) -> str:
    """What attacks were bounded by."""
    ball = content["ball"]
    if "union" in ball:
        return "in the union of " + ", ".join(f"{NORMS[norm].sign} ε = {eps}" for norm, eps in ball["union"].items())
    return f"{NORMS[ball['norm']].sign} ε = {ball['text']}"


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
        "machine": told(content.get("machine")),
        "versions": told(content.get("versions")),
        "commit": told(content.get("commit")),
        "again": content.get("again", "`afd compare --config table.toml`"),
    }
    return {name: fact for name, fact in facts.items() if fact}


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
    compared = sum(len(row.differences) for row in rows)
    if compared > 1:
        lines.append(f"Of {compared} differences, one in twenty would exclude 0 by chance alone.")
    if any(row.seed is None for row in rows):
        lines.append(
            "Means: ± the standard deviation over seeds, and below it the range; Δ is of the mean of each image over "
            "the seeds that both have."
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
        figures = (_lines(row.figure(name)) for name in FIGURES)
        grid.add_row(Text(row.name), *figures, style="bold" if row.seed is None else "")
    console.print(grid)
    grid = _grid(f"from {content['reference']}", "Δ clean", "Δ AutoAttack", "passes", "time")
    grid.add_column("checks and alarms", overflow="fold")
    for row in rows:
        found = (_lines(row.differences.get(name)) for name in PAIRED)
        said = "; ".join([row.told or row.checks, *row.alarms])
        grid.add_row(Text(row.name), *found, amount(row.passes), duration(row.seconds), Text(said))
    console.print()
    console.print(grid)
    grid = _grid("checkpoint", "", "epoch", "clean", "PGD-40")
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
    """A figure, and below it its interval, or its deviation and range."""
    if found is None:
        return "-"
    value = found.percent.replace(" ±", "\n±") if isinstance(found, Figure) else found.points
    return f"{value}\n{found.span(1).replace(' to ', '…')}"


def _percent(found: Figure | None) -> str:
    return "-" if found is None else found.percent


def _line(found: Figure | None) -> str:
    return "-" if found is None else f"{found.percent} ({found.span()})"


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
        body.append((_plain(row.name), *figures, *apart, amount(row.passes), duration(row.seconds), *said))
    note = "\n".join(map(_plain, notes_of(content, rows)))
    return Table("accuracy (%)", head, tuple(body), len(body), note)


def brief_table(content: Content) -> Table:
    """A row for each entry, its mean where it has several seeds, of what matters most: for a page among others."""
    rows = points_of(content)
    head = ("entry", "clean", "PGD-40", "AutoAttack", "transfer", f"Δ AutoAttack from {content['reference']}", "checks")
    body = []
    for row in rows:
        clean, pgd, attacked, transferred = (row.figure(name) for name in ("clean", "pgd-40", "autoattack", "transfer"))
        short = (_plain(row.name), _percent(clean), _percent(pgd), _line(attacked), _percent(transferred))
        body.append((*short, _marked(row.differences.get("autoattack")), _plain(row.checks)))
    title = f"{title_of(content)}, accuracy (%) on {content['data']['images']:,} test images"
    return Table(title, head, tuple(body), len(body), "\n".join(map(_plain, notes_of(content, rows))))


def checkpoint_table(content: Content) -> Table:
    """Best, last and averaged weights of each run, for Markdown."""
    body = [
        (_plain(name), checkpoint, str(epoch), _line(clean), _line(robust))
        for name, checkpoint, epoch, clean, robust in checkpoints_of(content)
    ]
    return Table("checkpoints", ("entry", "checkpoint", "epoch", "clean", "PGD-40"), tuple(body), len(body))


def _marked(found: Difference | None) -> str:
    if found is None:
        return "-"
    text = f"{found.points.replace('*', chr(92) + '*')} ({found.span()})"
    return f"**{text}**" if found.clear else text


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else, within a cell."""
    for sign in "\\`*_<|[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def as_csv(content: Content) -> str:
    """A line for each entry and seed, under a head; shares in [0, 1], unrounded, empty where nothing was measured."""
    out, lines = io.StringIO(), []
    for row in rows_of(content):
        if row.seed is None:
            continue
        entry = content["entries"][row.entry]
        run = entry["runs"][row.seed]
        line: dict[str, Any] = {
            "entry": row.entry, "seed": row.seed, "state": row.state, "error": run.get("error"),
            "method": entry["method"], "words": entry["words"],
        }  # fmt: skip
        for name in FIGURES:
            line |= _columns(name.replace("-", "_"), row.figure(name))
        for name in PAIRED:
            line |= _columns(f"{name}_difference", row.differences.get(name))
        line |= {name: entry.get(name) for name in ("passes", "passes_per_image", "epochs", "epoch_images")}
        line |= {"seconds": row.seconds, "verdict": row.verdict, "failed_checks": "; ".join(row.failed)}
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
    if found is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


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
        FIGURES=FIGURES, PAIRED=PAIRED,
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
