"""The paper's tables for our own models beside the published figures, and a row as RobustBench prints it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afd.evaluation import published

Results = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text under a head.

    Attributes:
        title: says what the figures are.
        head: of the columns.
        rows: as wide as the head.
        ours: how many rows, from the first, are measured and not published.
        note: to be printed below.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ours: int = 0
    note: str = ""

    def markdown(self) -> str:
        """The table as README would hold it."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table


def table_1(results: Sequence[Results]) -> Table:
    """Accuracies (%): clean, PGD and C&W, white-box and transferred, as far as they were measured."""
    data = results[0]["data"]["name"]
    wanted = (("pgd-linf", None), ("cw", "1"), ("pgd-linf-transfer", None), ("cw-transfer", "1"))
    ours = [
        (name_of(one), percent(one["clean"]), *(percent(accuracy(one, name, eps)) for name, eps in wanted))
        for one in results
    ]
    paper = [
        (f"{method} (published)", *map(plain, figures)) for method, figures in published.TABLE_1.get(data, {}).items()
    ]
    eps = results[0]["protocol"]["reference"]["text"]
    printed = published.PGD_RADIUS.get(data, eps)
    theirs = f" (published: {printed})" if printed != eps else ""
    title = f"Table 1: accuracy (%) on {data}, PGD-L∞ at ε = {eps}{theirs}, C&W-L2 at ε = 1"
    return Table(title, ("method", *published.TABLE_1_COLUMNS), (*ours, *paper), len(ours), note(results))


def table_2(results: Sequence[Results]) -> Table:
    """Normalised areas under accuracy against ε of the paper's eight attacks."""
    data = results[0]["data"]["name"]
    ours = []
    for one in results:
        areas = {attack["name"]: attack["area"] for attack in one["attacks"]}
        figures = (f"{areas[name]:.2f}" if name in areas else "-" for name in published.TABLE_2_COLUMNS)
        ours.append((name_of(one), *figures))
    paper = [
        (f"{method} (published)", *map(plain, figures)) for method, figures in published.TABLE_2.get(data, {}).items()
    ]
    title = f"Table 2: normalised area under accuracy against ε on {data}"
    return Table(title, ("method", *published.TABLE_2_HEADS), (*ours, *paper), len(ours), note(results))


def robustbench(results: Results) -> Table | None:
    """The row that RobustBench's leaderboard would show; None unless AutoAttack was run."""
    if results["protocol"]["name"] not in ("autoattack", "reference"):
        return None
    norm, eps = results["protocol"]["norm"], results["protocol"]["reference"]["text"]
    robust = results["worst_case"][norm][eps]
    head = (
        "Method", "Standard accuracy", "AutoAttack robust accuracy", "AA eval. potentially unreliable", "Extra data",
        "Architecture",
    )  # fmt: skip
    extra = "no" if results["subject"]["metadata"] else "?"  # a function does not say what its model learned from
    unreliable = {"fail": "yes", "warn": "perhaps", "pass": "no"}.get(results["verdict"], "-")
    row = (
        results["subject"]["name"], percent(results["clean"]) + "%", percent(robust) + "%", unreliable, extra,
        results["subject"]["architecture"],
    )  # fmt: skip
    data = results["data"]
    return Table(f"{data['name']}, {norm}, ε = {eps}, {data['images']} {data['split']} images", head, (row,), 1)


def accuracy(results: Results, attack: str, eps: str | None) -> float | None:
    """Accuracy under an attack at a radius (as printed; None for the protocol's own), or None if not measured."""
    eps = results["protocol"]["reference"]["text"] if eps is None else eps
    for found in results["attacks"]:
        if found["name"] == attack:
            return next((point["accuracy"] for point in found["accuracies"] if point["text"] == eps), None)
    return None


def name_of(results: Results) -> str:
    """What a table calls a model: its name, with a dagger if it failed a check."""
    return f"{results['subject']['name']}{' †' if results['verdict'] == 'fail' else ''}"


def note(results: Sequence[Results]) -> str:
    """What the dagger means, if there is one."""
    failed = any(one["verdict"] == "fail" for one in results)
    return (
        "† Checks for self-deception failed: the figures of this row are not evidence of robustness." if failed else ""
    )


def percent(share: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "-" if share is None else f"{100 * share:.2f}"


def plain(figure: float | None) -> str:
    """A published figure as it was printed, or a dash."""
    return "-" if figure is None else f"{figure:g}"
