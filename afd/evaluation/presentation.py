"""What an evaluation prints when it is done."""

from __future__ import annotations

from typing import Any

from afd.evaluation.advice import advised
from afd.evaluation.html import VERDICTS
from afd.evaluation.plots import NORM_SIGNS
from afd.evaluation.tables import Table, percent
from afd.extras import needed_by

with needed_by("the report of an evaluation"):
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def present(results: dict[str, Any], console: Console) -> None:
    """Prints accuracies, the worst case, and each check with its number."""
    data = results["data"]
    title = f"{results['subject']['name']} on {data['images']} {data['split']} images of {data['name']}"
    grid = Grid("attack", "norm", "accuracy (%) at each ε", title=title, title_justify="left")
    grid.add_row("none", "", percent(results["clean"]))
    for attack in results["attacks"]:
        if attack["role"] != "probe":
            grid.add_row(attack["name"], NORM_SIGNS[attack["norm"]], _curve(attack["accuracies"]))
    for norm, worst in results["worst_case"].items():
        points = [{"text": eps, "accuracy": accuracy} for eps, accuracy in worst.items()]
        grid.add_row("worst case", NORM_SIGNS[norm], _curve(points), style="bold")
    console.print(grid)
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
    told = Grid("check", "what to do next", title=VERDICTS[results["verdict"]], title_justify="left")
    for name, verdict, words in todo:
        told.add_row(f"[{COLOURS[verdict]}]{escape(name)}[/]", escape(words))
    console.print(told)


def present_table(found: Table, console: Console) -> None:
    """Prints a table."""
    grid = Grid(*found.head, title=found.title, title_justify="left")
    for number, row in enumerate(found.rows):
        grid.add_row(*row, style="bold" if number < found.ours else "dim")
    console.print(grid)
    if found.note:
        console.print(found.note)


def _curve(points: list[dict[str, Any]]) -> str:
    return "   ".join(f"{point['text']}: {percent(point['accuracy'])}" for point in points)
