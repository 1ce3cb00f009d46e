"""The report of a comparison, from compare.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afd.files import write_whole
from afd.installation import needed_by

with needed_by("the report of a comparison"):
    from rich.console import Console
    from rich.table import Table

FIGURES = ("clean", "pgd-40", "autoattack", "transfer", "worst")


def write_all(folder: Path, content: dict[str, Any]) -> None:
    """Writes the table of a comparison beside its compare.json."""
    write_whole(folder / "table.md", "\n".join(" | ".join(row) for row in _rows(content)) + "\n")


def present(content: dict[str, Any], console: Console) -> None:
    """Prints the table of a comparison."""
    table = Table("entry", "seed", "state", *FIGURES, title=content["data"]["name"], title_justify="left")
    for row in _rows(content):
        table.add_row(*row)
    console.print(table)


def _rows(content: dict[str, Any]) -> list[list[str]]:
    return [
        [name, seed, run["state"], *(_percent((run["evaluation"] or {}).get(figure)) for figure in FIGURES)]
        for name, entry in content["entries"].items()
        for seed, run in entry["runs"].items()
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
