"""An evaluation on the terminal: accuracies, the worst case, each check with its number, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afd.attacks import NORMS
from afd.evaluation.checks import VERDICTS
from afd.evaluation.confirm import confirmed_in_words
from afd.evaluation.report import Table, advised, ball_name, percent
from afd.installation import needed_by
from afd.metrics import spanned

with needed_by("afd evaluate"):
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def present(results: dict[str, Any], console: Console) -> None:
    """Prints accuracies, the worst case, and each check with its number."""
    data = results["data"]
    title = f"{results['subject']['name']} on {data['images']} {data['split']} images of {data['name']}"
    grid = Grid("attack", "norm", "accuracy (%) at each ε", title=title, title_justify="left")
    intervals = results.get("intervals", {"clean": None, "worst_case": {}})  # those of earlier versions have none
    grid.add_row("none", "", _figure(results["clean"], intervals["clean"]))
    for attack in results["attacks"]:
        if attack["role"] != "probe":
            grid.add_row(attack["name"], NORMS[attack["norm"]].sign, _curve(attack["accuracies"]))
    for norm, worst in results["worst_case"].items():
        within = intervals["worst_case"].get(norm, {})
        spans = (f"{eps}: {_figure(accuracy, within.get(eps))}" for eps, accuracy in worst.items())
        grid.add_row("worst case", NORMS[norm].sign, "   ".join(spans), style="bold")
    if (union := results.get("union")) is not None:
        balls = ", ".join(map(ball_name, union["balls"]))
        grid.add_row("all balls", "", f"{balls}: {_figure(union['accuracy'], union.get('interval'))}", style="bold")
    console.print(grid)
    for line in confirmed_in_words(results):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    signs = Grid("check", "verdict", "number", "meaning", title="Self-deception", title_justify="left")
    for check in results["checks"]:
        number = "-" if check["number"] is None else f"{check['number']:.4g} {check['unit']}"
        meaning = "" if check["verdict"] == "pass" else check["meaning"]
        colour = COLOURS[check["verdict"]]
        signs.add_row(check["name"], f"[{colour}]{check['verdict']}[/]", number, meaning)
    console.print(signs)
    todo = advised(results["checks"], results["protocol"]["name"])
    if not todo:
        return
    advice = Grid("check", "what to do next", title=VERDICTS[results["verdict"]], title_justify="left")
    for name, verdict, words in todo:
        advice.add_row(f"[{COLOURS[verdict]}]{escape(name)}[/]", escape(words))
    console.print(advice)


def present_table(found: Table, console: Console) -> None:
    """Prints a table."""
    grid = Grid(*found.head, title=found.title, title_justify="left")
    for number, row in enumerate(found.rows):
        grid.add_row(*row, style="bold" if number < found.ours else "dim")
    console.print(grid)
    if found.note:
        console.print(found.note)


def _figure(share: float, interval: Sequence[float] | None) -> str:
    """A share as a percentage, with its interval where there is one."""
    return percent(share) if interval is None else f"{percent(share)} (95%: {spanned(interval)})"


def _curve(points: list[dict[str, Any]]) -> str:
    return "   ".join(f"{point['text']}: {percent(point['accuracy'])}" for point in points)
