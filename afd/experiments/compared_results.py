"""Finished evaluations side by side: ``afd compare --results``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afd.evaluation.command import EvaluateConfig, compare
from afd.installation import needed_by

with needed_by("afd compare"):
    from rich.console import Console


def compare_results(folders: Sequence[Path], out: Path | None, overwrite: bool, console: Console) -> None:
    """Puts finished evaluations side by side."""
    compare(EvaluateConfig(compare=tuple(folders), out=out, overwrite=overwrite), console)
