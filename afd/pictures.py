"""A drawn figure as a file that is whole or not there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from afd.errors import InputError
from afd.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_format(path: Path | str, formats: dict[str, str]) -> str:
    """The format of a picture of that name, PNG for a name without an ending.

    Raises:
        InputError: the ending is of no format that can be drawn.
    """
    ending = Path(path).suffix[1:].lower() or "png"
    if ending not in formats:
        raise InputError(f"the picture is to be {str(path)!r}; its name may end in .{', .'.join(sorted(formats))}")
    return ending


def save(figure: Figure, path: Path | str) -> None:
    """Writes a figure in the format that its name ends in.

    Raises:
        InputError: it ends in none.
        FileError: the file cannot be written.
    """
    ending, drawn = check_format(path, figure.canvas.get_supported_filetypes()), io.BytesIO()
    figure.savefig(drawn, format=ending)
    write_whole(path, drawn.getvalue())
